"""Operators that make tensors from sizes and a few numbers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from tvm import tirx
from tvm.ir import Expr

from mmopt.backends.compute import Map
from mmopt.backends.expressions import simplify
from mmopt.lowering.ops.casting import cast_expr
from mmopt.lowering.ops.elementwise import is_float
from mmopt.lowering.ops.extents import choose, i64, integers, known, named, scalar, settled
from mmopt.lowering.registry import OpNode, lowers
from mmopt.lowering.values import MAX_ELEMENTS, Value, dtype_name, from_elements


@lowers("Range")
def range_(node: OpNode) -> Value:
    """``start``, ``start + delta``, … below ``limit``."""
    start, limit, delta = (scalar(node, node.input(n)) for n in range(3))
    if all(v.constant is not None for v in (start, limit, delta)):
        numbers = [v.constant.reshape(-1)[0] for v in (start, limit, delta)]  # type: ignore[union-attr]
        count = max(0, int(np.ceil((float(numbers[1]) - float(numbers[0])) / float(numbers[2]))))
        return node.context.constant((numbers[0] + np.arange(count) * numbers[2]).astype(start.dtype))
    if not is_float(start.dtype) and all(v.elements is not None for v in (start, limit, delta)):
        return _followed_range(node, start, limit, delta)
    for value in (start, limit, delta):
        node.context.tensor(value)

    def count_of(_: Expr) -> Expr:
        a, b, d = (v.tensor[()].astype("float64") for v in (start, limit, delta))
        return tirx.max(tirx.ceil((b - a) / d), tirx.const(0.0, "float64")).astype("int64")

    counted = Value(Map([1], "int64", count_of, "count"))
    extent = named(node, node.context.runtime_extents(counted, "range"), "range")
    wide = "float32" if start.dtype in ("float16", "bfloat16") else start.dtype

    def body(i: Expr) -> Expr:
        first, step = start.tensor[()].astype(wide), delta.tensor[()].astype(wide)
        return (first + i.astype(wide) * step).astype(start.dtype)

    return Value(Map(extent, start.dtype, body, "range"), name=node.name)


def _followed_range(node: OpNode, start: Value, limit: Value, delta: Value) -> Value:
    first, last, step = (v.elements.reshape(-1)[0] for v in (start, limit, delta))  # type: ignore[union-attr]
    stride = known(step)
    if stride is not None and stride != 0:
        distance = last - first if stride > 0 else first - last
        count = tirx.floordiv(distance + (abs(stride) - 1), i64(abs(stride)))
    else:
        safe = choose(tirx.EQ(step, i64(0)), 1, step)
        up, down = tirx.floordiv(last - first + safe - 1, safe), tirx.floordiv(first - last - safe - 1, -safe)
        count = tirx.Select(safe > i64(0), up, down)
    bare = simplify(count)
    extent = bare if known(first) == 0 and stride == 1 else simplify(tirx.max(bare, i64(0)))
    (extent,) = settled(node, [extent])
    size = known(extent)
    if size is not None and size <= MAX_ELEMENTS:
        return from_elements([first + n * step for n in range(size)], start.dtype)
    body = lambda i: (first + i * step).astype(start.dtype)  # noqa: E731
    return Value(Map([extent], start.dtype, body, "range"), name=node.name)


@lowers("EyeLike")
def eye_like(node: OpNode) -> Value:
    """Ones on a diagonal."""
    data, k = node.input(0), node.attr("k", 0)
    dtype = dtype_name(ir.DataType(node.attr("dtype"))) if node.attr("dtype") is not None else data.dtype
    body = lambda i, j: cast_expr(tirx.Select(tirx.EQ(j - i, i64(k)), i64(1), i64(0)), dtype)  # noqa: E731
    return Value(Map(data.shape, dtype, body, "eye"), name=node.name)


_WINDOWS: dict[str, tuple[float, float, float]] = {
    "HannWindow": (0.5, 0.5, 0.0),
    "HammingWindow": (25 / 46, 21 / 46, 0.0),
    "BlackmanWindow": (0.42, 0.5, 0.08),
}


@lowers(*_WINDOWS)
def window(node: OpNode) -> Value:
    """Cosine windows ``a0 - a1·cos(2πn/N) + a2·cos(4πn/N)``."""
    size = integers(node, node.input(0), "window")
    (extent,) = named(node, size.items, "window") if size.data else settled(node, size.items)
    dtype = dtype_name(ir.DataType(node.attr("output_datatype", int(ir.DataType.FLOAT))))
    steps = extent if node.attr("periodic", 1) else extent - 1
    a0, a1, a2 = _WINDOWS[node.op_type]

    def body(n: Expr) -> Expr:
        angle = n.astype("float64") * tirx.const(2 * np.pi, "float64") / tirx.max(steps, i64(1)).astype("float64")
        value = tirx.const(a0, "float64") - tirx.const(a1, "float64") * tirx.cos(angle)
        return cast_expr(value + tirx.const(a2, "float64") * tirx.cos(angle * tirx.const(2.0, "float64")), dtype)

    return Value(Map([extent], dtype, body, "window"), name=node.name)
