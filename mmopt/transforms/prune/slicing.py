"""Takes units out of a module: weights get smaller, and every constant that speaks of their number follows."""

from __future__ import annotations

import collections
from collections.abc import Iterable

import onnx_ir as ir

from mmopt.analysis.axes import Group
from mmopt.analysis.axes.find import node_name
from mmopt.analysis.axes.sizes import origins_of
from mmopt.analysis.axes.space import Space
from mmopt.analysis.shapes import annotate, infer_shapes
from mmopt.ir.module import Module
from mmopt.transforms.prune.choice import Axes, Cut, Keep, constants_of, plan_cut
from mmopt.transforms.prune.constants import Constants, cut_constant, without
from mmopt.transforms.prune.resizing import Resizer


def slice_units(module: Module, groups: Iterable[Group], keep: Keep) -> bool:
    """Take units out, in place.

    Weights keep their names, except that a vector which several operators read is copied where their cuts differ.

    Args:
        module: The module that ``groups`` were found in.
        groups: Result of :func:`mmopt.analysis.axes.find_groups`.
        keep: Units to keep by name of the group; groups that are not named stay whole.

    Returns:
        Whether anything was taken out.

    Raises:
        UserError: There is no such group, it is frozen, or the units are none, not ascending, or not its own.
    """
    cut = plan_cut(module, groups, keep)
    if not cut.groups:
        return False
    space = Space(infer_shapes(module.model))
    constants = Constants(module)
    resizer = Resizer(cut, space, constants, origins_of(module.graph, space))
    _count_anew(module, cut, space)
    for node in list(module.graph):
        resizer.resize(node)
    _cut_weights(module, cut)
    _cut_copies(module, cut, constants)
    _annotate(module, cut)
    return True


def _cut_weights(module: Module, cut: Cut) -> None:
    for value in constants_of(module):
        if str(value.name) in cut.tensors:
            cut_constant(value, cut.tensors[str(value.name)])


def _cut_copies(module: Module, cut: Cut, constants: Constants) -> None:
    """Cut vectors reader by reader; one that all readers cut alike stays one."""
    made: dict[tuple[str, tuple[tuple[int, frozenset[int]], ...]], ir.Value] = {}
    names = {name for name, _ in cut.copies}
    for value in [
        *module.graph.initializers.values(),
        *(n.outputs[0] for n in module.graph if n.op_type == "Constant"),
    ]:
        if value.name not in names:
            continue
        cuts = [cut.copies.get((str(value.name), node_name(use.node)), {}) for use in value.uses()]
        if all(axes == cuts[0] for axes in cuts):
            cut_constant(value, cuts[0])
            continue
        for use, axes in zip(list(value.uses()), cuts, strict=True):
            if axes:
                key = (str(value.name), tuple(sorted(axes.items(), key=lambda item: item[0])))
                if key not in made:
                    made[key] = _copy(value, axes, constants)
                use.node.replace_input_with(use.idx, made[key])


def _copy(value: ir.Value, axes: Axes, constants: Constants) -> ir.Value:
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None:
        raise ValueError(f"{value.name!r} is no constant")
    return constants.add(without(tensor.numpy(), axes), str(value.name), tensor.dtype)


def _count_anew(module: Module, cut: Cut, space: Space) -> None:
    """Attributes that count what the units are made of."""
    less: dict[tuple[str, str], set[int]] = collections.defaultdict(set)
    for group, gone in cut.groups:
        for count in group.counts:
            less[count.output, count.attribute].update(p for unit in gone for p in count.positions[unit])
    nodes = {str(output.name): node for node in module.graph for output in node.outputs if output.name}
    for (output, attribute), positions in less.items():
        node = nodes[output]
        number = node.attributes.get_int(attribute, 0) if attribute != "scale" else 0
        if attribute == "scale":
            _spell_scale(node, space)
        elif number:
            node.attributes[attribute] = ir.AttrInt64(attribute, number - len(positions))


def _spell_scale(node: ir.Node, space: Space) -> None:
    """Attention scales by the head size it was trained with, whatever is left of it."""
    key = space.of(node.inputs[1]) if node.inputs[1] is not None else []
    heads = node.attributes.get_int("kv_num_heads", 1) if len(key) == 3 else 1
    extent = space.extent(key[-1])
    if "scale" not in node.attributes and extent is not None:
        node.attributes["scale"] = ir.AttrFloat32("scale", float(extent // heads) ** -0.5)


def _annotate(module: Module, cut: Cut) -> None:
    """Write the new shapes onto tensors."""
    for node in module.graph:
        for value in node.outputs:
            axes = cut.tensors.get(str(value.name))
            if axes and value.shape is not None:
                sizes = list(value.shape)
                for axis, removed in axes.items():
                    size = sizes[axis]
                    sizes[axis] = size - len(removed) if isinstance(size, int) else size
                value.shape = ir.Shape(sizes)
    annotate(module.model, infer_shapes(module.model))
