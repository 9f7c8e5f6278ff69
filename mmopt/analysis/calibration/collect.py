"""Runs a module over calibration samples, one after another, and keeps statistics of its tensors; never the tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from mmopt.analysis.calibration.statistics import Array, TensorStatistics
from mmopt.analysis.modalities import classify_inputs
from mmopt.analysis.shapes import ShapeFacts, infer_shapes
from mmopt.analysis.towers import TowerReport, analyze_towers
from mmopt.errors import UserError
from mmopt.ir.evaluate import ReferenceRunner
from mmopt.ir.module import Module

GIVEN, RANDOM = "given", "random"
"""Where samples come from: from the user, or made up (which is said wherever the result is used)."""

MADE_UP = "the calibration samples were made up: accuracy is left to chance"
"""What console, report and manifest say then; as a remark from ``calibration``."""

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)
_CONVOLUTIONS = ("Conv", "ConvTranspose")
_PRODUCTS = ("MatMul", "Gemm")


@dataclasses.dataclass
class Calibration:
    """Statistics of the tensors of one model.

    Attributes:
        tensors: By name of the value in the canonical form of the model.
        samples: Samples they come from.
        source: ``given`` or ``random``.
    """

    tensors: dict[str, TensorStatistics] = dataclasses.field(default_factory=dict)
    samples: int = 0
    source: str = GIVEN

    def merge(self, other: Calibration) -> None:
        """Take in what ``other`` has seen.

        Raises:
            UserError: They are statistics of different models.
        """
        if set(self.tensors) != set(other.tensors):
            odd = sorted(set(self.tensors) ^ set(other.tensors))[0]
            raise UserError(
                f"statistics of different models do not merge: only one of them has {odd!r}",
                hint="calibrate the same model with the same options",
            )
        for name, statistics in other.tensors.items():
            try:
                self.tensors[name].merge(statistics)
            except ValueError as error:
                raise UserError(f"statistics of {name!r} do not merge: {error}") from error
        self.samples += other.samples
        self.source = RANDOM if RANDOM in (self.source, other.source) else GIVEN


def collect(
    module: Module,
    samples: Mapping[str, Array],
    *,
    gram: Iterable[str] = (),
    source: str = GIVEN,
    threads: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Calibration:
    """Collect statistics of every floating-point tensor of the main graph.

    Padding, as the model's own mask inputs mark it, does not enter: rows of the tensors of a tower that belong to
    masked positions are left out.

    Args:
        module: The module.
        samples: Arrays by input name with a leading axis of samples, with or without the model's own batch axis of 1.
        gram: Names of tensors whose Gram matrices are wanted.
        source: Where the samples come from.
        threads: Threads of the reference runtime; 0 takes all cores.
        progress: Told samples done and all of them.

    Raises:
        UserError: Samples that do not fit the inputs, NaN or infinity in them, a tower that they leave unexercised, or
            a tensor that becomes NaN.
        BackendError: The model does not run on them.
    """
    batches = Batches(module, samples)
    _check_exercised(module, analyze_towers(module), batches)
    facts = infer_shapes(module.model)
    observed = _observed(module, facts)
    axes = {str(value.name): channel_axis(value, facts) for value in observed}
    padding = Padding(module, observed)
    wanted = set(gram)
    if unknown := wanted - set(axes):
        raise UserError(f"there is no tensor {sorted(unknown)[0]!r} to make a Gram matrix of")
    result = Calibration({name: TensorStatistics() for name in axes}, len(batches), source)
    with ReferenceRunner(threads=threads) as runner:
        outputs = runner.stream(_exposing(module, observed), iter(batches))
        for number, values in enumerate(outputs):
            feeds = batches[number]
            for name, statistics in result.tensors.items():
                array = feeds[name] if name in feeds else values[name]
                positions = padding.axis(name, array, feeds)
                kept = array if positions is None else padding.valid(name, array, feeds, positions)
                if np.isnan(kept).any():
                    raise UserError(f"tensor {name!r} becomes NaN on calibration sample {number}")
                axis = axes[name] if axes[name] != positions else None
                statistics.update(kept, axis, gram=name in wanted)
            progress(number + 1, len(batches))
    return result


class Batches:
    """The samples as sets of inputs: what one run of the model takes at a time.

    Args:
        module: The module.
        samples: Arrays by input name with a leading axis of samples.

    Raises:
        UserError: Arrays that do not fit, or NaN or infinity among them.
    """

    def __init__(self, module: Module, samples: Mapping[str, Array]) -> None:
        self._inputs = {str(v.name): v for v in module.graph.inputs if not v.is_initializer()}
        if missing := [name for name in self._inputs if name not in samples]:
            raise UserError(f"there are no calibration samples for input {missing[0]!r}", hint="give all inputs")
        self._samples = {name: np.asarray(samples[name]) for name in self._inputs}
        counts = {len(array) for array in self._samples.values()}
        if len(counts) != 1 or not min(counts):
            raise UserError("calibration needs the same number of samples, at least one, for every input")
        (self._count,) = counts
        self._check()

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[number] for number in range(self._count))

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {name: self._sample(name, number) for name in self._inputs}

    def _sample(self, name: str, number: int) -> Array:
        array, shape = self._samples[name], self._inputs[name].shape
        # Samples of images are as often kept as [samples, channels, …] as with the model's batch axis in between.
        same_rank = shape is not None and 0 < len(shape) == array.ndim
        batch = shape[0] if same_rank and shape is not None else 0
        return array[number : number + 1] if (same_rank and batch in (1, None)) or _is_symbol(batch) else array[number]

    def _check(self) -> None:
        for name, value in self._inputs.items():
            sample, shape = self._sample(name, 0), value.shape
            fits = shape is None or (
                sample.ndim == len(shape)
                and all(not isinstance(d, int) or d == s for d, s in zip(shape, sample.shape, strict=True))
            )
            if not fits:
                wanted = "x".join(map(str, shape or ()))
                raise UserError(
                    f"a calibration sample of {name!r} has shape {'x'.join(map(str, sample.shape))}, not {wanted}",
                    hint="the leading axis of the array counts samples",
                )
            array = self._samples[name]
            if array.dtype.kind == "f" and not (good := np.isfinite(array)).all():
                first = int(np.argwhere(~good)[0][0])
                raise UserError(f"calibration sample {first} of input {name!r} has NaN or infinity in it")


def _is_symbol(size: object) -> bool:
    return isinstance(size, ir.SymbolicDim)


def _check_exercised(module: Module, report: TowerReport, batches: Batches) -> None:
    """A tower whose data never varies is not calibrated by what comes out of it."""
    roles = classify_inputs(module)
    for tower in report.towers:
        data = [n for n in tower.inputs if roles[n].role not in ("mask", "lengths", "positions", "token-types")]
        masks = [name for name in tower.inputs if roles[name].role == "mask"]
        if masks and not any(feeds[name].any() for feeds in batches for name in masks):
            raise UserError(
                f"no calibration sample exercises the {tower.name} tower: {masks[0]!r} is 0 everywhere",
                hint="give samples of every modality",
            )
        if data and all(_is_constant(batches, name) for name in data):
            raise UserError(
                f"no calibration sample exercises the {tower.name} tower: {data[0]!r} never varies",
                hint="give samples of every modality",
            )


def _is_constant(batches: Batches, name: str) -> bool:
    first = batches[0][name].reshape(-1)[:1]
    return all((feeds[name] == first).all() for feeds in batches)


def _observed(module: Module, facts: ShapeFacts) -> list[ir.Value]:
    """Floating-point inputs and results in the main graph, in order of execution."""
    values = [v for v in module.graph.inputs if not v.is_initializer()]
    values += [output for node in module.graph for output in node.outputs if output.name]
    needed = (v for v in values if v.is_graph_input() or v.uses() or v.is_graph_output())
    return [v for v in needed if _dtype(v, facts) in _FLOATS]


def _dtype(value: ir.Value, facts: ShapeFacts) -> ir.DataType | None:
    kind = value.type if value.type is not None else facts.type(value)
    return kind.dtype if isinstance(kind, ir.TensorType) else None


def _exposing(module: Module, observed: Iterable[ir.Value]) -> Module:
    """A copy of ``module`` that has these values as outputs too."""
    copy = module.clone()
    names = {str(v.name) for v in observed}
    known = {output.name for output in copy.graph.outputs}
    for node in copy.graph:
        copy.graph.outputs.extend(o for o in node.outputs if o.name in names and o.name not in known)
    return copy


def channel_axis(value: ir.Value, facts: ShapeFacts) -> int | None:
    """Axis of the channels of a tensor: 1 beside convolutions, the last one elsewhere; ``None`` below rank 2."""
    shape = facts.shape(value)
    rank = 0 if shape is None else len(shape)
    if rank < 2:
        return None
    neighbours = [use.node for use in value.uses() if use.idx == 0]
    producer = value.producer()
    if any(node.op_type in _CONVOLUTIONS for node in neighbours):
        return 1
    if any(node.op_type in _PRODUCTS for node in neighbours) or producer is None:
        return rank - 1
    return 1 if producer.op_type in _CONVOLUTIONS else rank - 1


class Padding:
    """Which rows of which tensors are padding.

    A mask of shape [batch, length] marks the rows of the tensors of its own tower that have these two axes.
    """

    def __init__(self, module: Module, observed: Iterable[ir.Value]) -> None:
        roles, report = classify_inputs(module), analyze_towers(module)
        masks = {t.name: next((n for n in t.inputs if roles[n].role == "mask"), None) for t in report.towers}
        owner: dict[str, str] = {}
        for tower in report.towers:
            projectors = [name for p in report.projectors if p.tower == tower.name for name in p.part.nodes]
            if (mask := masks[tower.name]) is not None:
                owner.update(dict.fromkeys((*tower.part.nodes, *projectors, *tower.inputs), mask))
        # Reports call a node without a name by its operator and place.
        places = {node: node.name or f"{node.op_type}#{number}" for number, node in enumerate(module.graph)}
        self._masks: dict[str, str] = {}
        for value in observed:
            producer = value.producer()
            place = str(value.name) if producer is None else places[producer]
            if place in owner:
                self._masks[str(value.name)] = owner[place]

    def axis(self, name: str, array: Array, feeds: Mapping[str, Array]) -> int | None:
        """The axis of a tensor that a mask goes along, if there is one."""
        if name not in self._masks:
            return None
        mask = feeds[self._masks[name]]
        if mask.ndim != 2 or array.ndim < 2 or array.shape[0] != mask.shape[0]:
            return None
        return next((n for n, size in enumerate(array.shape) if n and size == mask.shape[1]), None)

    def mask(self, name: str, feeds: Mapping[str, Array]) -> Array:
        """The mask, ``[batch, length]``, of a tensor for which :meth:`axis` has found one: True is data."""
        return np.asarray(feeds[self._masks[name]].astype(bool))

    def valid(self, name: str, array: Array, feeds: Mapping[str, Array], axis: int) -> Array:
        """``array`` without the positions along ``axis`` that are padding; the batch becomes 1."""
        rows = np.moveaxis(array, axis, 1)[self.mask(name, feeds)]
        # Back to the old rank, so that the axis of the channels keeps its number.
        return np.moveaxis(rows[None], 1, axis)
