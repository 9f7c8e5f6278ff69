"""LSTM and GRU in integers: which are quantized so, and what their kernels need.

The state that a step hands to the next has no name in the graph. A pair of QuantizeLinear and DequantizeLinear before
the initial state says how it is rounded: whatever starts the recurrence is in that encoding, and so is what each step
multiplies with R. Weights are int8 with one scale for each row, that is for each gate of each hidden unit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from tvm.ir import Expr

from mmopt.backends.compute import Map, Tensor, index
from mmopt.backends.cpu.dot import Dot, pack
from mmopt.backends.cpu.kernels.recurrent_dot import IntegerProduct, Rescaling
from mmopt.lowering.ops.coarse import requantized
from mmopt.lowering.ops.products import narrow_product
from mmopt.lowering.registry import OpNode
from mmopt.lowering.values import Quantized, Value

Arrange = Callable[[np.ndarray, Sequence[int]], np.ndarray]
"""``[D, G·H, K]`` → ``[D, panels, gates, lanes, K]`` for the chosen gates, hidden units zero-padded."""


@dataclasses.dataclass(frozen=True)
class ByteRows:
    """A weight in int8 with one scale for each row.

    Attributes:
        value: The integers ``[D, G·H, K]``.
        scales: float32 ``[D, G·H, 1]``.
    """

    value: Value
    scales: np.ndarray

    @property
    def integers(self) -> np.ndarray:
        assert self.value.constant is not None
        return self.value.constant


def byte_rows(weight: Value) -> ByteRows | None:
    """The integers behind a weight ``[D, G·H, K]``, where there is one scale for each row and no zero point."""
    known = weight.quantized
    if known is None or known.value.constant is None or known.value.dtype != "int8" or known.value.bits is not None:
        return None
    shape, scale = known.value.constant.shape, known.scale.constant
    if scale is None or scale.dtype != np.float32 or scale.shape != (*shape[:2], 1):
        return None
    if known.zero is not None and (known.zero.constant is None or known.zero.constant.any()):
        return None
    return ByteRows(known.value, scale)


def state_step(state: Value | None) -> float | None:
    """The step in which a state is rounded: int8 without a zero point."""
    known = None if state is None else state.quantized
    if known is None or not known.single or known.value.dtype != "int8" or known.value.bits is not None:
        return None
    if known.scale.constant is None or known.scale.dtype != "float32" or known.block:
        return None
    if known.zero is not None and (known.zero.constant is None or known.zero.constant.any()):
        return None
    step = float(known.scale.constant.reshape(-1)[0])
    return step if 2.0**-100 < step < 2.0**100 else None


def is_zero(state: Value) -> bool:
    """Whether a quantized state is known to be 0."""
    known = state.quantized
    return known is not None and known.value.constant is not None and not known.value.constant.any()


def projected_integers(node: OpNode, x: Value, weight: ByteRows, arrange: Arrange, gates: int) -> Value | None:
    """X·W for all steps as a product of bytes ``[steps, batch, columns]``, columns as ``arrange`` has them.

    Returns:
        ``None`` where X is no byte, or there is no kernel for it.
    """
    if x.quantized is None:
        return None
    chosen, depth = range(gates), weight.integers.shape[2]
    arranged = lambda w: np.moveaxis(arrange(w, chosen), -1, 0).reshape(depth, -1)  # noqa: E731
    integers = node.context.program.packed(weight.value, ("input bytes", gates), arranged)
    scales = np.ascontiguousarray(arrange(weight.scales, chosen).reshape(-1))
    made = Value(constant=integers.data, name=f"{weight.value.name}.arranged")
    known = Quantized(made, Value(constant=scales, name=f"{weight.value.name}.scales"), None, 1)
    shape = (index(depth), index(len(scales)))
    wide = Value(Map(shape, "float32", lambda k, n: made.tensor[k, n].astype("float32"), "widen"))
    wide.quantized = known
    return narrow_product(node, x, wide)


def packed_rows(
    node: OpNode, weight: ByteRows, arrange: Arrange, gates: Sequence[int], vectors: int, dot: Dot
) -> Tensor:
    """R for the chosen gates as ``[D, panels, groups, depth / group, vectors · lanes, group]``."""

    def packing(integers: np.ndarray) -> np.ndarray:
        data = arrange(integers, gates)
        directions, panels, count, lanes, hidden = data.shape
        made = pack(np.ascontiguousarray(data.reshape(-1, hidden).T), dot, vectors * lanes)
        return made.reshape(directions, panels, count // vectors, *made.shape[1:])

    key = ("recurrent bytes", tuple(gates), vectors, dot.lanes, dot.group, dot.step)
    return node.context.program.packed(weight.value, key, packing)


def rescaling(weight: ByteRows, arrange: Arrange, gates: Sequence[int], step: float, dot: Dot) -> Rescaling:
    """What turns sums of the chosen gates into floats."""
    scales = arrange(weight.scales, gates)[..., 0] * np.float32(step)
    excess = None
    if dot.shift:
        sums = arrange(weight.integers.astype(np.int32), gates).sum(axis=-1, dtype=np.int32) * np.int32(dot.shift)
        excess = Value(constant=np.ascontiguousarray(sums), name=f"{weight.value.name}_excess").tensor
    return Rescaling(Value(constant=np.ascontiguousarray(scales), name=f"{weight.value.name}_steps").tensor, excess)


def integer_product(
    weight: ByteRows, arrange: Arrange, hidden: int, gates: int, late: int, step: float, dot: Dot
) -> IntegerProduct:
    """What the template needs to multiply a state of this ``step``, for ``gates`` and then ``late`` ones."""

    def quantize(x: Expr) -> Expr:
        rounded = requantized(x, step, dot.shift, "uint8") if dot.shift else requantized(x, step, 0, "int8")
        return rounded.astype(dot.a)

    first = rescaling(weight, arrange, range(gates), step, dot)
    second = rescaling(weight, arrange, range(gates, gates + late), step, dot) if late else None
    return IntegerProduct(dot, hidden, quantize, first, second)
