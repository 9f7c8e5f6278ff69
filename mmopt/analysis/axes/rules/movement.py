"""Operators that cut, merge, move and repeat axes."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from mmopt.analysis import dims
from mmopt.analysis.axes.rules.registry import axis_rule
from mmopt.analysis.axes.space import Space


@axis_rule("Transpose")
def transpose(node: ir.Node, space: Space) -> None:
    """Axis k of the result is axis ``perm[k]``."""
    x = space.operand(node, 0)
    perm = node.attributes.get("perm")
    order = list(perm.as_ints()) if perm is not None else list(reversed(range(len(x))))
    space.same_all([x[k] for k in order], space.of(node.outputs[0]))


@axis_rule("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def reshape(node: ir.Node, space: Space) -> None:
    """Runs of axes with equal products are the same positions, cut differently."""
    x, y = space.operand(node, 0), space.of(node.outputs[0])
    regroup([factor for axis in x for factor in space.factors_of(axis)], y, space, _inferred(node, space))


def _inferred(node: ir.Node, space: Space) -> int | None:
    """The axis of the result whose size follows from the others."""
    elements = space.facts.elements(node.inputs[1]) if node.op_type == "Reshape" and node.inputs[1] else None
    return elements.index(-1) if elements is not None and -1 in elements else None


def regroup(x: Sequence[int], y: Sequence[int], space: Space, inferred: int | None = None) -> None:
    """Match the axes of a tensor with those of the same elements in another shape."""
    free = space.find(y[inferred]) if inferred is not None else None
    left = [a for a in x if space.size(a) != 1]
    right = [a for a in y if space.size(a) != 1]
    while left or right:
        a, b = _shortest_runs(left, right, space)
        if not a or not b:
            space.freeze_all((*left, *right), "a Reshape cuts it in a way that depends on sizes that are not fixed")
            return
        if b == 1 < a and space.find(right[0]) == free and space.extent(right[0]) is None:
            space.merge(right[0], left[:a])
        else:
            _join(left[:a], right[:b], space)
        left, right = left[a:], right[b:]


def _shortest_runs(left: Sequence[int], right: Sequence[int], space: Space) -> tuple[int, int]:
    """Lengths of the shortest runs at the front whose sizes have equal products; 0 where there are none."""
    sizes = [[space.own_size(axis) for axis in side] for side in (left, right)]
    products: list[dict[object, int]] = [{}, {}]
    for side, products_of_side in zip(sizes, products, strict=True):
        total: object = 1
        for length, size in enumerate(side, 1):
            if size is None:
                break
            total = dims.product([total, size])  # type: ignore[list-item]
            products_of_side.setdefault(total, length)
    common = [(length, products[1][size]) for size, length in products[0].items() if size in products[1]]
    return min(common, default=(0, 0))


def _join(left: Sequence[int], right: Sequence[int], space: Space) -> None:
    """Say that two runs are the same positions: front axes that divide each other are split off first."""
    a, b = list(left), list(right)
    while len(a) > 1 and len(b) > 1:
        sizes = space.extent(a[0]), space.extent(b[0])
        if sizes[0] is None or sizes[1] is None or (sizes[0] % sizes[1] and sizes[1] % sizes[0]):
            break
        long, short = (a, b) if sizes[0] >= sizes[1] else (b, a)
        rest = space.new(max(sizes[0], sizes[1]) // min(sizes[0], sizes[1]))
        space.product(long[0], (short.pop(0), rest))
        long[0] = rest
    if len(a) == 1:
        space.product(a[0], b)
    elif len(b) == 1:
        space.product(b[0], a)
    else:
        _join_whole(a, b, space)


def _join_whole(left: Sequence[int], right: Sequence[int], space: Space) -> None:
    whole = space.new(dims.product([size for axis in left if (size := space.size(axis)) is not None]))
    space.product(whole, left)
    space.product(whole, right)


@axis_rule("Expand")
def expand(node: ir.Node, space: Space) -> None:
    """Axes of one position are stretched into new ones."""
    space.broadcast(space.operand(node, 0), space.of(node.outputs[0]))


@axis_rule("Tile")
def tile(node: ir.Node, space: Space) -> None:
    """An axis that is repeated is ``repeats × axis``."""
    x, y = space.operand(node, 0), space.of(node.outputs[0])
    for a, b in zip(x, y, strict=True):
        sizes = space.extent(a), space.extent(b)
        if space.size(a) == space.size(b):
            space.same(a, b)
        elif sizes[0] is not None and sizes[1] is not None and sizes[0] > 1:
            repeats = space.new(sizes[1] // sizes[0])
            space.freeze(repeats, "it counts the repeats of a Tile")
            space.product(b, (repeats, a))
        else:
            space.freeze_all((a, b), "Tile repeats it")
