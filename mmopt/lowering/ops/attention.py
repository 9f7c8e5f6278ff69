"""Scaled dot-product attention."""

from __future__ import annotations

import math

import onnx_ir as ir
from tvm import tirx

from mmopt.backends.compute import Map, Tensor
from mmopt.backends.cpu.choosing import dim
from mmopt.backends.cpu.kernels.attention import Attention, Rules
from mmopt.backends.cpu.kernels.attention_blocking import Blocking, Problem
from mmopt.backends.cpu.kernels.attention_dot import DotAttention
from mmopt.backends.cpu.loops import i64, static
from mmopt.backends.expressions import itemsize, same, simplify
from mmopt.lowering.ops.attention_narrow import narrow_attention
from mmopt.lowering.ops.elementwise import accumulator
from mmopt.lowering.ops.movement import joined
from mmopt.lowering.registry import OpNode, lowers
from mmopt.lowering.values import NotLowered, Value

FLOATS = ("float32", "float64", "float16", "bfloat16")


@lowers("Attention")
def attention(node: OpNode) -> list[Value]:
    """softmax(scale · Q·Kᵀ + mask)·V of every head, with the cache of keys and values extended where there is one.

    What the kernel does not cover is left to the standard's own definition: the scores as an output, windows, masks of
    integers, a softmax in another precision than the accumulator's.
    """
    _check(node)
    past = node.optional(4)
    heads, kv_heads = node.attr("q_num_heads", 0), node.attr("kv_num_heads", 0)
    q = _split(node, node.input(0), heads)
    k, v = _split(node, node.input(1), kv_heads), _split(node, node.input(2), kv_heads)
    if past is not None:
        k, v = _extended(node, past, k), _extended(node, node.optional(5), v)
    lengths = node.optional(6)
    _check_heads(q, k, v)
    offset = past.shape[2] if past is not None else None
    rules = Rules(_scale(node, q), node.attr("softcap", 0.0), bool(node.attr("is_causal", 0)), offset)
    if (templates := node.context.program.templates) is not None:
        order = _order(node)
        result = templates.attention(node, _narrowest(node) or (q, k, v), node.optional(3), lengths, rules, order)
        return [_heads_first(result) if order == "bshd" else result, k, v][: node.n_outputs]
    nest = _narrow(node, rules) or _template(
        node, q, k, v, rules, None if lengths is None else node.context.tensor(lengths)
    )
    result = Value(nest.output, name=node.name)
    if nest.order == "bshd":
        result = _heads_first(result)
    return [result, k, v][: node.n_outputs]


def _narrowest(node: OpNode) -> tuple[Value, Value, Value] | None:
    """The operands before they were widened, as ``[batch, heads, sequence, size]``, where they are all of one type."""
    narrow = [node.input(n).narrow for n in range(3)]
    heads = [node.attr("q_num_heads", 0)] + [node.attr("kv_num_heads", 0)] * 2
    made = [_split(node, value, count) for value, count in zip(narrow, heads, strict=True) if value is not None]
    if len(made) < 3 or len({value.dtype for value in made}) > 1 or node.optional(4) is not None:
        return None
    return made[0], made[1], made[2]


def _narrow(node: OpNode, rules: Rules) -> DotAttention | None:
    """The template for operands widened from bfloat16, where nothing but the scores is asked for."""
    narrow = [node.input(n).narrow for n in range(3)]
    if any(node.optional(n) is not None for n in range(4, 7)) or rules.causal or rules.softcap:
        return None
    heads = [node.attr("q_num_heads", 0)] + [node.attr("kv_num_heads", 0)] * 2
    operands = [_split(node, value, count) for value, count in zip(narrow, heads, strict=True) if value is not None]
    if len(operands) < 3:
        return None
    return narrow_attention(node, operands, rules.scale, _order(node), _mask(node, node.optional(3)))


def _check(node: OpNode) -> None:
    for position, what in ((3, "the scores as an output"),):
        outputs = node.node.outputs
        if position < len(outputs) and (outputs[position].uses() or outputs[position].is_graph_output()):
            raise NotLowered(what)
    if max(node.attr("left_window_size", -1), node.attr("right_window_size", -1)) >= 0:
        raise NotLowered("attention in a window")
    operands = [node.input(n) for n in range(3)]
    dtype = operands[0].dtype
    if dtype not in FLOATS or any(o.dtype != dtype for o in operands):
        raise NotLowered("attention between different element types")
    precision = node.attr("softmax_precision")
    if precision == ir.DataType.DOUBLE and dtype != "float64":
        raise NotLowered("a softmax more precise than its operands")
    mask = node.optional(3)
    if mask is not None and mask.dtype != "bool" and mask.dtype not in FLOATS:
        raise NotLowered(f"an attention mask of {mask.dtype}")


