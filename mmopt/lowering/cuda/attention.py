"""Attention on tensor cores: which, in which numbers."""

from __future__ import annotations

from tvm.ir import Expr

from mmopt.backends.compute import Map
from mmopt.backends.cpu.choosing import Workload, dim
from mmopt.backends.cpu.kernels.attention import Rules
from mmopt.backends.cpu.loops import i64, static
from mmopt.backends.cuda.kernels.attention import MASKS, Heads, TensorAttention, cut_candidates, cut_of, repeated
from mmopt.backends.cuda.kernels.operand import Operand
from mmopt.backends.cuda.kernels.product import OLDEST
from mmopt.lowering.cuda.operands import stored_operand
from mmopt.lowering.cuda.tiles import workload_of
from mmopt.lowering.registry import OpNode
from mmopt.lowering.values import NotLowered, Value


def tensor_attention(
    node: OpNode, operands: tuple[Value, Value, Value], mask: Value | None, rules: Rules, order: str
) -> Value:
    """Attention by one kernel.

    Args:
        node: The node being lowered.
        operands: Queries, keys, values: ``[batch, heads, sequence, size]``, all of one type.
        mask: Up to four axes.
        rules: Scale, causal or not.
        order: Axes of the result.

    Returns:
        The result, of the operands' type.

    Raises:
        NotLowered: The standard's definition has to do.
    """
    q, k, v = operands
    if rules.softcap or node.context.program.profile.sm < OLDEST.get(q.dtype, 1000):
        raise NotLowered("there is no attention template for it")
    heads = Heads(
        q.shape[0],
        static(q.shape[1]) or 1,
        static(k.shape[1]) or 1,
        q.shape[2],
        k.shape[2],
        static(q.shape[3]) or 1,
        static(v.shape[3]) or 1,
    )
    if cut_of(heads, q.dtype) is None:
        raise NotLowered("heads are too large for the attention template")
    program = node.context.program
    workload = _workload(heads, q.dtype, mask, rules)
    offered = cut_candidates(heads, q.dtype, program.profile)
    best = program.chooser.choose(workload, [candidate for candidate, _ in offered])
    nest = TensorAttention(
        *(stored_operand(node, value) for value in operands),
        mask=None if mask is None else _mask(node, mask),
        heads=heads,
        cut=next(cut for candidate, cut in offered if candidate is best),
        scale=rules.scale,
        reach=_reach(rules),
        order=order,
    )
    nest.workload = workload
    total, dtype = nest.output, q.dtype
    if dtype == "float32":
        return Value(total, name=node.name)
    return Value(Map(total.shape, dtype, lambda *at: total[at].astype(dtype), "narrow"), name=node.name)


def _workload(heads: Heads, dtype: str, mask: Value | None, rules: Rules) -> Workload:
    dims: dict[str, int | str] = {
        "batch": dim(heads.batch),
        "heads": heads.heads,
        "kv_heads": heads.kv_heads,
        "queries": dim(heads.queries),
        "keys": dim(heads.keys),
        "size": heads.size,
        "values": heads.values,
        "mask": "none" if mask is None else mask.dtype,
        "causal": "yes" if rules.causal else "no",
    }
    sizes = dims["batch"], heads.heads, dims["queries"], dims["keys"], heads.size + heads.values
    return workload_of("tensor_attention", dims, (dtype,), sizes)


def _reach(rules: Rules) -> Expr | None:
    if not rules.causal:
        return None
    return i64(0) if rules.offset is None else rules.offset


def _mask(node: OpNode, mask: Value) -> Operand:
    if mask.dtype not in MASKS:
        raise NotLowered(f"an attention mask of {mask.dtype}")
    missing = 4 - mask.ndim
    operand = stored_operand(node, mask)
    shape = (*[i64(1)] * missing, *mask.shape)
    return repeated(Operand(operand.source, operand.start, (*[i64(0)] * missing, *operand.strides)), shape)
