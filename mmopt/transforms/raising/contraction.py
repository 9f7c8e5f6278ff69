"""Products of two tensors, written as MatMul or as Einsum, with a role for every axis."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from mmopt.analysis.dims import Size
from mmopt.transforms.canonicalize.editing import is_onnx
from mmopt.transforms.canonicalize.rewriting import Rewriter
from mmopt.transforms.raising.layout import Atom, Group, Layout


@dataclasses.dataclass(frozen=True)
class Contraction:
    """``result[lead, row, column] = Σ_depth left[lead, row, depth] · right[lead, depth, column]``, axes in any order.

    Attributes:
        node: The product.
        left: First factor.
        right: Second factor.
        left_layout: Its axes: ``lead``, ``row`` and ``depth``.
        right_layout: Its axes: ``lead``, ``depth`` and ``column``.
        layout: Axes of the result.
    """

    node: ir.Node
    left: ir.Value
    right: ir.Value
    left_layout: Layout
    right_layout: Layout
    layout: Layout

    def turned(self) -> Contraction:
        """The same product with its factors exchanged."""
        left, right = exchanged(self.right_layout), exchanged(self.left_layout)
        return Contraction(self.node, self.right, self.left, left, right, exchanged(self.layout))


def exchanged(layout: Layout) -> Layout:
    """``layout`` with rows called columns and columns rows."""
    swap = {"row": "column", "column": "row"}
    groups = [[dataclasses.replace(a, role=swap.get(a.role, a.role)) for a in g] for g in layout.groups]
    return dataclasses.replace(layout, groups=tuple(tuple(group) for group in groups))


def contraction(
    node: ir.Node | None, rewriter: Rewriter, known: Mapping[ir.Value, Sequence[Size]] | None = None
) -> Contraction | str:
    """``node`` as a contraction, or why it is none; "" when it is another operator.

    Args:
        node: The node.
        rewriter: What is at work.
        known: Shapes of factors that are known better than by inference.
    """
    if node is None or not is_onnx(node, "MatMul", "Einsum") or len(node.inputs) != 2:
        return ""
    left, right = node.inputs
    if left is None or right is None:
        return ""
    better = known or {}
    shapes = better.get(left, rewriter.shape(left)), better.get(right, rewriter.shape(right))
    if shapes[0] is None or shapes[1] is None:
        return f"the shapes of the factors of {node.name} are unknown"
    labels = _matmul_labels(len(shapes[0]), len(shapes[1])) if node.op_type == "MatMul" else _einsum_labels(node)
    if labels is None or len(labels[0]) != len(shapes[0]) or len(labels[1]) != len(shapes[1]):
        return f"{node.name} is no product of two batches of matrices"
    return _labelled(node, (left, right), labels, (shapes[0], shapes[1]))


def _matmul_labels(left: int, right: int) -> tuple[str, str, str] | None:
    if left < 2 or right < 2 or max(left, right) > 10:
        return None
    lead = "abcdefgh"[: max(left, right) - 2]
    skip = len(lead)
    return f"{lead[skip - left + 2 :]}ik", f"{lead[skip - right + 2 :]}kj", f"{lead}ij"


def _einsum_labels(node: ir.Node) -> tuple[str, str, str] | None:
    attribute = node.attributes.get("equation")
    if attribute is None or attribute.is_ref():
        return None
    text = attribute.as_string().replace(" ", "")
    if "." in text or "->" not in text or text.count(",") != 1:
        return None
    terms, result = text.split("->")
    left, right = terms.split(",")
    if any(len(set(term)) != len(term) for term in (left, right, result)) or set(result) - set(left) - set(right):
        return None
    return left, right, result


def _roles(left: str, right: str, result: str) -> dict[str, str] | None:
    """A role for every letter; ``None`` where rows, columns or depth are not exactly one axis each."""
    roles: dict[str, str] = {}
    for letter in dict.fromkeys(left + right):
        if letter in left and letter in right:
            roles[letter] = "lead" if letter in result else "depth"
        elif letter not in result:
            return None
        else:
            roles[letter] = "row" if letter in left else "column"
    counts = [list(roles.values()).count(role) for role in ("row", "column", "depth")]
    return roles if counts == [1, 1, 1] else None


def _labelled(
    node: ir.Node,
    factors: tuple[ir.Value, ir.Value],
    labels: tuple[str, str, str],
    shapes: tuple[Sequence[Size | None], Sequence[Size | None]],
) -> Contraction | str:
    left, right, result = labels
    roles = _broadcast_roles(node, labels)
    if roles is None:
        return f"{node.name} is no product of two batches of matrices"
    sizes: dict[str, Size] = {}
    for label, shape in ((left, shapes[0]), (right, shapes[1])):
        for letter, size in zip(label, shape, strict=True):
            if size is None:
                return f"a size of a factor of {node.name} is unknown"
            if sizes.get(letter, 1) == 1:
                sizes[letter] = size
            elif size not in (1, sizes[letter]):
                return f"sizes {size} and {sizes[letter]} of the factors of {node.name} may differ"
    number = {letter: n for n, letter in enumerate(letter for letter in result if roles[letter] == "lead")}

    def group(letter: str) -> Group:
        size = sizes[letter]
        return () if size == 1 else (Atom(roles[letter], (number.get(letter, 0),), size),)

    def layout(label: str, shape: Sequence[Size | None]) -> Layout:
        groups = tuple(() if size == 1 else group(letter) for letter, size in zip(label, shape, strict=True))
        present = {atom for one in groups for atom in one}
        everywhere = [atom for letter in number for atom in group(letter)]
        return Layout(groups, tuple(atom for atom in everywhere if atom not in present))

    whole = Layout(tuple(group(letter) for letter in result))
    return Contraction(node, *factors, layout(left, shapes[0]), layout(right, shapes[1]), whole)


def _broadcast_roles(node: ir.Node, labels: tuple[str, str, str]) -> dict[str, str] | None:
    """In a MatMul the leading axes that only one factor has are leading axes all the same: the other is broadcast."""
    left, right, result = labels
    if node.op_type == "Einsum":
        return _roles(left, right, result)
    return {**dict.fromkeys(result[:-2], "lead"), "i": "row", "j": "column", "k": "depth"}
