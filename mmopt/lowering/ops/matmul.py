"""MatMul and Gemm."""

from __future__ import annotations

import math

import numpy as np
from tvm import tirx
from tvm.ir import Expr

from mmopt.backends.compute import SUM, Map, Reduction, Source, index
from mmopt.backends.cpu.choosing import Workload, dim, typical
from mmopt.backends.cpu.kernels.matmul import Matmul, pack_panels
from mmopt.backends.cpu.kernels.matmul_blocking import choose_blocking
from mmopt.backends.cpu.loops import product, static
from mmopt.backends.cpu.plan import trace
from mmopt.backends.expressions import same, simplify, strides
from mmopt.lowering.ops.elementwise import broadcast_shape, elementwise, read
from mmopt.lowering.ops.products import narrow_product, transposed_origin
from mmopt.lowering.registry import OpNode, lowers
from mmopt.lowering.values import Value

_TEMPLATE_DTYPES = ("float32", "float64")


@lowers("MatMul")
def matmul(node: OpNode) -> Value:
    """numpy.matmul: stacks of matrices broadcast, vectors are promoted and dropped again."""
    return product_of(node, node.input(0), node.input(1))


def product_of(node: OpNode, a: Value, b: Value) -> Value:
    """``a @ b`` for any ranks."""
    context = node.context
    if a.ndim == 1 or b.ndim == 1:
        left = context.reshape(a, (1, *a.shape)) if a.ndim == 1 else a
        right = context.reshape(b, (*b.shape, 1)) if b.ndim == 1 else b
        full = product_of(node, left, right)
        rows = [] if a.ndim == 1 else [full.shape[-2]]
        columns = [] if b.ndim == 1 else [full.shape[-1]]
        return context.reshape(full, [*full.shape[:-2], *rows, *columns])
    if (templates := context.program.templates) is not None:
        return templates.product(node, a, b)
    if (narrow := narrow_product(node, a, b)) is not None:
        return narrow
    if a.dtype not in _TEMPLATE_DTYPES:
        return plain_product(node, a, b)
    if b.constant is not None and b.ndim == 2 and static(b.shape[1]):
        return packed_product(node, a, b, b.constant)
    if any(static(d) == 0 for d in (*a.shape, *b.shape)):
        return plain_product(node, a, b)
    stored = [value for value in (a, b) if not _is_view(value, rows=value is a)]
    context.realize(stored, "operand")
    batch = broadcast_shape([a.shape[:-2], b.shape[:-2]]) if a.ndim > 2 or b.ndim > 2 else ()
    rows, depth, columns = a.shape[-2], a.shape[-1], b.shape[-1]
    workload = _workload("in-place" if b in stored else "view", a.dtype, product(batch), rows, columns, depth)
    blocking = choose_blocking(context.program.profile, context.program.chooser, workload)
    x, y = (context.tensor(value) for value in (a, b))
    nest = Matmul(x, y, batch=batch, rows=rows, columns=columns, depth=depth, blocking=blocking, panels=False)
    nest.workload = workload
    return Value(nest.output, name=node.name)


def _is_view(value: Value, *, rows: bool) -> bool:
    """Whether an operand that is not in memory can be read where its elements are.

    Args:
        value: The operand.
        rows: Whether it is the left one, which is read along its last axis again and again; the right one is copied.
    """
    if not value.pending or value.blocked is not None or not isinstance(value.tensor, Map):
        return False
    inside = trace(value.tensor, stops=set())
    if len(inside.reads) != 1 or inside.values[0] is not inside.reads[0].leaf:
        return False
    read = inside.reads[0]
    steps = strides(read.offset, inside.axes)
    if not isinstance(read.tensor, Source) or any(step is None for step in steps):
        return False
    return not rows or same(steps[-1], index(1))


