"""What pruning did to each modality, and how much has to go for a model to be so many times faster."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mmopt.analysis.calibration import made_up
from mmopt.api import choose_recipe, optimize, predictor
from mmopt.errors import ContractError, UserError
from mmopt.evaluation import Evaluation
from mmopt.ir.evaluate import ReferenceRunner
from mmopt.ir.module import Module
from mmopt.pipeline.base import PassContext, Phase
from mmopt.runnable import Inputs
from mmopt.transforms.prune import PruneStructured
from mmopt.transforms.prune.modalities import Blanks
from mmopt.transforms.prune.observing import batches_of
from mmopt.transforms.prune.prune_structured import cut_units
from mmopt.transforms.prune.sensitivity import outputs_moved
from mmopt.transforms.prune.separate_fills import separate_fills

Array = np.ndarray[Any, Any]

COLLAPSED = 0.5
"""Share of what a modality says alone from which it counts as lost."""

_SAMPLES = 128
_ROUNDS = 5
_CLOSE = 0.06
"""How far a measured speed-up may lie above the one asked for, of it, before less is cut."""

_GUESSES = 5
"""Shares that are predicted before one is compiled and measured."""

_STEP = 0.01
_SAME = 0.004
"""Shares nearer than this are the same."""


@dataclasses.dataclass(frozen=True)
class ModalityRecord:
    """One modality before and after.

    Attributes:
        tower: Its tower.
        moved: How differently the outputs vary from sample to sample when it alone says anything: squared error, means
            aside, of their variance before. 0 when all is kept, 1 when nothing of it is left.
        before: Metrics of the task with it alone, of the model as it was; empty without an evaluator.
        after: The same of the result.
    """

    tower: str
    moved: float
    before: Mapping[str, float] = dataclasses.field(default_factory=dict)
    after: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def collapsed(self) -> bool:
        """Whether most of what it said is lost."""
        return self.moved > COLLAPSED

    def __str__(self) -> str:
        metrics = ", ".join(f"{name} {value:.4g} → {self.after[name]:.4g}" for name, value in self.before.items())
        return f"{self.tower} alone: outputs vary as before but for {self.moved:.2%}" + (f", {metrics}" * bool(metrics))


def modality_report(
    original: Module,
    result: Module,
    samples: Mapping[str, Array],
    *,
    evaluation: Evaluation | None = None,
    threads: int = 0,
    seed: int = 0,
) -> list[ModalityRecord]:
    """Look at each modality alone, with the inputs of all others blank, in the model as it was and in the result.

    Args:
        original: The model as it was.
        result: What became of it.
        samples: Arrays by input name with a leading axis of samples; they say what a blank input looks like.
        evaluation: How the task judges a model.
        threads: Threads of the reference runtime.
        seed: Seed of operators that draw random numbers.

    Returns:
        A record for each tower with data of its own; none for models with one tower.

    Raises:
        UserError: The samples do not fit, or the evaluator fails.
        BackendError: A model does not run on them.
    """
    batches = batches_of(original, samples, most=_SAMPLES)
    blanks = Blanks(original, batches)
    records = []
    with ReferenceRunner(threads=threads, seed=seed) as runner:
        runs = [runner.prepare(module) for module in (original, result)]
        for tower in blanks.towers:
            feeds = [blanks.alone(one, tower) for one in batches]
            before, after = ([run(one) for one in feeds] for run in runs)
            metrics: list[Mapping[str, float]] = [{}, {}]
            if evaluation is not None:
                metrics = [evaluation.measure(_alone(run, blanks, tower)) for run in runs]
            records.append(ModalityRecord(tower, outputs_moved(after, before, centered=True), *metrics))
    return records


def _alone(run: Callable[[Mapping[str, Any]], Any], blanks: Blanks, tower: str) -> Callable[[Mapping[str, Any]], Any]:
    return lambda feeds: run(blanks.alone(feeds, tower))


def check_modalities(records: Sequence[ModalityRecord]) -> None:
    """Refuse a result that has lost a modality.

    Raises:
        ContractError: There is one.
    """
    if lost := [record for record in records if record.collapsed]:
        raise ContractError(
            "; ".join(map(str, lost)),
            where=f"the {lost[0].tower} modality collapsed",
            hint="cut less, by tower (--prune towers.NAME=10%), or repair on more samples",
        )


@dataclasses.dataclass(frozen=True)
class Found:
    """How much to cut for a speed-up.

    Attributes:
        share: Share of the cost to cut.
        speedup: Measured, over the same model without a cut.
        before: Seconds of a run without a cut.
        after: Seconds of a run with it.
        tried: Shares and the speed-ups they gave, in order.
    """

    share: float
    speedup: float
    before: float
    after: float
    tried: tuple[tuple[float, float], ...]


def share_for_speedup(
    module: Module,
    speedup: float,
    *,
    target: str = "cpu",
    inputs: Inputs,
    threads: int = 0,
    measure: str = "time",
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
    **options: Any,
) -> Found:
    """Find how much to cut for a model to be ``speedup`` times faster: cut, compile, measure, and correct.

    Which weights a product has does not change its time, so nothing is repaired here.

    Args:
        module: The model.
        speedup: How many times faster it is to be, over itself compiled without a cut.
        target: Name or file of the target profile, which must fit this machine.
        inputs: What to measure on.
        threads: Threads to measure with; 0 takes all cores.
        measure: What the shares are of: ``time`` or ``macs``.
        progress: Told rounds done, all rounds, and what is done.
        options: Further arguments of :func:`mmopt.optimize`.

    Raises:
        UserError: It cannot become so fast, or a speed-up that makes no sense.
        UnsupportedError: The target is not this machine.
    """
    if not 1 < speedup < 100:
        raise UserError(f"a speed-up of {speedup:g} makes no sense", where="--prune-to", hint="for example 1.6x")
    progress(0, _ROUNDS, "what can be cut")
    cuts = _Cuts(module, target, measure, options)
    tried: list[tuple[float, float]] = []
    with _Bench(target, inputs, threads) as bench:
        bench.add(cuts.module(0.0))
        for round_ in range(_ROUNDS):
            share = cuts.share_predicted(bench, speedup, tried)
            same = [known for known, ratio in tried if cuts.sizes(known) == cuts.sizes(share) and ratio < speedup]
            if same:
                share = cuts.beyond(max(same))
            if any(cuts.sizes(known) == cuts.sizes(share) for known, _ in tried):
                break  # no size lies between what is too slow and what is fast enough
            progress(round_, _ROUNDS, f"cut {share:.0%} and measure")
            ratio = bench.add(cuts.module(share))
            tried.append((share, ratio))
            if speedup <= ratio <= speedup * (1 + _CLOSE) or _settled(tried, speedup):
                break
        good = [(share, ratio, number) for number, (share, ratio) in enumerate(tried, 1) if ratio >= speedup]
        if not good:
            fastest = max(ratio for _, ratio in tried)
            raise UserError(
                f"the model cannot be made {speedup:g} times faster by cutting units: {fastest:.2f} times was reached",
                where="--prune-to",
                hint="ask for less, lower the floors with --pass 'prune-structured{floor=…}', or quantize as well",
            )
        share, ratio, number = min(good)
        return Found(share, ratio, *bench.times[number], tuple(tried))


class _Cuts:
    """A model cut by any share, with everything that its recipe does before and after; what can be cut is seen once.

    Args:
        module: The model.
        target: Name or file of the target profile.
        measure: What shares are of.
        options: Further arguments of :func:`mmopt.optimize`.
    """

    def __init__(self, module: Module, target: str, measure: str, options: Mapping[str, Any]) -> None:
        rest = dict(options)
        given = {name: rest.pop(name) for name in ("level", "precision", "recipe") if name in rest}
        passes = (f"{PruneStructured.name}{{measure={measure}}}", *rest.pop("passes", ()))
        recipe = choose_recipe(**given, passes=passes, target=target)
        settings = {name: value for name, value in recipe.settings.items() if name != "precision"}
        recipe = dataclasses.replace(recipe, settings=settings)
        before, prune, after = _split(recipe.phases)
        self._target, self._options = target, rest
        self._after = dataclasses.replace(recipe, phases=after)
        start = optimize(module, target=target, recipe=dataclasses.replace(recipe, phases=before), **rest).module
        separate_fills(start)
        samples, seed = rest.get("samples"), recipe.merged(seed=rest.get("seed"))["seed"]
        if isinstance(samples, str):
            samples = made_up(start, seed)
        self._start = start
        self._sizes: dict[float, dict[str, int]] = {}
        self._plan = prune.plan(start, PassContext(target, seed, samples, predict=predictor(target)))

    def module(self, share: float) -> Module:
        """The module as it would be compiled, without ``share`` of its cost.

        Raises:
            UserError: That is more than can be cut.
        """
        cut = self._start.clone()
        keep = self._plan.keep(self.sizes(share)) if share else {}
        if keep:
            cut_units(cut, self._plan.groups, keep)
        return optimize(cut, target=self._target, recipe=self._after, **self._options).module

    def sizes(self, share: float) -> dict[str, int]:
        """Units that stay of each group without ``share`` of the cost.

        Raises:
            UserError: That is more than can be cut.
        """
        if share not in self._sizes:
            self._sizes[share] = self._plan.sizes({None: share})
        return self._sizes[share]

    def beyond(self, share: float) -> float:
        """The next share, in steps of a hundredth, that makes a difference.

        Raises:
            UserError: That is more than can be cut.
        """
        more = share + _STEP
        while self.sizes(more) == self.sizes(share):
            more += _STEP
        return more

    def share_predicted(self, bench: _Bench, speedup: float, tried: Sequence[tuple[float, float]]) -> float:
        """The share at which the model is predicted to be ``speedup`` times faster, by what was measured so far."""
        points = [(0.0, 1.0), *tried]
        guessed: list[tuple[float, float]] = []
        for _ in range(_GUESSES):
            share = _next_share(points[1:], speedup) if len(points) > 1 else 1 - 1 / speedup
            if any(abs(share - known) < _SAME for known, _ in points):
                break
            try:
                guessed.append((share, bench.speedup_predicted(self.module(share))))
            except UserError:
                if tried:
                    break
                raise
            points.append(guessed[-1])
        # Sizes make steps: what comes next on a line may be slower than what was looked at.
        return min((guess for guess, ratio in guessed if ratio >= speedup), default=share)


def _split(phases: Sequence[Phase]) -> tuple[tuple[Phase, ...], PruneStructured, tuple[Phase, ...]]:
    """Phases before the first pass that cuts units, that pass, and phases after it."""
    for number, phase in enumerate(phases):
        for place, pass_ in enumerate(phase.passes):
            if isinstance(pass_, PruneStructured):
                before = dataclasses.replace(phase, passes=phase.passes[:place])
                after = dataclasses.replace(phase, passes=phase.passes[place + 1 :])
                return (*phases[:number], before), pass_, (after, *phases[number + 1 :])
    raise ValueError("no pass cuts units")


def _settled(tried: Sequence[tuple[float, float]], speedup: float) -> bool:
    """Whether what is fast enough and what is too slow are such near neighbours that what is between is no use."""
    enough = min((share for share, ratio in tried if ratio >= speedup), default=None)
    if enough is None:
        return False
    return any(enough - 2 * _STEP < share < enough for share, ratio in tried if ratio < speedup)


def _next_share(tried: Sequence[tuple[float, float]], speedup: float) -> float:
    """The share at which the time, as a line between what was measured, is that of the speed-up."""
    points = sorted([(0.0, 1.0), *((share, 1 / ratio) for share, ratio in tried)])
    wanted = 1 / (speedup * (1 + _CLOSE / 3))
    below = [point for point in points if point[1] > wanted]
    above = [point for point in points if point[1] <= wanted]
    left = below[-1] if below else points[0]
    right = above[0] if above else None
    if right is None:
        # Beyond all that was tried: on along the line from nothing to the last.
        last = points[-1]
        slope = (1 - last[1]) / max(last[0], 1e-6)
        return float(np.clip((1 - wanted) / max(slope, 1e-3), last[0] + 0.02, min(0.97, last[0] + 0.25)))
    part = (left[1] - wanted) / max(left[1] - right[1], 1e-9)
    return float(left[0] + part * (right[0] - left[0]))


class _Bench:
    """Models compiled to be measured against the first one, and what their kernels take.

    Args:
        target: Name or file of the target profile.
        inputs: What to measure on.
        threads: Threads; 0 takes all cores.

    Attributes:
        times: Seconds of a run of the first model and of each, measured in turns.
    """

    def __init__(self, target: str, inputs: Inputs, threads: int) -> None:
        from mmopt.autotune.timetable import TimeTable
        from mmopt.backends.profile import load_profile
        from mmopt.runtime.cpu import default_threads

        self._profile, self._inputs, self._threads = load_profile(target), inputs, threads or default_threads()
        self._table, self._stack = TimeTable(), contextlib.ExitStack()
        self._first: Any = None
        self._bias = 1.0
        self.times: list[tuple[float, float]] = []

    def __enter__(self) -> _Bench:
        self._folder = pathlib.Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="mmopt-prune-")))
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def add(self, module: Module) -> float:
        """Compile and measure a model; how many times faster it is than the first one."""
        from mmopt.autotune.contest import compiled
        from mmopt.backends.cpu.choosing import Chooser

        path = self._folder / f"{len(self.times)}.mmopt"
        side = compiled(module, self._profile, Chooser(), path, self._threads)
        if self._first is None:
            self._first = self._stack.enter_context(side)
            seconds = self._table.observe(self._first, self._inputs).seconds
            self.times.append((seconds, seconds))
            return 1.0
        with side as session:
            self._table.observe(session, self._inputs)
            self.times.append(self._in_turns(session))
        ratio = self.times[-1][0] / self.times[-1][1]
        self._bias *= ratio / self.speedup_predicted(module)
        return ratio

    def speedup_predicted(self, module: Module) -> float:
        """How many times faster than the first one a model is predicted to be.

        The model measured last is predicted as it was measured.
        """
        return self._bias * self.times[0][0] / self._table.predict(module, self._profile)

    def _in_turns(self, session: Any) -> tuple[float, float]:
        from mmopt.autotune.contest import TURNS, repeats_of, turn

        sides = (self._first, session)
        repeats = [repeats_of(side, self._inputs) for side in sides]
        times: tuple[list[float], list[float]] = ([], [])
        for number in range(TURNS // 2):
            for place in (0, 1) if number % 2 == 0 else (1, 0):
                times[place].append(turn(sides[place], self._inputs, repeats[place]))
        return statistics.median(times[0]), statistics.median(times[1])
