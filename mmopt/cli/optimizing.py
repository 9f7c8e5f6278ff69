"""What ``mmopt optimize`` does, step by step."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from mmopt.analysis.probes import load_inputs, probe_inputs
from mmopt.api import OptimizeResult, choose_recipe, chosen_precision, compile, load
from mmopt.api import optimize as optimize_module
from mmopt.building import CompileResult
from mmopt.cli.outcome import Outcome, summary
from mmopt.cli.output import Output, size_text
from mmopt.cli.pruning import NAMES as PRUNING
from mmopt.cli.pruning import pruning
from mmopt.cli.request import Request, calibration_samples, emitted, evaluation, output_path, portable_recipe
from mmopt.cli.speed import Speed, measure
from mmopt.errors import VerifyError
from mmopt.frontends.onnx import save_onnx
from mmopt.ir.evaluate import ReferenceRunner
from mmopt.ir.module import Module, initializer_bytes
from mmopt.loading import parse_modalities, parse_shapes
from mmopt.pipeline.base import FxPass
from mmopt.pipeline.manager import Progress
from mmopt.pipeline.recipe import Recipe
from mmopt.runnable import Inputs, ModelRunnable
from mmopt.runtime import atomic
from mmopt.runtime.artifact import LIBRARY, WEIGHTS
from mmopt.runtime.cpu import default_threads
from mmopt.transforms.precision import NarrowFloats
from mmopt.transforms.prune.observing import batches_of
from mmopt.transforms.prune.reference import reference_of
from mmopt.transforms.quantize import CompressWeights, Quantize, QuantizeDynamic, QuantizeStatic, QuantizeWeights
from mmopt.verification import compare_runnables

if TYPE_CHECKING:
    from mmopt.pipeline.report import PipelineReport
    from mmopt.pruning import ModalityRecord


_LOSSY = (
    "calibration", NarrowFloats.name, Quantize.name, QuantizeStatic.name, QuantizeDynamic.name, QuantizeWeights.name,
    CompressWeights.name, *PRUNING,
)  # fmt: skip
"""Whose remarks are shown on every run: what they say is part of the result."""


class Job:
    """One run of ``mmopt optimize``."""

    def __init__(self, request: Request, show: Output) -> None:
        self._request, self._show = request, show
        target = "" if emitted(request) == "onnx" else request.target or "cpu"
        self._recipe: Recipe = choose_recipe(
            request.level, request.precision, request.recipe or portable_recipe(request), request.passes, target
        )
        self._settings = self._recipe.merged(
            validate=request.validate,
            strict=request.strict,
            seed=request.seed,
            target=request.target,
            jobs=request.jobs,
            eval=request.evaluator,
            metrics=list(request.metrics) or None,
        )
        self._settings.setdefault("target", "cpu")
        self._settings["precision"] = chosen_precision(self._recipe, request.precision)
        self._emit = emitted(request)
        self._output = output_path(request, self._emit)
        evaluator, limits = self._settings.get("eval"), self._settings.get("metrics", ())
        self._evaluation = evaluation(evaluator, limits, trust_code=request.trust_code)

    def run(self, *, dry: bool) -> None:
        """Do it, or say what would be done."""
        from mmopt.backends.levels import levels_below
        from mmopt.backends.profile import load_profile

        request, show = self._request, self._show
        profile = load_profile(self._settings["target"])
        if request.multi_isa:
            levels_below(profile)
        original = self._load()
        inputs = [load_inputs(path, original) for path in request.inputs] or None
        samples = calibration_samples(request.calib, original)
        if dry:
            self._plan(original)
            return
        if self._evaluation is not None:
            show.say("evaluating the model as it is")
            seed, threads = self._settings["seed"], self._settings.get("jobs", 0)
            self._evaluation = self._evaluation.against(original, threads=threads, seed=seed)
        if request.prune_to is not None:
            self._prune_to(request.prune_to, original, inputs, samples)
        with show.steps("optimize") as steps:
            optimized = optimize_module(
                original,
                target=self._settings["target"],
                recipe=self._without_fx(),
                precision=self._settings["precision"],
                inputs=inputs,
                samples=samples,
                evaluation=self._evaluation,
                validate=self._settings["validate"],
                strict=self._settings["strict"],
                seed=self._settings["seed"],
                threads=self._settings.get("jobs", 0),
                dump_dir=request.dump_dir,
                progress=lambda progress: _tell(steps, progress),
            )
        for record in optimized.report.failed:
            show.warn(f"pass {record.name} was rolled back: {record.reason}")
        for note in optimized.report.notes:
            show.say(note)
        for remark in optimized.module.remarks:
            if remark.source in _LOSSY:
                show.say(f"{remark.node or remark.source}: {remark.message}", level=0 if not remark.node else 1)
        modalities = self._modalities(original, optimized.module, samples)
        reference = optimized.module if reference_of(optimized.module) else original
        outcome = dataclasses.replace(
            self._write(original, optimized, inputs, reference), pruned=reference is not original
        )
        self._tell(outcome, optimized.report, modalities)

    def _prune_to(
        self,
        speedup: float,
        original: Module,
        inputs: Sequence[Inputs] | None,
        samples: dict[str, Any] | Literal["random"] | None,
    ) -> None:
        """Measure how much has to be cut, and have the recipe cut it."""
        from mmopt.pruning import share_for_speedup

        request, settings = self._request, self._settings
        with self._show.steps("prune") as steps:
            found = share_for_speedup(
                original,
                speedup,
                target=settings["target"],
                inputs=self._measured_on(original, inputs, samples),
                threads=settings.get("jobs", 0),
                progress=steps.at,
                level=request.level,
                recipe=request.recipe,
                passes=request.passes,
                precision=request.precision,
                samples=samples,
                validate="off",
                seed=settings["seed"],
            )
        self._show.say(f"cutting {found.share:.1%} makes it {found.speedup:.2f} times faster")
        passes = pruning(f"{found.share:.4f}", repair=samples is not None, measure="time")
        self._recipe = choose_recipe(
            request.level, request.precision, request.recipe, (*passes, *request.passes), settings["target"]
        )

    def _modalities(
        self, original: Module, result: Module, samples: dict[str, Any] | Literal["random"] | None
    ) -> list[ModalityRecord]:
        """What pruning did to each modality; a model that has lost one is refused."""
        if reference_of(result) is None or not isinstance(samples, dict):
            return []
        from mmopt.pruning import check_modalities, modality_report

        seed, threads = self._settings["seed"], self._settings.get("jobs", 0)
        records = modality_report(original, result, samples, evaluation=self._evaluation, threads=threads, seed=seed)
        for record in records:
            self._show.say(str(record))
        if not self._request.allow_mismatch:
            check_modalities(records)
        return records

    def _measured_on(
        self,
        module: Module,
        inputs: Sequence[Inputs] | None,
        samples: dict[str, Any] | Literal["random"] | None = None,
    ) -> Inputs:
        """Inputs to measure on: the first that were given, the first calibration sample, or made from the model."""
        if inputs is not None:
            return inputs[0]
        if isinstance(samples, dict):
            return batches_of(module, samples, most=1)[0]
        seed = self._settings["seed"]
        with ReferenceRunner(seed=seed) as runner:
            return probe_inputs(module, seeds=[seed], runner=runner)[0]

    def _load(self) -> Module:
        request = self._request
        module = load(
            request.model,
            shapes=parse_shapes(request.shapes),
            modalities=parse_modalities(request.modalities),
            fx_passes=[pass_ for phase in self._recipe.phases for pass_ in phase.passes if isinstance(pass_, FxPass)],
            trust_code=request.trust_code,
        )
        for remark in module.remarks:
            self._show.say(f"{remark.source}: {remark.message}", level=0 if remark.kind == "missed" else 1)
        return module

    def _without_fx(self) -> Recipe:
        """The recipe for a module that comes from torch, whose FX passes have run before export."""
        if self._request.model.endswith(".onnx"):
            return self._recipe
        phases = [
            dataclasses.replace(phase, passes=tuple(p for p in phase.passes if not isinstance(p, FxPass)))
            for phase in self._recipe.phases
        ]
        return dataclasses.replace(self._recipe, phases=tuple(phases))

    def _plan(self, module: Module) -> None:
        lines = self._recipe.describe(self._settings)
        nodes = sum(1 for _ in module.graph.all_nodes())
        lines.append(
            f"model {self._request.model}: {nodes} nodes, {size_text(initializer_bytes(module.model))} of weights"
        )
        lines.append(f"would write {self._emit} {self._output}")
        for line in lines:
            self._show.result(line)
        self._show.json({"dry_run": True, "plan": lines, "settings": self._settings, "output": str(self._output)})

    def _write(
        self, original: Module, optimized: OptimizeResult, inputs: Sequence[Inputs] | None, reference: Module
    ) -> Outcome:
        """Write the result. It has to agree with ``reference``: a cut model differs from the original on purpose."""
        if self._emit == "onnx":
            return self._write_onnx(original, optimized.module, inputs, reference)
        with self._show.steps("compile") as steps:
            built = compile(
                optimized.module,
                output=self._output,
                target=self._settings["target"],
                multi_isa=self._request.multi_isa,
                tuning=self._request.tuning,
                reference=reference,
                inputs=inputs,
                tolerance=self._request.tolerance,
                allow_mismatch=self._request.allow_mismatch,
                evaluation=self._evaluation,
                seed=self._settings["seed"],
                report=_report_json(optimized),
                config=self._config(),
                progress=steps.at,
            )
        return self._outcome(original, built, inputs)

    def _outcome(self, original: Module, built: CompileResult, inputs: Sequence[Inputs] | None) -> Outcome:
        files = built.manifest.files
        needed = sum(r.size for name, r in files.items() if name in (LIBRARY, WEIGHTS) or name.startswith("fallback/"))
        return Outcome(
            path=built.path,
            before=_model_bytes(self._request.model, original),
            after=needed,
            total=built.size,
            check=built.checks.get("main"),
            unverified=built.unverified,
            speed=self._measure(built, original, inputs),
            fallback=[] if built.native else built.manifest.notes,
            tuning=built.tuning,
            judgement=built.judgement,
        )

    def _measure(self, built: CompileResult, original: Module, inputs: Sequence[Inputs] | None) -> Speed:
        if self._show.quiet:
            return Speed(reason="--quiet")
        if built.unverified:
            return Speed(reason="it cannot run here")
        values = self._measured_on(original, inputs)
        self._show.say("measuring against onnxruntime")
        return measure(built.path, original, values, self._settings.get("jobs") or default_threads())

    def _write_onnx(
        self, original: Module, module: Module, inputs: Sequence[Inputs] | None, reference: Module
    ) -> Outcome:
        seed = self._settings["seed"]
        check = compare_runnables(
            ModelRunnable(module, self._output.name, seed=seed),
            ModelRunnable(reference, "the original model" if reference is original else "the pruned model", seed=seed),
            inputs=inputs,
            seed=seed,
            tolerance=self._request.tolerance,
        )
        judgement = None if self._evaluation is None else self._evaluation.judge_module(module, seed=seed)
        if not self._request.allow_mismatch:
            check.check()
            if judgement is not None:
                judgement.check("nothing was written; --allow-mismatch writes it all the same")
        written = write_onnx(module, self._output)
        return Outcome(
            path=self._output,
            before=_model_bytes(self._request.model, original),
            after=written,
            total=written,
            check=check,
            unverified="",
            speed=Speed(reason="only an artifact is measured; see mmopt bench"),
            fallback=[],
            judgement=judgement,
        )

    def _config(self) -> dict[str, Any]:
        given = {key: _plain(value) for key, value in dataclasses.asdict(self._request).items()}
        return {**given, **self._settings, "recipe": self._recipe.name, "output": str(self._output), "emit": self._emit}

    def _tell(self, outcome: Outcome, report: PipelineReport, modalities: Sequence[ModalityRecord]) -> None:
        for line in summary(outcome, report):
            self._show.result(line)
        self._show.json(
            {
                "config": self._config(),
                "pipeline": report.to_dict(),
                "artifact": str(outcome.path),
                "size": {"before": outcome.before, "after": outcome.after, "total": outcome.total},
                "speed": {**dataclasses.asdict(outcome.speed), "ratio": outcome.speed.ratio},
                "exactness": None if outcome.check is None else outcome.check.to_dict(),
                "unverified": outcome.unverified,
                "fallback": outcome.fallback,
                "tuning": outcome.tuning,
                "task": None if outcome.judgement is None else outcome.judgement.to_dict(),
                "modalities": [dataclasses.asdict(record) for record in modalities],
            }
        )
        if outcome.check is not None and not outcome.check.ok:
            raise VerifyError("the result does not agree with the model; written because of --allow-mismatch")
        if outcome.judgement is not None:
            outcome.judgement.check("written because of --allow-mismatch")


def write_onnx(module: Module, output: pathlib.Path) -> int:
    """Write ``output`` and its data file so that a killed run leaves a complete pair, or no model.

    Returns:
        Bytes written.
    """
    data = output.with_name(f"{output.name}.data")
    with atomic.staging(output) as folder:
        save_onnx(module, folder / output.name, inline=True)
        staged = [path for path in (folder / data.name, folder / output.name) if path.exists()]
        size = sum(path.stat().st_size for path in staged)
        atomic.sync_tree(folder)
        output.unlink(missing_ok=True)  # never an old model beside new weights
        for path in staged:
            os.replace(path, output.with_name(path.name))
    return size


def _tell(steps: Any, progress: Progress) -> None:
    if progress.record is None:
        steps.at(progress.index, progress.total, progress.name)


def _report_json(optimized: OptimizeResult) -> dict[str, Any]:
    module = optimized.module
    return {
        **optimized.report.to_dict(),
        "remarks": [dataclasses.asdict(remark) for remark in module.remarks],
        "provenance": module.provenance,
    }


def _model_bytes(name: str, module: Module) -> int:
    """Bytes of the model as it was: its file and its data files, or its weights when it is no file."""
    path = pathlib.Path(name)
    if not path.is_file():
        return initializer_bytes(module.model)
    files = {path.resolve()}
    for value in module.graph.initializers.values():
        source = getattr(value.const_value, "path", None)
        if source is not None:
            files.add(pathlib.Path(source).resolve())
    return sum(file.stat().st_size for file in files)


def _plain(value: Any) -> Any:
    if isinstance(value, pathlib.Path):
        return str(value)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, Mapping) else value
