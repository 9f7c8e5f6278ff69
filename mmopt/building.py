"""From an optimized module to a verified artifact on disk."""

from __future__ import annotations

import dataclasses
import gc
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mmopt.errors import UnsupportedError, VerifyError
from mmopt.evaluation import Evaluation, Judgement
from mmopt.frontends.onnx import save_onnx
from mmopt.ir.module import Module
from mmopt.runnable import OPTIMIZED, ArtifactRunnable, Inputs, ModelRunnable, unload_pages
from mmopt.runtime import Session, load_artifact
from mmopt.runtime.manifest import Manifest
from mmopt.runtime.writer import ArtifactWriter, write_artifact
from mmopt.verification import Verification, compare_runnables

if TYPE_CHECKING:
    from mmopt.backends.cpu.choosing import Chooser
    from mmopt.backends.profile import Profile

Progress = Callable[[int, int, str], None]
_NOTHING = "no artifact was written; --allow-mismatch writes it all the same"
_STEPS = ("lower and compile", "write", "verify", "move into place")


@dataclasses.dataclass(frozen=True)
class CompileResult:
    """A written artifact.

    Attributes:
        path: Where it is.
        manifest: What it says about itself.
        size: Bytes of all its files.
        checks: How each entry point agrees with the model it was made from, by name; empty when it cannot run here.
        unverified: Why it could not be verified, or "".
        tuning: What measuring its kernels found, as in ``report.json``; None when they were chosen by prediction.
        judgement: How it does its task, when there is an evaluator.
    """

    path: pathlib.Path
    manifest: Manifest
    size: int
    checks: dict[str, Verification]
    unverified: str = ""
    tuning: dict[str, Any] | None = None
    judgement: Judgement | None = None

    @property
    def native(self) -> bool:
        """Whether every segment of every entry point is native code."""
        segments = (segment for entry in self.manifest.entries.values() for segment in entry.segments)
        return all(segment.kind == "native" for segment in segments)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "path": str(self.path),
            "size": self.size,
            "target": self.manifest.target,
            "native": self.native,
            "entries": {name: entry.to_json() for name, entry in self.manifest.entries.items()},
            "notes": self.manifest.notes,
            "verified": {name: check.to_dict() for name, check in self.checks.items()},
            "unverified": self.unverified,
            "tuning": self.tuning,
            "task": None if self.judgement is None else self.judgement.to_dict(),
        }


@dataclasses.dataclass(frozen=True)
class Check:
    """How an artifact is verified before it gets its name.

    Attributes:
        reference: What ``main`` has to agree with; the module that is compiled when None.
        inputs: Inputs to compare on; probes when None.
        tolerance: Largest error as a fraction of an output's range; by default it follows from the number formats.
        seed: Seed of the probes.
        allow_mismatch: Write the artifact even when it disagrees, or misses a limit of a metric.
        evaluation: How the task judges ``main``, when there is an evaluator.
    """

    reference: Module | None = None
    inputs: Inputs | Sequence[Inputs] | None = None
    tolerance: float | None = None
    seed: int = 0
    allow_mismatch: bool = False
    evaluation: Evaluation | None = None