def packed_product(node: OpNode, a: Value, b: Value, weight: np.ndarray, key: str = "") -> Value:
    """``a @ weight`` with the weight packed at compile time.

    Args:
        node: The node being lowered.
        a: ``[..., K]``.
        b: The constant the weight comes from, for sharing.
        weight: ``[K, N]``.
        key: Names how ``weight`` was made from ``b``.
    """
    context = node.context
    if (templates := context.program.templates) is not None:
        plain = context.program.packed(b, ("plain", key), lambda _: weight).data
        return templates.product(node, a, b if weight is b.constant else Value(constant=plain, name=b.name))
    if 0 in weight.shape or any(static(d) == 0 for d in a.shape):
        return plain_product(node, a, Value(constant=weight))
    rows = simplify(product(a.shape[:-1]))
    flat = context.reshape(a, (rows, a.shape[-1]))
    context.realize([flat], "operand")
    workload = _workload("packed", a.dtype, index(1), rows, index(weight.shape[1]), index(weight.shape[0]))
    blocking = choose_blocking(context.program.profile, context.program.chooser, workload)
    width = blocking.tile.columns
    same_data = weight is b.constant  # what the constant was dequantized from can be packed alike
    panels = context.program.packed(
        b, ("panels", key, width), lambda data: pack_panels(data if same_data else weight, width)
    )
    nest = Matmul(
        context.tensor(flat),
        panels,
        batch=(),
        rows=rows,
        columns=index(weight.shape[1]),
        depth=index(weight.shape[0]),
        blocking=blocking,
        panels=True,
        shape=(*a.shape[:-1], index(weight.shape[1])),
    )
    nest.workload = workload
    return Value(nest.output, name=node.name)


def _workload(b: str, dtype: str, batch: Expr, rows: Expr, columns: Expr, depth: Expr) -> Workload:
    """What the template has to do, where ``b`` is packed, read in place, or a view."""
    dims = {"batch": dim(simplify(batch)), "m": dim(rows), "n": dim(columns), "k": dim(depth)}
    operations = 2.0 * math.prod(typical(extent) for extent in dims.values())
    return Workload("matmul", (*dims.items(), ("b", b)), (dtype,), operations)


def plain_product(node: OpNode, a: Value, b: Value) -> Value:
    """Any dtype, by a generic reduction."""
    batch = broadcast_shape([a.shape[:-2], b.shape[:-2]]) if a.ndim > 2 or b.ndim > 2 else ()
    shape = (*batch, a.shape[-2], b.shape[-1])
    wide = "float32" if a.dtype in ("float16", "bfloat16") else a.dtype
    left, right = context_tensors(node, a, b)

    def body(*at: object) -> object:
        *outer, i, j, k = at
        x = read(left, (*outer, i, k), (*batch, a.shape[-2], a.shape[-1]))
        y = read(right, (*outer, k, j), (*batch, a.shape[-1], b.shape[-1]))
        return x.astype(wide) * y.astype(wide)

    total = Reduction(shape, (a.shape[-1],), (wide,), body, SUM, name="matmul")
    narrow = total if wide == a.dtype else Map(shape, a.dtype, lambda *at: total[at].astype(a.dtype))
    return Value(narrow, name=node.name)


def context_tensors(node: OpNode, a: Value, b: Value) -> tuple[Value, Value]:
    """Both operands, read from memory where they have been realized."""
    node.context.tensor(a)
    node.context.tensor(b)
    return a, b


@lowers("Gemm")
def gemm(node: OpNode) -> Value:
    """alpha · A' · B' + beta · C."""
    a, b, c = node.input(0), node.input(1), node.optional(2)
    alpha, beta = node.attr("alpha", 1.0), node.attr("beta", 1.0)
    if node.attr("transA", 0):
        a = transposed(node, a)
    if b.constant is not None and a.dtype in _TEMPLATE_DTYPES:
        weight = b.constant.T if node.attr("transB", 0) else b.constant
        result = packed_product(node, a, b, weight, key="T" if node.attr("transB", 0) else "")
    else:
        result = product_of(node, a, transposed(node, b) if node.attr("transB", 0) else b)
    if alpha != 1.0:
        result = elementwise(node, [result], lambda x: x * tirx.const(alpha, str(x.ty)))
    if c is None or beta == 0.0:
        return result
    if beta == 1.0:
        return elementwise(node, [result, c], lambda x, y: x + y)
    return elementwise(node, [result, c], lambda x, y: x + y * tirx.const(beta, str(y.ty)))


def transposed(node: OpNode, value: Value) -> Value:
    """A matrix with its axes exchanged."""
    if value.constant is not None:
        return Value(constant=np.ascontiguousarray(value.constant.T), name=value.name)
    tensor = node.context.tensor(value)
    made = Value(Map((value.shape[1], value.shape[0]), value.dtype, lambda i, j: tensor[j, i], "transpose"))
    transposed_origin(value, made, (1, 0))
    return made
