"""Attention of operands that were widened from bfloat16."""

from __future__ import annotations

from collections.abc import Sequence

from mmopt.backends.compute import Tensor
from mmopt.backends.cpu.choosing import Candidate, Workload, dim, typical
from mmopt.backends.cpu.dot import dot_for
from mmopt.backends.cpu.kernels.attention_dot import DotAttention
from mmopt.backends.cpu.kernels.attention_dot_task import PANEL
from mmopt.backends.cpu.loops import static
from mmopt.lowering.registry import OpNode
from mmopt.lowering.values import Value

BLOCKS = (96, 192, 64)
"""Keys of a block, multiples of a panel, best guess first.

What a tile of rows needs for 96 keys stays in the first-level cache, and their exponentials take less than 0.6 µs:
after that time without work AMX goes to sleep, and takes 0.3 µs to wake up (measured on Sapphire Rapids).
"""

SCORE_CYCLES = 0.75
"""What a score takes besides its two products, at half of the peak: maximum, exponential, sum."""


def narrow_attention(
    node: OpNode, operands: Sequence[Value], scale: float, order: str, mask: Tensor | None = None
) -> DotAttention | None:
    """Attention computed in bfloat16.

    Args:
        node: The node being lowered.
        operands: Q, K and V as ``[batch, heads, sequence, size]``, bfloat16.
        scale: Factor of the scores.
        order: Axes of the result.
        mask: Of four axes, if any.

    Returns:
        ``None`` when there is no kernel: symbolic lengths, sizes that do not fill panels, a mask that ends before the
        keys do or is of another type, or no instruction.
    """
    context = node.context
    q, k, v = operands
    dot = dot_for(context.program.profile, "bfloat16", "bfloat16")
    sizes = [static(d) for d in (*q.shape[1:], *k.shape[2:], v.shape[3])]
    if dot is None or dot.a != "bfloat16" or any(value.dtype != "bfloat16" for value in operands) or scale <= 0:
        return None
    if None in sizes:
        return None
    heads, queries, size, keys, _, value_size = (s or 0 for s in sizes)
    if queries < dot.most_rows[1] or keys < PANEL or size % PANEL or value_size % PANEL:
        return None
    if mask is not None and (mask.dtype not in ("bool", "float32") or static(mask.shape[3]) != keys):
        return None
    if mask is not None and static(mask.shape[2]) not in (1, queries):
        return None
    batch = dim(q.shape[0])
    dims = {"batch": batch, "heads": heads, "queries": queries, "keys": keys, "size": size, "value_size": value_size}
    dims |= {} if mask is None else {"mask": 1}
    scores = typical(batch, 1) * heads * queries * keys
    workload = Workload(
        "attention_bf16",
        tuple(dims.items()),
        ("bfloat16", "bfloat16", "float32"),
        2.0 * scores * (size + value_size),
    )
    cycles = scores * (SCORE_CYCLES + 2 * (size + value_size) / dot.rate)
    options = [Candidate({"keys": block}, cycles) for block in BLOCKS]
    best = context.program.chooser.choose(workload, options)
    tensors = [context.tensor(value) for value in operands]
    block = best.number("keys")
    return DotAttention(*tensors, scale=scale, dot=dot, keys=block, order=order, workload=workload, mask=mask)
