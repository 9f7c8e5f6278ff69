"""Presets of per-layer quantization: everything, by place in the model, or by measured sensitivity under a budget."""

from __future__ import annotations

import collections
import dataclasses
import fnmatch
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Literal

from mmopt.analysis.calibration import Calibration
from mmopt.analysis.towers import analyze_towers
from mmopt.errors import UserError
from mmopt.ir.module import Module
from mmopt.pipeline.base import Fidelity, Pass, PassContext
from mmopt.transforms.canonicalize.editing import is_onnx
from mmopt.transforms.quantize.assignment import FLOAT, SCHEMES, assign, nbytes, offered, parameters
from mmopt.transforms.quantize.calibrating import calibration_of
from mmopt.transforms.quantize.compress_weights import Store, stores
from mmopt.transforms.quantize.layers import Layer, Selection, layers
from mmopt.transforms.quantize.quantize_static import balance
from mmopt.transforms.quantize.recovery import recover_quantized
from mmopt.transforms.quantize.recurrent_layers import recurrent_layers
from mmopt.transforms.quantize.rounding import grams_wanted
from mmopt.transforms.quantize.sensitivity import Sensitivity, measure

EDGE = 0.15
"""Share of a tower's layers, at either end, that ``hierarchical`` keeps at the higher precision."""


