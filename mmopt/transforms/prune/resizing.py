"""Operators whose constants speak of sizes or positions, and what those constants become when axes are cut."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from mmopt.analysis.axes.rules.selection import pad_amounts, slice_bounds
from mmopt.analysis.axes.sizes import Origins
from mmopt.analysis.axes.space import Space
from mmopt.analysis.dims import Size
from mmopt.analysis.shape_rules import ONNX_DOMAINS
from mmopt.errors import PassError
from mmopt.transforms.canonicalize.editing import new_node
from mmopt.transforms.prune.choice import Cut
from mmopt.transforms.prune.constants import Constants, kept

_END = np.iinfo(np.int64).max


class Resizer:
    """Rewrites operators one after another; all shapes it asks for are those before the cut.

    Args:
        cut: What goes.
        space: Shapes before the cut.
        constants: Where new constants go.
        origins: Where the elements of tensors of sizes come from.
    """

    def __init__(self, cut: Cut, space: Space, constants: Constants, origins: Mapping[ir.Value, Origins]) -> None:
        self._cut, self._space, self._constants, self._origins = cut, space, constants, origins

    def resize(self, node: ir.Node) -> None:
        """Rewrite one operator if it needs to be."""
        rule = _RULES.get(node.op_type) if node.domain in ONNX_DOMAINS else None
        if rule is None:
            return
        values = [v for v in (*node.inputs, *node.outputs) if v is not None]
        if any(self._cut.touches(value) or self._follows(value) for value in values):
            rule(self, node)

    # -- shapes given as targets -----------------------------------------------------------------------------------

    def target(self, node: ir.Node, operand: int) -> None:
        """The operand lists the sizes of the result: those that are fixed are written down anew."""
        old = node.inputs[operand] if operand < len(node.inputs) else None
        if old is None or not (self._changed(node.outputs[0]) or self._follows(old)):
            return
        sizes = [self._space.extent(axis) for axis in self._space.of(node.outputs[0])]
        elements = self._space.facts.elements(old) or (None,) * len(sizes)
        new = [self._element(node, axis, size, elements[axis]) for axis, size in enumerate(sizes)]
        name = f"{node.name or node.op_type}_sizes"
        varying = [axis for axis, number in enumerate(new) if number is None]
        if len(varying) == 1 and node.op_type == "Reshape" and -1 not in new:
            new[varying.pop()] = -1
        value = self._constants.integers([0 if number is None else number for number in new], name)
        if varying:
            fixed = self._constants.add(np.array([number is not None for number in new]), f"{name}_fixed")
            value = new_node("Where", [fixed, value, old], node, self._constants.names).outputs[0]
        self._constants.give(node, operand, value)

    def _element(self, node: ir.Node, axis: int, size: int | None, element: Size | None) -> int | None:
        """A size in a target; ``None`` for what is known at run time only."""
        if (node.op_type == "Reshape" and element == -1) or (node.op_type == "Expand" and element == 1):
            return int(element) if isinstance(element, int) else None
        if size is not None:
            return size - len(self._cut.removed(node.outputs[0], axis))
        return 0 if element == 0 else None

    def _changed(self, value: ir.Value) -> bool:
        return self._cut.touches(value)

    def _follows(self, value: ir.Value) -> bool:
        """Whether sizes of tensors that are cut go into a target."""
        found = self._origins.get(value) or []
        return any(self._cut.removed(origin, axis) for pairs in found for origin, axis in pairs)

    def _rank(self, value: ir.Value) -> int:
        return len(self._space.of(value))

    # -- positions -------------------------------------------------------------------------------------------------

    def _ranks(self, value: ir.Value, axis: int) -> dict[int, int]:
        """Where the positions of an axis that stay end up."""
        extent = self._space.extent(self._space.of(value)[axis]) or 0
        return {position: k for k, position in enumerate(kept(extent, self._cut.removed(value, axis)))}

    def _left(self, value: ir.Value, axis: int) -> list[int]:
        extent = self._space.extent(self._space.of(value)[axis]) or 0
        return kept(extent, self._cut.removed(value, axis))

    def _changed_axes(self, node: ir.Node) -> list[int]:
        pair = (node.inputs[0], node.outputs[0])
        return [axis for axis in range(self._rank(node.outputs[0])) if any(self._cut.removed(v, axis) for v in pair)]

    def slice(self, node: ir.Node) -> None:
        """Bounds become those of what stays, or a Gather where that is no row of equal steps."""
        source = node.inputs[0]
        bounds = slice_bounds(node, self._space, self._rank(node.outputs[0]))
        if source is None or bounds is None:
            return
        new: dict[int, tuple[int, int | None, int] | None] = dict(bounds)
        for axis in self._changed_axes(node):
            bound = bounds.get(axis)
            if bound is None:
                continue
            extent = self._space.extent(self._space.of(source)[axis]) or 0
            picked = range(extent)[slice(*bound)]
            ranks = self._ranks(source, axis)
            wanted = [ranks[picked[k]] for k in self._left(node.outputs[0], axis)]
            new[axis] = _steps(wanted)
            if new[axis] is None:
                self._gather_first(node, axis, wanted)
                new[axis] = (0, None, 1)
        if new != bounds:
            self._write_slice(node, new)

    def _gather_first(self, node: ir.Node, axis: int, wanted: Sequence[int]) -> None:
        indices = self._constants.integers(wanted, f"{node.name or 'Slice'}_positions")
        attribute = ir.AttrInt64("axis", axis)
        picked = new_node("Gather", [node.inputs[0], indices], node, self._constants.names, [attribute])
        node.replace_input_with(0, picked.outputs[0])

    def _write_slice(self, node: ir.Node, bounds: Mapping[int, tuple[int, int | None, int] | None]) -> None:
        fixed = {axis: bound for axis, bound in bounds.items() if bound is not None}
        if len(fixed) != len(bounds):
            raise PassError("some of the bounds are computed", where=f"Slice {node.name!r}")
        ends = [(-_END if step < 0 else _END) if end is None else end for _, end, step in fixed.values()]
        columns = [[b[0] for b in fixed.values()], ends, list(fixed), [b[2] for b in fixed.values()]]
        if "starts" in node.attributes:
            for key, column in zip(("starts", "ends", "axes"), columns, strict=False):
                node.attributes[key] = ir.AttrInt64s(key, column)
            return
        for operand, (key, column) in enumerate(zip(("starts", "ends", "axes", "steps"), columns, strict=True), 1):
            self._constants.give(node, operand, self._constants.integers(column, f"{node.name or 'Slice'}_{key}"))

    def gather(self, node: ir.Node) -> None:
        """Constant indices become those of what stays."""
        data, indices = node.inputs[0], node.inputs[1]
        tensor = ir.convenience.get_const_tensor(indices) if indices is not None else None
        if data is None or tensor is None:
            return
        axis = node.attributes.get_int("axis", 0) % self._rank(data)
        extent = self._space.extent(self._space.of(data)[axis]) or 0
        array = np.asarray(tensor.numpy())
        gone = self._cut.removed(node.outputs[0], axis) if array.ndim == 1 else frozenset()
        if not gone and not self._cut.removed(data, axis):
            return
        ranks = self._ranks(data, axis)
        chosen = np.delete(array, sorted(gone)) if array.ndim == 1 else array
        new = np.array([ranks[int(i) % extent] for i in chosen.reshape(-1)], dtype=array.dtype).reshape(chosen.shape)
        self._constants.give(node, 1, self._constants.add(new, f"{node.name or 'Gather'}_indices"))

    def split(self, node: ir.Node) -> None:
        """Sizes of the parts."""
        axis = node.attributes.get_int("axis", 0) % self._rank(node.outputs[0])
        if not any(self._cut.removed(output, axis) for output in node.outputs):
            return
        sizes = [len(self._left(output, axis)) for output in node.outputs]
        if "split" in node.attributes:
            node.attributes["split"] = ir.AttrInt64s("split", sizes)
            return
        node.attributes.pop("num_outputs", None)
        self._constants.give(node, 1, self._constants.integers(sizes, f"{node.name or 'Split'}_sizes"))

    def pad(self, node: ir.Node) -> None:
        """Amounts of padding that stay."""
        source, rank = node.inputs[0], self._rank(node.outputs[0])
        amounts = pad_amounts(node, self._space, rank)
        if source is None or amounts is None:
            return
        new = list(amounts)
        for axis in self._changed_axes(node):
            extent = self._space.extent(self._space.of(source)[axis]) or 0
            left = self._left(node.outputs[0], axis)
            new[axis] = sum(position < amounts[axis] for position in left)
            new[axis + rank] = sum(position >= amounts[axis] + extent for position in left)
        if new == amounts:
            return
        if "pads" in node.attributes:
            node.attributes["pads"] = ir.AttrInt64s("pads", new)
            return
        self._constants.give(node, 1, self._constants.integers(new, f"{node.name or 'Pad'}_amounts"))
        if len(node.inputs) > 3:
            node.replace_input_with(3, None)


def _steps(positions: Sequence[int]) -> tuple[int, int | None, int] | None:
    """Start, stop and step that give these positions; ``None`` when their distances differ."""
    if len(positions) == 1:
        return positions[0], positions[0] + 1, 1
    step = positions[1] - positions[0]
    if step == 0 or any(b - a != step for a, b in itertools.pairwise(positions)):
        return None
    stop = positions[-1] + (1 if step > 0 else -1)
    return positions[0], None if stop < 0 else stop, step


_RULES: dict[str, Callable[[Resizer, ir.Node], None]] = {
    "ConstantOfShape": lambda resizer, node: resizer.target(node, 0),
    "Expand": lambda resizer, node: resizer.target(node, 1),
    "Gather": Resizer.gather,
    "Pad": Resizer.pad,
    "Reshape": lambda resizer, node: resizer.target(node, 1),
    "Resize": lambda resizer, node: resizer.target(node, 3),
    "Slice": Resizer.slice,
    "Split": Resizer.split,
}
