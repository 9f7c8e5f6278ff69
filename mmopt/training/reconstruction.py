"""Block-wise reconstruction: the weights of a few layers at a time are trained until the block gives what the same
block of a reference gives, on calibration batches and without labels (Li et al., 2021).

Blocks come in order. Each reads what the module, as trained so far, makes of the batches, and aims at what the
reference makes of them, so that it also makes up for the blocks before it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from mmopt.errors import UserError, did_you_mean
from mmopt.ir.module import Module
from mmopt.training.fx import to_fx
from mmopt.training.requirement import require_torch
from mmopt.training.weights import Weight, weights

Array = np.ndarray[Any, Any]
Progress = Callable[[int, int, str], None]

_RATE_INTEGERS, _RATE_FLOATS = 0.15, 1e-3
"""Adam's step: of the rounding variables, and of floats as a part of their root mean square."""
_PENALTY = 2.0
"""Weight of the rounding penalty, as a multiple of the error at the start."""
_MOST_KEPT = 1 << 30
"""Bytes of targets of all blocks that are kept at a time; beyond, those of one block are."""
_LINEAR = ("MatMul", "Gemm", "Conv", "ConvTranspose")


@dataclasses.dataclass(frozen=True)
class Block:
    """Some layers that are trained together.

    Attributes:
        inputs: Tensors of the module that the block reads; the model's inputs when empty.
        outputs: Tensors it makes; the reference has tensors of the same names, which are what it aims at.
        weights: Initializers of the module to train. Floats are trained as they are. Integers are what a
            DequantizeLinear reads: which way they are rounded is trained.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class BlockResult:
    """How a block went.

    Attributes:
        outputs: Its outputs.
        before: Mean squared error on the batches held out, as a part of the mean square of what it aims at.
        after: The same after training.
        kept: Whether the trained weights are in the module: they are when ``after`` is smaller.
    """

    outputs: tuple[str, ...]
    before: float
    after: float
    kept: bool


def layer_blocks(module: Module, reference: Module) -> tuple[Block, ...]:
    """One block for each linear layer whose weight is a quantized constant, in order of execution.

    Args:
        module: The quantized module.
        reference: What it was quantized from; layers whose output has no namesake there are left out.
    """
    there = {str(value.name) for node in reference.graph for value in node.outputs}
    found = []
    for node in module.graph:
        output = str(node.outputs[0].name) if node.outputs else ""
        weight = _quantized(node.inputs[1]) if node.op_type in _LINEAR and len(node.inputs) > 1 else None
        if weight is not None and output in there and node.inputs[0] is not None:
            found.append(Block((_source(node.inputs[0]),), (output,), (weight,)))
    return tuple(found)


def _quantized(value: ir.Value | None) -> str | None:
    """The integer initializer that ``value`` is widened from."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "DequantizeLinear" or node.inputs[0] is None:
        return None
    return str(node.inputs[0].name) if node.inputs[0].const_value is not None else None


def _source(value: ir.Value) -> str:
    """The float tensor before a pair of QuantizeLinear and DequantizeLinear: the pair belongs to the layer."""
    node = value.producer()
    if node is not None and node.op_type == "DequantizeLinear" and node.inputs[0] is not None:
        inner = node.inputs[0].producer()
        if inner is not None and inner.op_type in ("QuantizeLinear", "DynamicQuantizeLinear"):
            assert inner.inputs[0] is not None
            return str(inner.inputs[0].name)
    return str(value.name)