@dataclasses.dataclass(frozen=True)
class Quantize(Pass):
    """Quantize layer by layer: all alike, by their place, or by how much each moves the outputs.

    Attributes:
        preset: ``full``: int8 wherever there is an integer kernel, channels balanced first unless there is a ``table``.
            ``hierarchical``: the first and last layers of each
            tower and what joins towers in 8 bits, the middle in ``lowest``. ``mixed``: the least error within
            ``budget``.
        budget: For ``mixed``: bytes of the layers' weights, as a share of those in float32.
        by_metrics: For ``mixed``: as small as the limits of the evaluator's metrics allow (``--eval``, ``--metrics``),
            instead of a budget.
        lowest: What ``hierarchical`` puts the middle into: ``w4``, ``w8`` or ``w8a8``.
        highest: What ``hierarchical`` keeps the ends in: ``w8a8``, ``w8`` or ``w8a16``.
        edge: Share of each tower's layers that ``hierarchical`` takes for an end.
        schemes: What ``mixed`` may choose from.
        table: Schemes by pattern of node name (``*fc1*=w4``), which go before the preset's.
        stats: File of statistics (``mmopt calibrate``); the calibration samples of the run when empty.
        method: How ranges of activations are chosen.
        rounding: Integers of weights in ``w8a8`` and ``w8a16``, as in ``quantize-static``.
        recover: Whether integers and biases of ``w8`` and ``w4`` layers are chosen once more, layer after layer, so
            that each gives what it gave in float although what it reads has changed.
        logits: Whether layers whose result leaves the model are quantized too.
        storage: Whether ``hierarchical`` and ``mixed`` give embedding tables and recurrent weights a scheme too: they
            count for the budget, and are stored in 8 or 4 bits as by ``compress-weights``.
    """

    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY

    preset: Literal["full", "hierarchical", "mixed"] = "full"
    budget: float = 0.25
    by_metrics: bool = False
    lowest: Literal["w4", "w8", "w8a8"] = "w4"
    highest: Literal["w8a8", "w8", "w8a16"] = "w8a8"
    edge: float = EDGE
    schemes: tuple[str, ...] = ("fp32", "w8a8", "w8", "w4")
    table: tuple[str, ...] = ()
    stats: str = ""
    method: Literal["minmax", "percentile", "mse", "entropy"] = "minmax"
    rounding: Literal["nearest", "gptq", "adaround"] = "nearest"
    recover: bool = False
    logits: bool = False
    storage: bool = False

    def run(self, module: Module, context: PassContext) -> bool:
        """Quantize; the report gets the scheme of each layer and why it has it.

        Raises:
            UserError: A budget or table that makes no sense, or nothing to calibrate on.
        """
        found: list[Layer] = []
        selection = Selection(logits=self.logits)
        for layer in layers(module):
            if reason := selection.refusal(layer):
                self.remark(context, "missed", layer.name, f"{layer.node.op_type} stays in float: {reason}")
            else:
                found.append(layer)
        recurrent = [str(node.name) for node in recurrent_layers(module)] if self.preset == "full" else []
        if not found and not recurrent:
            return False
        calibration = calibration_of(self, self.stats, module, context, gram=grams_wanted(found, self.rounding))
        if self.preset == "full" and not self.table:
            balance(module, context, calibration)
            found = [layer for layer in layers(module) if not selection.refusal(layer)]
        reference = module.clone() if self.recover else None
        every: list[Layer | Store] = [*found, *(stores(module) if self.storage and self.preset != "full" else [])]
        assignment = self._assignment(module, every, calibration, context)
        assignment.update(self._from_table(every))
        assignment.update(dict.fromkeys(recurrent, "w8a8"))
        assign(module, assignment, calibration, method=self.method, rounding=self.rounding)
        if reference is not None:
            recover_quantized(self, module, reference, context)
        self._tell(every, assignment, context)
        return any(name != FLOAT for name in assignment.values())

    def _assignment(
        self, module: Module, found: list[Layer | Store], calibration: Calibration, context: PassContext
    ) -> dict[str, str]:
        if self.preset == "full":
            return {layer.name: "w8a8" for layer in found}
        if self.preset == "hierarchical":
            return by_place(module, found, self.lowest, self.highest, self.edge)
        if context.inputs is None:
            raise UserError(
                "measuring sensitivity needs samples, not statistics alone", where=self.name, hint="give --calib"
            )
        known = [name for name in self.schemes if name in SCHEMES]
        if len(known) != len(self.schemes) or not known:
            odd = next((name for name in self.schemes if name not in SCHEMES), "")
            raise UserError(f"there is no scheme {odd!r}", where=self.name, hint=f"one of {', '.join(SCHEMES)}")
        if self.by_metrics and (context.evaluation is None or not context.evaluation.limits):
            what = "there are no limits of metrics to go by"
            raise UserError(what, where=self.name, hint="give --eval module:function and --metrics")
        fitting = [layer for layer in found if offered(layer, known)]
        rest = {layer.name: FLOAT for layer in found if layer not in fitting}
        for name in rest:
            self.remark(context, "missed", name, "it stays in float: none of the schemes given fits it")
        sensitivity = self._measured(module, fitting, known, calibration, context)
        if not self.by_metrics:
            return {**within(fitting, known, sensitivity, self.budget), **rest}
        steps = list(steps_upwards(fitting, known, sensitivity))
        return {**self._smallest(module, steps, calibration, context), **rest}

    def _measured(
        self,
        module: Module,
        found: Sequence[Layer | Store],
        schemes: Sequence[str],
        calibration: Calibration,
        context: PassContext,
    ) -> Sensitivity:
        """Sensitivity of layers, with remarks on the worst and on what it cost."""
        assert context.inputs is not None
        sensitivity = measure(module, found, schemes, context.inputs, calibration, evaluation=context.evaluation)
        cost = f"each on {sensitivity.samples} samples, {sensitivity.runs:.2f} runs over all"
        judged = f", {sensitivity.evaluations:.2f} runs of the evaluator" if sensitivity.evaluations else ""
        self.remark(context, "note", "", f"sensitivity of {len(found)} layers measured: {cost}{judged}")
        for layer, error in sensitivity.ranked("w8a8")[:5]:
            self.remark(context, "note", layer, f"in w8a8 alone it moves the outputs by {error:.2%}")
        return sensitivity

    def _smallest(
        self, module: Module, steps: Sequence[Mapping[str, str]], calibration: Calibration, context: PassContext
    ) -> dict[str, str]:
        """The first of ``steps``, from the smallest assignment to the closest, that keeps the limits: by bisection."""
        evaluation = context.evaluation
        assert evaluation is not None
        low, high, tried = 0, len(steps) - 1, 0
        while low < high:
            middle, tried = (low + high) // 2, tried + 1
            changed = module.clone()
            assign(changed, steps[middle], calibration, method=self.method)
            if evaluation.judge_module(changed, seed=context.seed).missed:
                low = middle + 1
            else:
                high = middle
        self.remark(context, "note", "", f"chosen by the metrics of {tried} of {len(steps)} assignments")
        return dict(steps[low])

    def _from_table(self, found: Sequence[Layer | Store]) -> dict[str, str]:
        result = {}
        for entry in self.table:
            pattern, _, scheme = entry.rpartition("=")
            if scheme not in SCHEMES or not pattern:
                raise UserError(f"{entry!r} gives no scheme", where=self.name, hint=f"PATTERN={'|'.join(SCHEMES)}")
            matching = [
                layer for layer in found if fnmatch.fnmatchcase(layer.name, pattern) and SCHEMES[scheme].fits(layer)
            ]
            if not matching:
                raise UserError(f"no layer that {scheme} fits is called {pattern!r}", where=self.name)
            result.update({layer.name: scheme for layer in matching})
        return result

    def _tell(self, found: Sequence[Layer | Store], assignment: Mapping[str, str], context: PassContext) -> None:
        for layer in found:
            self.remark(context, "note", layer.name, f"{layer.node.op_type} in {assignment[layer.name]}")
        counts = collections.Counter(assignment[layer.name] for layer in found)
        after = sum(nbytes(layer, SCHEMES[assignment[layer.name]]) for layer in found)
        before = sum(nbytes(layer, SCHEMES[FLOAT]) for layer in found)
        summary = ", ".join(f"{name} ×{count}" for name, count in counts.most_common())
        message = f"{self.preset}: {summary}; weights of these layers {before / 1e6:.1f} MB → {after / 1e6:.1f} MB"
        self.remark(context, "applied", "", message)


