"""Values while a graph is lowered: lazy tensors, compile-time constants, integers known as expressions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import tirx
from tvm.ir import Expr

from mmopt.backends.compute import Map, Source, Tensor, index
from mmopt.backends.expressions import same, simplify

_DTYPES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.DOUBLE: "float64",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.INT8: "int8",
    ir.DataType.INT16: "int16",
    ir.DataType.INT32: "int32",
    ir.DataType.INT64: "int64",
    ir.DataType.UINT8: "uint8",
    ir.DataType.UINT16: "uint16",
    ir.DataType.UINT32: "uint32",
    ir.DataType.UINT64: "uint64",
    ir.DataType.BOOL: "bool",
}

_NARROW = {
    ir.DataType.INT4: ("int8", 4),
    ir.DataType.UINT4: ("uint8", 4),
    ir.DataType.INT2: ("int8", 2),
    ir.DataType.UINT2: ("uint8", 2),
}
"""Integers of less than a byte are kept one in a byte; results are cut to the number of bits."""

MAX_ELEMENTS = 128
"""Integer tensors up to this size are followed element by element at compile time."""


class NotLowered(Exception):
    """This node cannot be lowered; the reason goes to the report."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Illegal(NotLowered):
    """The standard does not allow this node with these inputs: running it is an error everywhere."""


def dtype_name(dtype: ir.DataType | None) -> str:
    """TVM name of an ONNX element type.

    Raises:
        NotLowered: No kernel works on this type.
    """
    if dtype in _NARROW:
        return _NARROW[dtype][0]
    if dtype not in _DTYPES:
        raise NotLowered(f"element type {dtype.name if dtype else 'unknown'} has no kernels")
    return _DTYPES[dtype]


def identifier(name: str | None) -> str:
    """``name`` with nothing in it but letters, digits and underscores."""
    return "".join(c if c.isalnum() else "_" for c in name or "value") or "value"


def described(value: ir.Value | None, lowered: Value | None) -> ir.TypeAndShape | None:
    """Type of a value for ONNX's own tools: the element type the model states, the extents that lowering knows."""
    if value is None or lowered is None:
        return None
    names = {name: dtype for dtype, name in reversed(_DTYPES.items())}
    dtype = value.dtype or names.get(lowered.dtype)
    if dtype is None:
        return None
    extents = [int(d.value) if isinstance(d, tirx.IntImm) else None for d in lowered.shape]
    return ir.TypeAndShape(ir.TensorType(dtype), ir.Shape(extents))


def narrow_bits(dtype: ir.DataType | None) -> int | None:
    """Bits of an integer type of less than a byte, ``None`` for every other type."""
    return _NARROW[dtype][1] if dtype in _NARROW else None


@dataclasses.dataclass(frozen=True)
class Widened:
    """What a float32 constant was dequantized from: ``integers · scales``, each of its shape.

    Attributes:
        integers: int8.
        scales: float32.
        bits: 8, or 4 when the integers have no more.
    """

    integers: np.ndarray
    scales: np.ndarray
    bits: int


class ConstantSource(Source):
    """A weight: a kernel parameter whose data is known at compile time and stored in the artifact."""

    def __init__(self, data: np.ndarray, name: str) -> None:
        super().__init__(data.shape, str(data.dtype), name)
        self.data = data
        self.widened: Widened | None = None


@dataclasses.dataclass(frozen=True)
class Quantized:
    """What a dequantized value was: ``(value - zero) · scale``.

    Attributes:
        value: The integers.
        scale: One number, one for each index of ``axis``, or one for each block of it.
        zero: As ``scale``; ``None`` for zero.
        axis: The axis that scale and zero point differ along, counted from the front.
        block: Indices of ``axis`` that share a scale; 0 when scales are not blocked.
    """

    value: Value
    scale: Value
    zero: Value | None
    axis: int
    block: int = 0

    @property
    def single(self) -> bool:
        """Whether one scale holds for all elements."""
        return self.scale.ndim == 0 or all(isinstance(d, tirx.IntImm) and int(d.value) == 1 for d in self.scale.shape)


