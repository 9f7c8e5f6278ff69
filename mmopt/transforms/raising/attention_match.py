"""Recognises attention by its structure: a softmax between two products, and what an exporter puts around it.

    softmax(cap · tanh(scale · Q Kᵀ / cap) + mask) V

From the softmax the scores are followed back to the first product, and its result forward to the second. The order of
operators, where the scale stands, and how often a tensor is reshaped on the way do not matter.
"""

from __future__ import annotations

import dataclasses
import math

import onnx_ir as ir

from mmopt.transforms.canonicalize.editing import is_onnx, tensor_of
from mmopt.transforms.canonicalize.rewriting import Rewriter
from mmopt.transforms.raising.building import sole_user, uniform
from mmopt.transforms.raising.contraction import Contraction, contraction, exchanged
from mmopt.transforms.raising.layout import Group, Layout, extent, regroup, scaling

_MAX_CHAIN = 24
_SHAPES = ("Identity", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze")
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


@dataclasses.dataclass(frozen=True)
class Term:
    """One part of the mask.

    Attributes:
        value: A float tensor that is added, or a boolean one that chooses.
        layout: Axes of the scores where it is applied; those of ``value`` are the last ones.
        factor: What an added tensor is multiplied by.
        fill: What scores become where they are masked; None for an added tensor.
        keep: What a boolean tensor says where scores are kept.
    """

    value: ir.Value
    layout: Layout
    factor: float = 1.0
    fill: float | None = None
    keep: bool = True


@dataclasses.dataclass
class Match:
    """Attention that was found.

    Attributes:
        scores: Product of queries (left) and keys (right).
        mixed: Product of weights (left) and values (right).
        layout: Axes of the scores as the softmax reads them.
        scale: Factor of the scores, without those on the way to the factors of their product.
        softcap: Bound of the scores, 0 for none.
        terms: Parts of the mask.
        softmax_dtype: In which type the softmax is taken.
    """

    scores: Contraction
    mixed: Contraction
    layout: Layout
    scale: float
    softcap: float
    terms: list[Term]
    softmax_dtype: ir.DataType | None


def match_attention(softmax: ir.Node, rewriter: Rewriter) -> Match | str:
    """The attention around ``softmax``; else the reason why there is none, or "" where nothing looks like it."""
    path = _path(softmax.inputs[0], rewriter)
    weights = _weights(softmax)
    if path is None or isinstance(weights, str):
        if path is not None and isinstance(weights, str):
            return weights
        return "no product of queries and keys leads to this softmax" if isinstance(weights, _Weights) else ""
    chain = _Chain(rewriter)
    reason = chain.follow(path)
    if reason:
        return reason
    axis = softmax.attributes["axis"].as_int() if "axis" in softmax.attributes else -1
    if chain.layout is None or chain.scores is None:
        return "the axes of the scores cannot be followed"
    if _is_whole(chain.layout, axis, "row") and not _is_whole(chain.layout, axis, "column"):
        chain.turn()  # the keys stand left of the queries
    layout = chain.layout
    if not _is_whole(layout, axis, "column"):
        return "the softmax is not taken over one axis of its own"
    mixed = _mixed(weights, layout, rewriter)
    if isinstance(mixed, str):
        return mixed
    return Match(chain.scores, mixed, layout, chain.scale, chain.cap, chain.terms, rewriter.dtype(softmax.inputs[0]))


def _is_whole(layout: Layout, axis: int, role: str) -> bool:
    """Whether an axis carries all atoms of ``role`` and nothing else."""
    return layout.groups[axis] == tuple(atom for atom in layout.order if atom.role == role)


# -- from the softmax forward --------------------------------------------------------------------------------------

_AS_WEIGHTS = {"lead": "lead", "row": "row", "column": "depth"}


@dataclasses.dataclass(frozen=True)
class _Weights:
    """Where the attention weights go.

    Attributes:
        product: The product with the values.
        factor: The weights as it reads them.
        nodes: What moves their elements on the way.
    """

    product: ir.Node
    factor: ir.Value
    nodes: tuple[ir.Node, ...]


def _weights(softmax: ir.Node) -> _Weights | str:
    """Follow the attention weights to a product; else why not, or "" where nothing looks like attention."""
    value = softmax.outputs[0]
    nodes: list[ir.Node] = []
    for _ in range(_MAX_CHAIN):
        user = sole_user(value) or _nan_guard(value)
        if user is None:
            return "the attention weights are needed elsewhere too" if _feeds_product(value) else ""
        if is_onnx(user, "MatMul", "Einsum"):
            return _Weights(user, value, tuple(nodes)) if list(user.inputs).count(value) == 1 else ""
        if is_onnx(user, *_SHAPES):
            nodes.append(user)
        elif not (is_onnx(user, "Cast") or (is_onnx(user, "Where") and _is_guard(user, value))):
            return ""
        value = user.outputs[0]
    return ""


def _mixed(weights: _Weights, layout: Layout, rewriter: Rewriter) -> Contraction | str:
    """The product with the values, where it sums over the keys; else why not."""
    for node in weights.nodes:
        moved = forward(node, layout, rewriter)
        if moved is None:
            return f"{node.op_type} {node.name} between softmax and values mixes axes"
        layout = moved
    known = {weights.factor: [extent(group) for group in layout.groups]}
    found = contraction(weights.product, rewriter, known)
    if isinstance(found, str):
        return found
    found = found if found.left is weights.factor else found.turned()
    if found.left_layout.repeated:
        return "the attention weights are broadcast over batches of values"
    for have, want in zip(layout.groups, found.left_layout.groups, strict=True):
        if {_AS_WEIGHTS[atom.role] for atom in have} != {atom.role for atom in want}:
            return "the product with the values does not sum over the keys"
    lead = [atom.path for atom in layout.order if atom.role == "lead"]
    return found if lead == sorted(lead) else "batch and heads change places between softmax and values"


def _nan_guard(value: ir.Value) -> ir.Node | None:
    """The Where of ``Where(IsNaN(p), 0, p)``, which gives rows without any key the weight 0."""
    users = {user for user, _ in value.uses()}
    tests = [user for user in users if is_onnx(user, "IsNaN")]
    if len(users) != 2 or len(tests) != 1 or value.is_graph_output():
        return None
    other = (users - set(tests)).pop()
    return other if is_onnx(other, "Where") and sole_user(tests[0].outputs[0]) is other else None


def _is_guard(user: ir.Node, value: ir.Value) -> bool:
    condition = user.inputs[0]
    test = None if condition is None else condition.producer()
    tested = test is not None and is_onnx(test, "IsNaN") and test.inputs[0] is value
    return tested and user.inputs[2] is value and uniform(user.inputs[1]) == 0


def _feeds_product(value: ir.Value) -> bool:
    return any(is_onnx(user, "MatMul", "Einsum") for user, _ in value.uses())


# -- from the softmax back -----------------------------------------------------------------------------------------


def _path(value: ir.Value | None, rewriter: Rewriter, depth: int = 0) -> list[tuple[ir.Node, int]] | None:
    """Nodes from the product of queries and keys to ``value``, each with the operand that holds the scores."""
    node = None if value is None else value.producer()
    if value is None or node is None or depth > _MAX_CHAIN:
        return None
    if is_onnx(node, "MatMul", "Einsum"):
        return [(node, 0)] if _is_scores(node) else None
    found: list[list[tuple[ir.Node, int]]] = []
    for position in _score_operands(node):
        path = _path(node.inputs[position], rewriter, depth + 1)
        if path is not None:
            found.append([*path, (node, position)])
    return min(found, key=len, default=None)


def _is_scores(node: ir.Node) -> bool:
    """Whether the factors can be queries and keys: the keys, at least, are computed."""
    either = (1,) if node.op_type == "MatMul" else (0, 1)
    return len(node.inputs) == 2 and any(tensor_of(node.inputs[n]) is None for n in either)


def _score_operands(node: ir.Node) -> tuple[int, ...]:
    """Operands of ``node`` that may be the scores."""
    if is_onnx(node, *_SHAPES, "Cast", "Tanh"):
        return (0,)
    if is_onnx(node, "Mul", "Div"):
        found = scaling(node)
        return () if found is None else (list(node.inputs).index(found[0]),)
    if is_onnx(node, "Add"):
        return (0, 1)
    if is_onnx(node, "Sub"):
        return (0,)
    if is_onnx(node, "Where"):
        return tuple(n for n in (1, 2) if uniform(node.inputs[3 - n]) is not None)
    return ()


class _Chain:
    """Follows the scores from their product to the softmax."""

    def __init__(self, rewriter: Rewriter) -> None:
        self.rewriter = rewriter
        self.scores: Contraction | None = None
        self.layout: Layout | None = None
        self.scale, self.cap, self._inner = 1.0, 0.0, 0.0
        self.terms: list[Term] = []

    def follow(self, path: list[tuple[ir.Node, int]]) -> str:
        """Follow ``path``; returns why it is not that of attention scores, or ""."""
        found = contraction(path[0][0], self.rewriter)
        if isinstance(found, str):
            return found
        self.scores, self.layout = found, found.layout
        for (node, position), (before, _) in zip(path[1:], path, strict=False):
            if sole_user(before.outputs[0]) is not node:
                return f"the scores of {before.name} are needed elsewhere too"
            reason = self._step(node, position, self.layout)
            if reason:
                return reason
        if sole_user(path[-1][0].outputs[0]) is None:
            return f"the scores of {path[-1][0].name} are needed elsewhere too"
        return self._settle()

    def turn(self) -> None:
        """Call the left factor keys and the right one queries."""
        if self.scores is not None and self.layout is not None:
            self.scores, self.layout = self.scores.turned(), exchanged(self.layout)
            self.terms = [dataclasses.replace(term, layout=exchanged(term.layout)) for term in self.terms]

    def _settle(self) -> str:
        if self.cap:
            # outer · tanh(inner · s) = cap · tanh(scale · s / cap)
            self.cap, self.scale = self.scale, self._inner * self.scale
            if self.cap <= 0:
                return "the bound of the scores is not positive"
        return ""

    def _step(self, node: ir.Node, position: int, layout: Layout) -> str:
        if is_onnx(node, *_SHAPES):
            self.layout = forward(node, layout, self.rewriter)
            return "" if self.layout is not None else f"{node.op_type} {node.name} mixes axes of the scores"
        if is_onnx(node, "Mul", "Div"):
            self._scale(node)
            return ""
        if is_onnx(node, "Tanh"):
            if self.cap or self.terms:
                return "a mask is applied before the bound (tanh) of the scores"
            self.cap, self._inner, self.scale = 1.0, self.scale, 1.0
            return ""
        if is_onnx(node, "Cast"):
            return "" if self.rewriter.dtype(node.outputs[0]) in _FLOATS else "the scores are cast to whole numbers"
        return self._mask(node, position, layout)

    def _scale(self, node: ir.Node) -> None:
        found = scaling(node)
        factor = 1.0 if found is None else found[1]
        self.scale *= factor
        self.terms = [
            dataclasses.replace(t, factor=t.factor * factor)
            if t.fill is None
            else dataclasses.replace(t, fill=t.fill * factor)
            for t in self.terms
        ]

    def _mask(self, node: ir.Node, position: int, layout: Layout) -> str:
        if node.op_type == "Where":
            condition, fill = node.inputs[0], uniform(node.inputs[3 - position])
            if condition is None or fill is None or fill > -1e4:
                return f"{node.name} puts {fill} where it masks, which keeps some weight"
            self.terms.append(Term(condition, layout, fill=fill, keep=position == 1))
        else:
            other = node.inputs[1 - position]
            if other is None:
                return f"{node.name} lacks an operand"
            self.terms.append(Term(other, layout, factor=-1.0 if node.op_type == "Sub" else 1.0))
        term = self.terms[-1].value
        rank = self.rewriter.shape(term)
        if rank is None:
            return f"the shape of the mask {term.name} is unknown"
        if len(rank) > len(layout.groups):
            return f"the mask {term.name} has more axes than the scores"
        return ""


def forward(node: ir.Node, layout: Layout, rewriter: Rewriter) -> Layout | None:
    """Layout of the output of a node that only moves elements."""
    if is_onnx(node, "Identity", "Cast"):
        return layout
    if is_onnx(node, "Transpose"):
        attribute = node.attributes.get("perm")
        rank = len(layout.groups)
        perm = list(range(rank))[::-1] if attribute is None else list(attribute.as_ints())
        return dataclasses.replace(layout, groups=tuple(layout.groups[axis] for axis in perm))
    after = rewriter.shape(node.outputs[0])
    groups = None if after is None else regroup(layout.order, after)
    return None if groups is None else dataclasses.replace(layout, groups=groups)


def finite(number: float) -> bool:
    """Whether ``number`` can be an attribute of the operator."""
    return math.isfinite(number) and abs(number) < 3e38


def lead_of(layout: Layout) -> Group:
    """Atoms of batch and heads, outermost first, those that are repeated included."""
    atoms = [atom for atom in (*layout.order, *layout.repeated) if atom.role == "lead"]
    return tuple(sorted(atoms, key=lambda atom: atom.path))
