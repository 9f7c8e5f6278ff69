"""Runs passes, believes none of them, and rolls back those that break their contract."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mmopt.analysis.probes import find_probes
from mmopt.errors import BackendError, MmoptError, PassError, UserError, did_you_mean
from mmopt.ir.evaluate import Outputs, ReferenceRunner
from mmopt.ir.fingerprint import fingerprint
from mmopt.ir.module import Module, Remark
from mmopt.pipeline.base import Fidelity, Pass, PassContext, Phase
from mmopt.pipeline.dump import Dump
from mmopt.pipeline.guard import Guard, Known, Rejected, check_claim, check_start, read_only_weights
from mmopt.pipeline.report import APPLIED, FAILED, PassRecord, PipelineReport, node_count

if TYPE_CHECKING:
    from mmopt.evaluation import Evaluation

VALIDATE = ("each", "end", "off")

_SLOW = 0.5
"""Seconds from which checking one pass on all sets is too slow to do after every pass: then each pass is compared on
the first set, the end on all, and the run is repeated with all when the end is wrong."""

_ALL = 1 << 30
_PROBES = 2
"""Sets of probe inputs; with symbolic sizes, each set has its own, so that a size baked in by a pass shows."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        index: Number of the pass at hand, from 0, within its round of the pipeline.
        total: Passes of the whole pipeline, each counted once.
        name: Name of the pass at hand.
        phase: Its phase.
        record: How it went; None while it is running.
    """

    index: int
    total: int
    name: str
    phase: str
    record: PassRecord | None = None


class PassManager:
    """A pipeline of passes with one way to check them.

    Args:
        passes: Passes and phases, in order.
        validate: ``each`` checks structure and values after every pass (a slow model on one set of inputs, and at the
            end on all); ``end`` checks structure after every pass and
            values once, and goes back to ``each`` when they are wrong, so that the guilty pass is found; ``off``
            trusts passes and rolls back those that raise.
        strict: A pass that fails is an error instead of a line in the report.
        seed: Seed of probes and of anything random in passes.
        inputs: Inputs to validate on, one set or several, each an array by input name; probes are made when None.
        samples: Calibration samples for passes that want some, by input name, each with a leading axis of samples.
        samples_from: ``given``, or ``random`` when they were made up on request.
        evaluation: The user's evaluator, for passes that judge by the task.
        predict: The target's cost model, for passes that go by time.
        dump_dir: Folder that gets the module as text before the first and after every pass; None writes nothing.
        target: Name of the target, for passes that ask.
        progress: Called before and after each pass.
        threads: Threads of the reference runtime; 0 takes all cores.

    Raises:
        UserError: ``validate`` is no known mode.
    """

    def __init__(
        self,
        passes: Sequence[Pass | Phase],
        *,
        validate: str = "each",
        strict: bool = False,
        seed: int = 0,
        inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        samples: dict[str, np.ndarray[Any, Any]] | None = None,
        samples_from: str = "given",
        evaluation: Evaluation | None = None,
        predict: Callable[[Module], float] | None = None,
        dump_dir: pathlib.Path | None = None,
        target: str = "",
        progress: Callable[[Progress], None] | None = None,
        threads: int = 0,
    ) -> None:
        if validate not in VALIDATE:
            raise UserError(f"unknown validation mode {validate!r}", hint=did_you_mean(validate, VALIDATE))
        self.phases = _as_phases(passes)
        self.validate = validate
        self.strict = strict
        self.seed = seed
        self.inputs = [inputs] if isinstance(inputs, Mapping) else inputs
        self.samples = samples if samples is not None else _stack(self.inputs)
        self.samples_from = samples_from
        self.evaluation = evaluation
        self.predict = predict
        self.dump_dir = dump_dir
        self.target = target
        self.progress = progress
        self.threads = threads

    def plan(self) -> list[dict[str, Any]]:
        """What :meth:`run` would run, in order: for ``--dry-run``."""
        return [
            {
                "pass": pass_.spec(),
                "phase": phase.name,
                "max_rounds": phase.max_rounds,
                "fidelity": pass_.fidelity.value,
            }
            for phase in self.phases
            for pass_ in phase.passes
        ]

    def run(self, module: Module) -> PipelineReport:
        """Run all passes on ``module``, in place.

        A pass works on a clone that shares the weights. ``module`` gets the clone's model only when it was accepted,
        so that a rejected pass leaves nothing behind but its record and its remarks.

        Returns:
            What happened.

        Raises:
            LoadError: ``module`` is not valid ONNX to begin with.
            UserError: The given inputs do not run.
            PassError: A pass failed and the run is strict; ``module`` keeps what the passes before it did.
        """
        started = time.perf_counter()
        report = PipelineReport(self.validate, self.seed, self.target, nodes_before=node_count(module))
        with ReferenceRunner(threads=self.threads, seed=self.seed) as runner:
            run = _Run(self, module, report, runner)
            try:
                run.execute()
            finally:
                module.model = run.current.model
                module.modalities = run.current.modalities
                module.provenance = run.current.provenance
                module.remarks.extend(run.remarks)
        report.nodes_after = node_count(module)
        report.seconds = time.perf_counter() - started
        return report


class _Run:
    """One run of a pipeline over one module."""

    def __init__(self, manager: PassManager, module: Module, report: PipelineReport, runner: ReferenceRunner) -> None:
        self._manager = manager
        self._report = report
        self._runner = runner
        self._dump = Dump(manager.dump_dir)
        self._total = sum(len(phase.passes) for phase in manager.phases)
        self._spare: Module | None = None
        self._guard: Guard | None = None
        self._known: Known | None = None
        self._sets = {"each": _ALL}.get(manager.validate, 0)
        self._may_narrow = True
        self._applied: list[Pass] = []
        self.current = module
        self.remarks: list[Remark] = []

    def execute(self) -> None:
        if self._manager.validate != "off":
            self._learn()
        self._dump.write("input", self.current)
        start, known = self.current, self._known
        self._phases()
        if known is None or not known.outputs:
            return
        if self._sets != _ALL and not self._end_is_right(known):
            self._replay(start, known)
        self._compare_ends(known)

    def _learn(self) -> None:
        """Set up the guard with the inputs that the module runs on."""
        report = self._report
        problems = check_start(self.current)
        batches, outputs = self._given() if self._manager.inputs is not None else self._probes()
        self._guard = Guard(self._runner, batches)
        self._known = self._guard.know(self.current, problems, outputs)
        if self._known is not None and self._known.outputs:
            first = self._known.outputs[0]
            report.engine = first.engine
            report.notes.extend(_blind_spots(self._known.outputs))
            if first.reason:
                report.notes.append(f"onnxruntime cannot load the model ({first.reason}); used {first.engine} instead")

    def _given(self) -> tuple[Sequence[Mapping[str, Any]], list[Outputs]]:
        self._report.inputs = "given"
        batches = self._manager.inputs or []
        try:
            return batches, self._runner.run_all(self.current, batches)
        except BackendError as error:
            raise UserError(error.what, where=error.where, hint="the given inputs do not run") from error

    def _probes(self) -> tuple[Sequence[Mapping[str, Any]], list[Outputs]]:
        seeds = range(self._manager.seed, self._manager.seed + _PROBES)
        try:
            batches, outputs = find_probes(self.current, self._runner, seeds=seeds)
        except BackendError as error:
            self._report.notes.append(
                f"values were not compared, only structure: the model runs on no inputs made for it ({error.what}); "
                "give some with --inputs"
            )
            return [], []
        self._report.inputs = "probes"
        return batches, outputs

    def _phases(self) -> None:
        index = 0
        for phase in self._manager.phases:
            for round_ in range(1, phase.max_rounds + 1):
                records = [self._one(pass_, phase, round_, index + offset) for offset, pass_ in enumerate(phase.passes)]
                busy = [record.name for record in records if record.status == APPLIED]
                if not busy:
                    break
                if round_ == phase.max_rounds > 1:
                    self._report.notes.append(
                        f"phase {phase.name!r} still changed the module in its last round ({round_}): {', '.join(busy)}"
                    )
            index += len(phase.passes)

    def _one(self, pass_: Pass, phase: Phase, round_: int, index: int) -> PassRecord:
        self._tell(Progress(index, self._total, pass_.name, phase.name))
        record = PassRecord(pass_.name, pass_.spec(), pass_.fidelity.value, phase.name, round_)
        self._report.passes.append(record)
        work = self._spare or self._clone(pass_.name)
        self._spare = None
        record.nodes_before = node_count(self.current)
        try:
            self._apply(pass_, work, record)
        except Rejected as rejection:
            record.status, record.reason = FAILED, rejection.what
            record.comparisons = rejection.comparisons
            self._dump.write(f"{pass_.name}.failed", work)
        self._collect_remarks(pass_, work, record)
        self._tell(Progress(index, self._total, pass_.name, phase.name, record))
        if record.status == FAILED and self._manager.strict:
            raise PassError(record.reason, where=f"pass {pass_.name}", hint="run without --strict to go on without it")
        return record

    def _apply(self, pass_: Pass, work: Module, record: PassRecord) -> None:
        """Run ``pass_`` on ``work``; make it the current module when that is right."""
        manager = self._manager
        context = PassContext(
            manager.target,
            manager.seed,
            manager.samples,
            record.remarks,
            manager.samples_from,
            manager.evaluation,
            manager.predict,
        )
        started = time.perf_counter()
        try:
            claimed = pass_.run(work, context)
        except UserError:  # what the user gave does not fit: going on without the pass would hide it
            raise
        except Exception as error:  # a pass is foreign code: whatever it raises must not end the run
            raise Rejected(f"raised {_said(error)}") from error
        finally:
            record.seconds = time.perf_counter() - started
        started = time.perf_counter()
        try:
            changed = self._judge(pass_, work, claimed, record)
        except Rejected:
            raise
        except Exception as error:  # a broken module can trip anything that reads it
            raise Rejected(f"left a module that cannot be read: {_said(error)}") from error
        finally:
            record.validation_seconds = time.perf_counter() - started
            if self._may_narrow and record.validation_seconds > _SLOW:
                self._sets = min(self._sets, 1)
        if not changed:
            self._spare = work
            return
        record.status = APPLIED
        self._applied.append(pass_)
        work.provenance.append(f"pass {record.spec}")
        self.current = work
        self._dump.write(pass_.name, work)

    def _judge(self, pass_: Pass, work: Module, claimed: object, record: PassRecord) -> bool:
        record.nodes_after = node_count(work)
        if self._guard is None or self._known is None:
            return bool(claimed)
        print_ = fingerprint(work.model)
        if not check_claim(claimed, self._known.fingerprint, print_):
            return False
        self._known, record.comparisons = self._guard.accept(
            work, print_, self._known, pass_.fidelity, bound=pass_.error_bound(), sets=self._sets
        )
        return True

    def _clone(self, name: str) -> Module:
        try:
            work = self.current.clone()
        except Exception as error:  # only an unchecked pass can have left a graph that does not clone
            raise PassError(
                f"a pass before it broke the module: {_said(error)}",
                where=f"pass {name}",
                hint="run with --validate each to find out which",
            ) from error
        work.remarks.clear()
        read_only_weights(work)
        return work

    def _collect_remarks(self, pass_: Pass, work: Module, record: PassRecord) -> None:
        """Keep what the pass said, in its context or on the module itself, whatever became of its changes."""
        record.remarks.extend(work.remarks)
        work.remarks.clear()
        self.remarks.extend(record.remarks)
        if record.status == FAILED:
            self.remarks.append(Remark(pass_.name, "note", "", f"rolled back: {record.reason}"))

    def _tell(self, progress: Progress) -> None:
        if self._manager.progress is not None:
            self._manager.progress(progress)

    def _end_is_right(self, start: Known) -> bool:
        """Compare values once, at the end, by what the least exact pass may do."""
        if self._guard is None or self._known is None or not self._report.applied:
            return True
        fidelity, bound = self._loosest()
        try:
            self._guard.finish(self.current, start, self._known, fidelity, bound)
        except Rejected as rejection:
            self._report.notes.append(f"the end is not right ({rejection.what}); each pass was checked instead")
            return False
        return True

    def _replay(self, start: Module, known: Known) -> None:
        """Run everything again from the start, this time checking each pass on all sets of inputs."""
        self._sets, self._may_narrow = _ALL, False
        self.current, self._known, self._spare = start, known, None
        self._report.passes.clear()
        self._applied.clear()
        self.remarks.clear()
        self._phases()

    def _compare_ends(self, start: Known) -> None:
        if self._guard is not None and self._known is not None and self._known.outputs:
            fidelity, bound = self._loosest()
            self._report.outputs = self._guard.compare(start, self._known, fidelity, bound)

    def _loosest(self) -> tuple[Fidelity, float | None]:
        """What all applied passes together may do to the outputs."""
        lossy = [pass_.error_bound() for pass_ in self._applied if pass_.fidelity is Fidelity.LOSSY]
        if lossy:
            return Fidelity.LOSSY, math.inf if None in lossy else sum(bound for bound in lossy if bound is not None)
        rounding = any(pass_.fidelity is Fidelity.ROUNDING for pass_ in self._applied)
        return (Fidelity.ROUNDING if rounding else Fidelity.EXACT), None


def _blind_spots(outputs: Sequence[Outputs]) -> Iterator[str]:
    """Say which outputs are NaN or infinite throughout: no change of their values can be seen."""
    for name, value in outputs[0].items():
        arrays = [values[name] for values in outputs]
        if isinstance(value, np.ndarray) and value.dtype.kind == "f" and not any(np.isfinite(a).any() for a in arrays):
            yield f"output {name!r} is NaN or infinite throughout on these inputs, so its values check nothing"


def _as_phases(passes: Sequence[Pass | Phase]) -> list[Phase]:
    return list(_join(passes))


def _join(passes: Sequence[Pass | Phase]) -> Iterator[Phase]:
    """Turn loose passes into phases, neighbours into one."""
    loose: list[Pass] = []
    for item in passes:
        if isinstance(item, Pass):
            loose.append(item)
            continue
        if loose:
            yield Phase("", tuple(loose))
            loose = []
        yield item
    if loose:
        yield Phase("", tuple(loose))


def _stack(inputs: Sequence[Mapping[str, Any]] | None) -> dict[str, np.ndarray[Any, Any]] | None:
    """The given inputs as samples: stacked along a new first axis, or only the first set when shapes differ."""
    if not inputs:
        return None
    first = {name: array for name, array in inputs[0].items() if isinstance(array, np.ndarray)}
    alike = all(name in one and one[name].shape == array.shape for one in inputs for name, array in first.items())
    return {name: np.stack([one[name] for one in (inputs if alike else inputs[:1])]) for name in first}


def _said(error: Exception) -> str:
    if isinstance(error, MmoptError):
        return f"{type(error).__name__}: {error.what}"
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