def build_artifact(
    module: Module,
    profile: Profile,
    output: str | os.PathLike[str],
    *,
    entries: Mapping[str, Module] | None = None,
    further: Sequence[Profile] = (),
    check: Check | None = None,
    report: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    chooser: Chooser | None = None,
    progress: Progress = lambda index, total, name: None,
) -> CompileResult:
    """Compile, write beside ``output``, verify there, and only then give it its name.

    Args:
        module: What becomes the entry point ``main``, and ``optimized.onnx``.
        profile: What to compile for.
        output: Folder to write, or one zip when the name ends in ``.zip``.
        entries: Further entry points by name.
        further: What to compile for besides, the most demanding first; the runtime takes the first that runs.
        check: How to verify.
        report: Content of ``report.json``.
        config: The resolved configuration, for the manifest.
        chooser: Picks the parameters of kernels for ``profile``; by prediction when None.
        progress: Told step, number of steps and what it does.

    Raises:
        UserError: ``output`` cannot be written.
        UnsupportedError: Something in the model runs nowhere.
        BackendError: Compiling or running failed.
        VerifyError: It disagrees with the reference.
        ContractError: It misses a limit of a metric.
    """
    from mmopt.lowering.compiler import CompileOptions, compile_module

    entries, check = dict(entries or {}), check or Check()
    with write_artifact(output) as writer:
        progress(0, len(_STEPS), _STEPS[0])
        program = compile_module(module, profile, entries=entries, options=CompileOptions(chooser=chooser))
        # What accuracy rests on is told with the artifact, not in its report alone.
        program.notes.extend(dict.fromkeys(r.message for r in module.remarks if r.source == "calibration"))
        progress(1, len(_STEPS), _STEPS[1])
        writer.add_program(program, config=config)
        # Its weights are as large as the model, and parts of the compiler that refer to each other still hold them.
        del program
        gc.collect()
        for other in further:
            writer.add_variant(compile_module(module, other, entries=entries), f"variants/{other.name}/")
            gc.collect()
        writer.add(OPTIMIZED, lambda path: save_onnx(module, path, inline=True))
        if report is not None:
            writer.add_json("report.json", report)
        sealed = writer.seal()
        unload_pages(module)
        progress(2, len(_STEPS), _STEPS[2])
        checks, refused = _verify(writer, sealed, module, entries, check)
        unverified = "; ".join(refused) if not checks else ""
        if not check.allow_mismatch:
            for found in checks.values():
                _insist(found)
        judgement = _judge(writer, module, check)
        if judgement is not None and not check.allow_mismatch:
            judgement.check(_NOTHING)
        writer.add_json("verify.json", _verify_json(checks, refused, judgement))
        progress(3, len(_STEPS), _STEPS[3])
        manifest = writer.seal()
        writer.commit()
    size = sum(record.size for record in manifest.files.values())
    return CompileResult(writer.output, manifest, size, checks, unverified, judgement=judgement)


def _verify(
    writer: ArtifactWriter, manifest: Manifest, module: Module, entries: Mapping[str, Module], check: Check
) -> tuple[dict[str, Verification], list[str]]:
    """How every entry point agrees, for every target that runs here, and why others could not be tried."""
    found: dict[str, Verification] = {}
    refused: list[str] = []
    for choice in manifest.each():
        name = str(choice.target.get("name"))
        try:
            session = load_artifact(writer.folder, target=name, verify_hashes="size")
        except UnsupportedError as error:
            refused.append(f"not verified, because it cannot run here: {error.what}")
            continue
        label = f"{writer.output.name} for {name}" if found else writer.output.name
        suffix = f" for {name}" if found else ""
        with session:
            agreed = _verify_session(session, label, module, entries, check)
        found |= {entry + suffix: verification for entry, verification in agreed.items()}
    return found, refused


def _verify_session(
    session: Session, label: str, module: Module, entries: Mapping[str, Module], check: Check
) -> dict[str, Verification]:
    reference = ModelRunnable(check.reference or module, "the original model", seed=check.seed)
    main = ArtifactRunnable(session, label, module=module)
    found = {
        "main": compare_runnables(main, reference, inputs=check.inputs, seed=check.seed, tolerance=check.tolerance)
    }
    for name, entry in entries.items():
        found[name] = _verify_entry(session, name, entry, label, check)
    return found


def _verify_entry(session: Session, name: str, entry: Module, label: str, check: Check) -> Verification:
    actual = ArtifactRunnable(session, f"{label}:{name}", entry=name, module=entry)
    reference = ModelRunnable(entry, f"{name} of the optimized model", seed=check.seed)
    return compare_runnables(actual, reference, seed=check.seed, tolerance=check.tolerance)


def _judge(writer: ArtifactWriter, module: Module, check: Check) -> Judgement | None:
    if check.evaluation is None:
        return None
    try:
        session = load_artifact(writer.folder, verify_hashes="size")
    except UnsupportedError:
        return check.evaluation.judge_module(module, seed=check.seed)
    with session:
        return check.evaluation.judge(session.run)


def _verify_json(
    checks: Mapping[str, Verification], refused: Sequence[str], judgement: Judgement | None
) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "ok": all(check.ok for check in checks.values()) if checks else None,
        "unverified": "; ".join(refused),
        "entries": {name: check.to_dict() for name, check in checks.items()},
        **({} if judgement is None else {"task": judgement.to_dict()}),
    }


def _insist(found: Verification) -> None:
    try:
        found.check()
    except VerifyError as error:
        raise VerifyError(error.what, where=error.where, hint=_NOTHING) from error