def _check_heads(q: Value, k: Value, v: Value) -> None:
    known = [static(e) for e in (q.shape[1], k.shape[1], q.shape[3], v.shape[3])]
    if not all(known) or known[0] % known[1]:  # type: ignore[operator]
        raise NotLowered("the number of heads or their size is not known")
    if not same(k.shape[1], v.shape[1]) or static(k.shape[3]) != known[2]:
        raise NotLowered("queries, keys and values have different heads")


def _scale(node: OpNode, q: Value) -> float:
    scale = node.attr("scale")
    size = static(q.shape[3]) or 1
    return 1 / math.sqrt(size) if scale is None else float(scale)


def _split(node: OpNode, value: Value, heads: int) -> Value:
    """An operand as ``[batch, heads, sequence, size]``: a view."""
    tensor = node.context.tensor(value)
    if value.ndim == 4:
        return value
    if value.ndim != 3 or not heads:
        raise NotLowered("attention on operands without heads")
    batch, steps, width = value.shape
    size = simplify(tirx.floordiv(width, i64(heads)))
    shape = (batch, i64(heads), steps, size)
    return Value(Map(shape, value.dtype, lambda b, h, s, d: tensor[b, s, h * size + d], "heads"), name=value.name)


def _heads_first(value: Value) -> Value:
    """The ``[batch, heads, sequence, size]`` view of a result with the sequence first."""
    tensor = value.tensor
    batch, steps, heads, size = value.shape
    body = lambda b, h, s, d: tensor[b, s, h, d]  # noqa: E731
    return Value(Map((batch, heads, steps, size), value.dtype, body, "heads_first"), name=value.name)


def _extended(node: OpNode, past: Value | None, new: Value) -> Value:
    """Past and new keys (or values) one after another, in memory."""
    if past is None:
        raise NotLowered("past keys without past values")
    whole = joined(node, [past, new], 2)
    node.context.realize([whole], "cache")
    return whole


def _template(node: OpNode, q: Value, k: Value, v: Value, rules: Rules, lengths: Tensor | None) -> Attention:
    context = node.context
    profile, chooser = context.program.profile, context.program.chooser
    mask = _mask(node, node.optional(3))
    wide = accumulator(q.dtype)
    problem = _problem(q, k, v, mask, rules, wide)
    lanes = profile.vector_bytes // itemsize(wide)
    workload = problem.workload()
    nest = Attention(
        context.tensor(q),
        context.tensor(k),
        context.tensor(v),
        mask=mask,
        lengths=lengths,
        rules=rules,
        blocking=Blocking.of(chooser.choose(workload, problem.candidates(profile))),
        few=problem.few(lanes) if problem.rows is None else None,
        lanes=lanes,
        accumulator=wide,
        order=_order(node),
    )
    nest.workload = workload
    return nest


def _problem(q: Value, k: Value, v: Value, mask: Tensor | None, rules: Rules, wide: str) -> Problem:
    heads, kv_heads = static(q.shape[1]) or 1, static(k.shape[1]) or 1
    kind = "none" if mask is None else "row" if static(mask.shape[2]) == 1 else "full"
    return Problem(
        dim(q.shape[0]),
        kv_heads,
        heads // kv_heads,
        dim(q.shape[2]),
        dim(k.shape[2]),
        static(q.shape[3]) or 1,
        static(v.shape[3]) or 1,
        wide,
        q.dtype,
        kind,
        rules.causal,
    )


def _mask(node: OpNode, mask: Value | None) -> Tensor | None:
    """The mask with four axes."""
    if mask is None:
        return None
    tensor, missing = node.context.tensor(mask), 4 - mask.ndim
    if not missing:
        return tensor
    shape = (*[i64(1)] * missing, *mask.shape)
    return Map(shape, mask.dtype, lambda *at: tensor[tuple(at[missing:])] if mask.ndim else tensor[()], "mask")


def _order(node: OpNode) -> str:
    """Axes of the result: those a transposition that follows in the same kernel asks for, else the operator's own."""
    if node.input(0).ndim == 3:
        return "bsm"
    users = [user for user, _ in node.node.outputs[0].uses()]
    if len(users) == 1 and users[0].op_type == "Transpose" and not node.node.outputs[0].is_graph_output():
        permutation = users[0].attributes.get("perm")
        if permutation is not None and list(permutation.as_ints()) == [0, 2, 1, 3] and node.context.lazy:
            return "bshd"
    return "bhsd"
