"""Joins transposes that follow each other: ``Transpose_q(Transpose_p(x)) = Transpose_r(x)`` with ``r[i] = p[q[i]]``.

    Transpose<0, 2, 1>(Transpose<0, 2, 1>(x))  →  x
    Transpose<1, 0, 2>(Transpose<0, 2, 1>(x))  →  Transpose<2, 0, 1>(x)

The first one stays where something else reads it.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from mmopt.transforms.canonicalize.editing import is_onnx
from mmopt.transforms.canonicalize.rewriting import Rewriter, Rule, RulePass


def permutation(node: ir.Node, rewriter: Rewriter) -> list[int] | None:
    """Permutation of a Transpose; reversed axes where it has none. ``None`` when unknown."""
    perm = node.attributes.get("perm")
    if perm is not None:
        return None if perm.is_ref() else list(perm.as_ints())
    shape = rewriter.shape(node.inputs[0])
    return None if shape is None else list(range(len(shape) - 1, -1, -1))


def _compose(node: ir.Node, rewriter: Rewriter) -> bool:
    inner = node.inputs[0].producer() if node.inputs[0] is not None else None
    if inner is None or not is_onnx(inner, "Transpose") or inner.inputs[0] is None:
        return False
    first, second = permutation(inner, rewriter), permutation(node, rewriter)
    if first is None or second is None or len(first) != len(second):
        return False
    perm = [first[i] for i in second]
    source = inner.inputs[0]
    if perm == list(range(len(perm))):
        return rewriter.replace(node, source)
    joined = rewriter.emit("Transpose", [source], node, like=node.outputs[0], attributes=[ir.AttrInt64s("perm", perm)])
    return rewriter.replace(node, joined.outputs[0])


RULES = (Rule("compose-transposes", ("Transpose",), _compose),)


@dataclasses.dataclass(frozen=True)
class ComposeTransposes(RulePass):
    """Joins adjacent transposes into one, or into none when they cancel."""

    def rules(self) -> tuple[Rule, ...]:
        """The rules of this module."""
        return RULES