class Value:
    """One ONNX value during lowering.

    Exactly one of the three forms is primary; the others are derived on demand.

    Attributes:
        shape: Extents as int64 expressions.
        dtype: TVM dtype name.
        constant: The data when known at compile time.
        bits: For integers of less than a byte, how many bits of the byte count.
        blocked: The same data as ``[N, C/B, *space, B]``, where a convolution made it in that layout.
        narrow: The narrower floats this value was widened from, of the same shape.
        rounded: The wider floats this value was rounded from, of the same shape.
        quantized: The integers this value was dequantized from, of the same shape.
        widened: For a constant that was dequantized at compile time: from what. The artifact stores that.
        elements: For small integer and boolean tensors: every element as an expression of symbolic sizes.
    """

    def __init__(
        self,
        tensor: Tensor | None = None,
        *,
        constant: np.ndarray | None = None,
        elements: np.ndarray | None = None,
        dtype: str | None = None,
        name: str = "value",
    ) -> None:
        self._tensor = tensor
        self.constant = constant
        self.name = name
        self.blocked: Tensor | None = None
        self.bits: int | None = None
        self.narrow: Value | None = None
        self.rounded: Value | None = None
        self.quantized: Quantized | None = None
        self.widened: Widened | None = None
        self._elements = elements
        if tensor is not None:
            self.shape, self.dtype = tensor.shape, tensor.dtype
        elif constant is not None:
            self.shape, self.dtype = tuple(index(d) for d in constant.shape), str(constant.dtype)
        elif elements is not None and dtype is not None:
            self.shape, self.dtype = tuple(index(d) for d in elements.shape), dtype
            if all(isinstance(e, tirx.IntImm) for e in elements.flat):
                data = [int(e.value) for e in elements.flat]
                self.constant = np.array(data, dtype=dtype).reshape(elements.shape)
        else:
            raise ValueError("a value needs a tensor, a constant or elements")

    @classmethod
    def in_blocks(cls, blocked: Tensor, name: str = "value") -> Value:
        """A value made as ``[N, C/B, *space, B]``; its plain form is a view."""
        value = cls(plain_view(blocked), name=name)
        value.blocked = blocked
        return value

    def in_blocks_of(self, lanes: int) -> Tensor | None:
        """The blocked form, where there is one with blocks of ``lanes`` channels."""
        if self.blocked is None or not same(self.blocked.shape[-1], index(lanes)):
            return None
        return self.blocked

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def tensor(self) -> Tensor:
        """The lazy tensor; constants become literals (one element) or weights."""
        if self._tensor is None:
            self._tensor = self._materialize()
        return self._tensor

    @tensor.setter
    def tensor(self, tensor: Tensor) -> None:
        self._tensor = tensor

    @property
    def pending(self) -> bool:
        """Whether the value is a computation that no kernel has been emitted for."""
        if self.blocked is not None:
            return not isinstance(self.blocked, Source)
        return self._tensor is not None and not isinstance(self._tensor, Source) and self.constant is None

    @property
    def deferred(self) -> bool:
        """Whether whoever uses the value may rather use what it was made from; until then it is not stored."""
        return (self.narrow is not None or self.quantized is not None) and self.pending

    @property
    def elements(self) -> np.ndarray | None:
        """Every element as an expression, or ``None`` when they are not followed."""
        known = self._elements is None and self.constant is not None and self.constant.size <= MAX_ELEMENTS
        if known and self.constant is not None and self.constant.dtype.kind in "iub":
            flat = [tirx.const(int(v), "int64") for v in self.constant.flat]
            self._elements = np.array([*flat, None], dtype=object)[:-1].reshape(self.constant.shape)
        return self._elements

    def _materialize(self) -> Tensor:
        if self.constant is not None:
            if self.constant.size == 1 and self.dtype != "bfloat16":
                literal = tirx.const(self.constant.item(), self.dtype)
                return Map(self.shape, self.dtype, lambda *_: literal, "literal")
            return ConstantSource(self.constant, self.name)
        assert self._elements is not None
        return _choice(self._elements, self.dtype)


def plain_view(blocked: Tensor) -> Map:
    """The ``[N, C, *space]`` view of a tensor ``[N, C/B, *space, B]``."""
    lanes = blocked.shape[-1]

    def body(n: Expr, c: Expr, *at: Expr) -> Expr:
        return blocked[(n, tirx.floordiv(c, lanes), *at, tirx.floormod(c, lanes))]

    return Map(
        (blocked.shape[0], simplify(blocked.shape[1] * lanes), *blocked.shape[2:-1]), blocked.dtype, body, "plain"
    )


def _choice(elements: np.ndarray, dtype: str) -> Map:
    """A tensor that picks among expressions by its flat index."""
    flat = [e.astype(dtype) for e in elements.flat]
    shape = elements.shape

    def body(*at: Expr) -> Expr:
        position: Expr = tirx.const(0, "int64")
        for i, extent in zip(at, shape, strict=True):
            position = position * extent + i
        chosen = flat[-1]
        for number in range(len(flat) - 2, -1, -1):
            chosen = tirx.Select(position.equal(tirx.const(number, "int64")), flat[number], chosen)
        return chosen

    return Map(shape, dtype, body, "sizes")


def from_elements(elements: Any, dtype: str = "int64") -> Value:
    """A value from a nested list (or array) of ints and expressions."""
    array = np.array(elements, dtype=object)
    flat = [simplify(index(e)) for e in array.flat]
    return Value(elements=np.array([*flat, None], dtype=object)[:-1].reshape(array.shape), dtype=dtype)


def known_ints(value: Value | None, what: str) -> list[int] | None:
    """The elements of an integer input that must be compile-time constants (``None`` when the input is absent).

    Raises:
        NotLowered: The value depends on data at run time.
    """
    if value is None:
        return None
    if value.constant is None:
        raise NotLowered(f"{what} is not known at compile time")
    return [int(v) for v in value.constant.reshape(-1)]


def known_extents(value: Value, what: str) -> list[Expr]:
    """The elements of a 1-D integer input as size expressions.

    Raises:
        NotLowered: The value depends on data at run time.
    """
    if value.elements is None:
        raise NotLowered(f"{what} depends on data at run time")
    return list(value.elements.reshape(-1))


def static_shape(shape: Sequence[Expr], what: str) -> tuple[int, ...]:
    """``shape`` as integers.

    Raises:
        NotLowered: An extent is symbolic.
    """
    if not all(isinstance(d, tirx.IntImm) for d in shape):
        raise NotLowered(f"{what} has symbolic extents")
    return tuple(int(d.value) for d in shape)