def by_place(
    module: Module, found: Sequence[Layer | Store], lowest: str, highest: str = "w8a8", share: float = EDGE
) -> dict[str, str]:
    """``highest`` at the ends of each tower and outside of towers, ``lowest`` in the middle.

    Convolutions that compute in integers at the ends do so in the middle, where weights alone would mean floats.
    """
    towers = {name: tower.name for tower in analyze_towers(module).towers for name in tower.part.nodes}
    members: dict[str, list[Layer | Store]] = collections.defaultdict(list)
    result = {}
    for layer in found:
        result[layer.name] = highest if SCHEMES[highest].fits(layer) else "w8" if isinstance(layer, Store) else "w8a8"
        if layer.name in towers:
            members[towers[layer.name]].append(layer)
    for group in members.values():
        edge = max(1, round(share * len(group)))
        for layer in group[edge:-edge]:
            integers = is_onnx(layer.node, "Conv") and bool(SCHEMES[highest].activation_bits)
            if SCHEMES[lowest].fits(layer) and not integers:
                result[layer.name] = lowest
    return result


def within(
    found: Sequence[Layer | Store], schemes: Sequence[str], sensitivity: Sensitivity, budget: float
) -> dict[str, str]:
    """The assignment with the least sum of squared errors whose weights take at most ``budget`` of those in float32.

    Starts with the smallest scheme everywhere and takes the step that saves most error for each byte, while it fits.

    Raises:
        UserError: Even the smallest schemes exceed the budget.
    """
    options = {layer.name: _frontier(layer, offered(layer, schemes), sensitivity) for layer in found}
    place = dict.fromkeys(options, 0)
    size = sum(steps[0][0] for steps in options.values())
    allowed = budget * sum(parameters(layer) * 4 for layer in found)
    if size > allowed:
        least = size / sum(parameters(layer) * 4 for layer in found)
        raise UserError(
            f"a budget of {budget:g} cannot be met: these schemes need at least {least:.3f}",
            hint="raise the budget or allow smaller schemes",
        )
    while True:
        gains = []
        for name, steps in options.items():
            if place[name] + 1 < len(steps):
                (now, error, _), (then, less, _) = steps[place[name]], steps[place[name] + 1]
                if size + then - now <= allowed:
                    gains.append(((error**2 - less**2) / max(then - now, 1e-9), name, then - now))
        if not gains:
            return {name: steps[place[name]][2] for name, steps in options.items()}
        _, best, more = max(gains)
        place[best] += 1
        size += more


def steps_upwards(
    found: Sequence[Layer | Store], schemes: Sequence[str], sensitivity: Sensitivity
) -> Iterator[dict[str, str]]:
    """Assignments from the smallest to the closest, each one step above the one before: that with the most gain."""
    options = {layer.name: _frontier(layer, offered(layer, schemes), sensitivity) for layer in found}
    moves = [
        (_slope(before, after), name, place)
        for name, steps in options.items()
        for place, (before, after) in enumerate(itertools.pairwise(steps))
    ]
    assignment = {name: steps[0][2] for name, steps in options.items()}
    yield dict(assignment)
    # Gains fall from one step of a layer to its next, so that the steps of each come in their order.
    for _, name, place in sorted(moves, key=lambda move: (-move[0], move[1], move[2])):
        assignment[name] = options[name][place + 1][2]
        yield dict(assignment)


def _frontier(layer: Layer | Store, schemes: Sequence[str], sensitivity: Sensitivity) -> list[tuple[float, float, str]]:
    """(bytes, error, scheme) of the schemes worth having: each larger one is closer, at a falling gain a byte."""
    points = sorted((nbytes(layer, SCHEMES[name]), sensitivity.of(layer.name, name), name) for name in schemes)
    hull: list[tuple[float, float, str]] = []
    for point in points:
        if hull and point[1] >= hull[-1][1]:
            continue
        if hull and point[0] == hull[-1][0]:
            hull.pop()
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(a: tuple[float, float, str], b: tuple[float, float, str]) -> float:
    return float((a[1] ** 2 - b[1] ** 2) / max(b[0] - a[0], 1e-9))