def reconstruct(
    module: Module,
    reference: Module,
    blocks: Sequence[Block],
    batches: Sequence[Mapping[str, Array]],
    *,
    originals: Mapping[str, Array] | None = None,
    steps: int = 300,
    rate: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[BlockResult, ...]:
    """Train blocks of ``module``, in place, towards what ``reference`` makes of the same inputs.

    The last eighth of the batches (the only one, where there is one) is held out to judge by. What a block reads and
    aims at is kept in memory for all batches while it is trained.

    Args:
        module: The module to train.
        reference: What is right; it is unchanged.
        blocks: The blocks, in order of execution; :func:`layer_blocks` gives one for each quantized layer.
        batches: Inputs by name, as both modules take them.
        originals: For integer initializers the float weights they were rounded from, in the same layout: they are then
            rounded up or down from there. Without, they are moved in steps from where they are.
        steps: Steps for each block, one batch each.
        rate: Learning rate instead of the defaults; of floats as a part of their root mean square.
        seed: Seed of the order of batches.
        progress: Told blocks done, blocks in all, and the block at hand.

    Returns:
        One result for each block.

    Raises:
        UserError: A name that does not exist, a weight that cannot be trained, no batch, or an error that is not finite
            (names block, step and batch).
    """
    require_torch("reconstruction")
    if not batches:
        raise UserError("there is no batch to reconstruct on", hint="give calibration samples")
    for block in blocks:
        _check(block, module, reference)
    targets = _targets(reference, blocks, batches)
    results = []
    for number, block in enumerate(blocks):
        if progress is not None:
            progress(number, len(blocks), block.outputs[0])
        aims = targets[number] if targets else list(_values(reference, block.outputs, batches))
        results.append(_Training(module, aims, block, batches, originals or {}, seed).run(steps, rate))
    return tuple(results)


def _targets(
    reference: Module, blocks: Sequence[Block], batches: Sequence[Mapping[str, Array]]
) -> list[list[dict[str, Any]]] | None:
    """What every block aims at, in one pass over the batches; None where that is too much to keep."""
    names = list(dict.fromkeys(name for block in blocks for name in block.outputs))
    found: list[dict[str, Any]] = []
    for values in _values(reference, names, batches):
        found.append(values)
        if sum(v.nbytes for v in values.values()) * len(batches) > _MOST_KEPT:
            return None
    return [[{name: values[name] for name in block.outputs} for values in found] for block in blocks]


def _check(block: Block, module: Module, reference: Module) -> None:
    """Refuse names that do not exist before anything is trained."""
    for of, names, what in (
        (module, (*block.inputs, *block.outputs), "module"),
        (reference, block.outputs, "reference"),
    ):
        known = {str(v.name) for node in of.graph for v in node.outputs} | {str(v.name) for v in of.graph.inputs}
        for name in names:
            if name not in known:
                raise UserError(f"the {what} has no tensor {name!r}", hint=did_you_mean(name, known))
    known = {weight.name for weight in weights(module)}
    for name in block.weights:
        if name not in known:
            raise UserError(f"there is no initializer {name!r}", hint=did_you_mean(name, known))


class _Training:
    """One block: its differentiable form, its data, what is trained."""

    def __init__(
        self,
        module: Module,
        targets: list[dict[str, Any]],
        block: Block,
        batches: Sequence[Mapping[str, Array]],
        originals: Mapping[str, Array],
        seed: int,
    ) -> None:
        self._block, self._seed = block, seed
        self._weights = {w.name: w for w in weights(module) if w.name in block.weights}
        self._inputs = list(_values(module, block.inputs, batches)) if block.inputs else list(batches)
        self._targets = targets
        self._graph = to_fx(module, block.outputs, block.inputs).requires_grad_(False)
        self._floats: dict[str, Any] = {}
        self._roundings: dict[str, Any] = {}
        self._plain = to_fx(module, block.outputs, block.inputs).requires_grad_(False)
        for name, weight in self._weights.items():
            self._prepare(name, weight, originals.get(name))
        self._graph.recompile()
        kept = max(1, len(batches) // 8)
        self._held = range(len(batches) - kept, len(batches))
        self._taught = range(len(batches) - kept) if len(batches) > kept else self._held

    def _prepare(self, name: str, weight: Weight, original: Array | None) -> None:
        paths = {n: path for path, n in (*self._graph.meta["weights"].items(), *self._graph.meta["buffers"].items())}
        path = paths.get(name)
        if path is None:
            raise UserError(f"the block does not read {name!r}", where=f"block {self._block.outputs[0]}")
        if weight.trainable:
            self._floats[name] = self._graph.get_parameter(path).requires_grad_(True)
            return
        from mmopt.training.rounding import Rounding
        from mmopt.training.tensors import BOUNDS

        if weight.tensor.dtype not in BOUNDS:
            raise UserError(f"{name!r} holds {weight.tensor.dtype.name}, which cannot be trained")
        target = None if original is None else _target(weight, original)
        rounding = Rounding(weight.tensor.numpy(), weight.tensor.dtype, target)
        self._roundings[name] = rounding
        function, operands, bounds = rounding.expression()
        graph = self._graph.graph
        old = next(node for node in graph.nodes if node.op == "get_attr" and node.target == path)
        with graph.inserting_after(old):
            new = graph.call_function(function, (), bounds)
        with graph.inserting_before(new):
            new.args = tuple(self._attribute(f"trained_{len(self._roundings)}_{k}", v) for k, v in enumerate(operands))
        old.replace_all_uses_with(new)
        graph.erase_node(old)

    def _attribute(self, name: str, tensor: Any) -> Any:
        import torch

        if isinstance(tensor, torch.nn.Parameter):
            self._graph.register_parameter(name, tensor)
        else:
            self._graph.register_buffer(name, tensor)
        return self._graph.graph.get_attr(name)

    def run(self, steps: int, rate: float | None) -> BlockResult:
        """Train, judge, and keep what is better."""
        before = self._error()
        self._train(steps, rate, before)
        found = self._found()
        old = {name: weight.tensor for name, weight in self._weights.items()}
        self._load(found)
        after = self._error()
        kept = after < before
        for name, weight in self._weights.items():
            if kept:
                array, dtype = found[name], old[name].dtype
                weight.replace(ir.Tensor(array, dtype=dtype, name=old[name].name))
        return BlockResult(self._block.outputs, before, after, kept)

    def _train(self, steps: int, rate: float | None, start: float) -> None:
        import torch

        groups = [
            {"params": [p], "lr": (rate or _RATE_FLOATS) * max(float(p.detach().square().mean().sqrt()), 1e-8)}
            for p in self._floats.values()
        ]
        groups += [{"params": [r.parameter], "lr": rate or _RATE_INTEGERS} for r in self._roundings.values()]
        if not groups:
            return
        optimizer = torch.optim.Adam(groups)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - 0.9 * step / max(1, steps))
        random = np.random.default_rng(self._seed)
        for step in range(steps):
            batch = self._taught[int(random.integers(len(self._taught)))]
            loss = self._loss(self._graph, batch)
            if not bool(torch.isfinite(loss)):
                where = f"block {self._block.outputs[0]}, step {step}, batch {batch}"
                raise UserError(f"the error is {float(loss.detach())}", where=where, hint="lower the rate")
            for rounding in self._roundings.values():
                loss = loss + _PENALTY * start * rounding.penalty(step / steps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

    def _loss(self, graph: Any, batch: int) -> Any:
        """Mean squared error over the mean square of what is aimed at, over all outputs."""
        import torch

        from mmopt.training.tensors import feed

        made = graph(**feed(graph, self._inputs[batch]))
        parts = []
        for name, target in self._targets[batch].items():
            power = target.float().square().mean().clamp(min=torch.finfo(torch.float32).tiny)
            parts.append((made[name].float() - target.float()).square().mean() / power)
        return torch.stack(parts).mean()

    def _error(self) -> float:
        import torch

        with torch.no_grad():
            return float(np.mean([float(self._loss(self._plain, batch)) for batch in self._held]))

    def _found(self) -> dict[str, Array]:
        from mmopt.training.tensors import to_numpy

        floats = {name: to_numpy(p, self._weights[name].tensor.dtype) for name, p in self._floats.items()}
        return {**floats, **{name: rounding.result() for name, rounding in self._roundings.items()}}

    def _load(self, found: Mapping[str, Array]) -> None:
        """Put weights into the form that errors are measured on, which has true integers."""
        import torch

        from mmopt.training.tensors import from_numpy

        plain = self._plain
        paths = {name: path for path, name in (*plain.meta["weights"].items(), *plain.meta["buffers"].items())}
        state = {**dict(plain.named_parameters()), **dict(plain.named_buffers())}
        with torch.no_grad():
            for name, array in found.items():
                state[paths[name]].copy_(from_numpy(array))


def _values(module: Module, names: Sequence[str], batches: Sequence[Mapping[str, Array]]) -> Iterator[dict[str, Any]]:
    """What tensors of a module are on each batch."""
    import torch

    from mmopt.training.tensors import feed, from_numpy

    given = {str(value.name) for value in module.graph.inputs}
    inner = [name for name in names if name not in given]
    graph = to_fx(module, inner) if inner else None
    for batch in batches:
        found = {name: from_numpy(np.asarray(batch[name])) for name in names if name in given}
        if graph is not None:
            with torch.no_grad():
                found |= graph(**feed(graph, batch))
        yield {name: found[name] for name in names}


def _target(weight: Weight, original: Array) -> Array:
    """``w / s + z`` of every element, by the DequantizeLinear that reads the weight."""
    if tuple(original.shape) != tuple(weight.tensor.shape):
        what = (
            f"the original of {weight.name!r} is {list(original.shape)}, the integers are {list(weight.tensor.shape)}"
        )
        raise UserError(what, hint="give it in the layout of the integers")
    node = next((use.node for use in weight.value.uses() if use.node.op_type == "DequantizeLinear"), None)
    scale = None if node is None or node.inputs[1] is None else node.inputs[1].const_value
    if node is None or scale is None:
        raise UserError(f"{weight.name!r} is not read by a DequantizeLinear with a constant scale")
    point = node.inputs[2].const_value if len(node.inputs) > 2 and node.inputs[2] is not None else None
    axis, block = (_integer(node, name, default) for name, default in (("axis", 1), ("block_size", 0)))
    spread = [_spread(part, original.shape, axis, block) for part in (scale, point) if part is not None]
    exact = original.astype(np.float64) / spread[0]
    return np.asarray(exact if point is None else exact + spread[1])


def _integer(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else int(attribute.as_int())


def _spread(tensor: ir.TensorProtocol, shape: Sequence[int], axis: int, block: int) -> Array:
    array = tensor.numpy().astype(np.float64)
    if array.size == 1 and not block:
        return array.reshape(())
    axis %= len(shape)
    if block:
        return np.repeat(array, block, axis).take(range(shape[axis]), axis)
    return array.reshape([-1 if n == axis else 1 for n in range(len(shape))])
