"""The reference for slicing: the same graph in which units of no account are kept from saying anything.

Where an operator sums over units, takes their mean or largest, or normalizes by their statistics, those that go are
made neutral: zero, minus infinity, one; means are divided by the number that stays; normalizations are spelled out with
mean and variance over what stays. All shapes stay, so that nothing here depends on how slicing changes them.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from mmopt.analysis.axes import Group, Mixing
from mmopt.analysis.shapes import ShapeFacts, infer_shapes
from mmopt.errors import PassError
from mmopt.ir.module import Module
from mmopt.transforms.canonicalize.editing import new_node
from mmopt.transforms.prune.choice import Keep, plan_cut
from mmopt.transforms.prune.constants import Array, Constants, put_constant
from mmopt.transforms.prune.masked_norms import spell_out

_FILL = {
    Mixing.ZERO: 0.0,
    Mixing.MEAN: 0.0,
    Mixing.LOWEST: -np.inf,
    Mixing.HIGHEST: np.inf,
    Mixing.ONE: 1.0,
}


def mask_units(module: Module, groups: Iterable[Group], keep: Keep) -> bool:
    """Make units say nothing, in place; shapes stay.

    What has the positions of a unit that goes, and is not read by anything that mixes units, keeps its contents: only
    what crosses over to other units is closed.

    Args:
        module: The module that ``groups`` were found in.
        groups: Result of :func:`mmopt.analysis.axes.find_groups`.
        keep: Units to keep by name of the group.

    Returns:
        Whether anything was masked.

    Raises:
        UserError: As :func:`mmopt.transforms.prune.slicing.slice_units`.
    """
    cut = plan_cut(module, groups, keep)
    masks: dict[tuple[str, int], dict[tuple[int, Mixing], set[int]]] = collections.defaultdict(
        lambda: collections.defaultdict(set)
    )
    for group, gone in cut.groups:
        for site in group.sites:
            positions = (position for unit in gone for position in site.positions[unit])
            masks[site.output, site.operand][site.axis, site.how].update(positions)
    if not masks:
        return bool(cut.groups)
    facts, constants = infer_shapes(module.model), Constants(module)
    nodes = {str(output.name): node for node in module.graph for output in node.outputs if output.name}
    kinds = {key: _kind(nodes[key[0]], key[1], facts) for key in masks}
    for (output, operand), axes in masks.items():
        _mask(nodes[output], operand, axes, kinds[output, operand], constants)
    return True


@dataclasses.dataclass(frozen=True)
class Kind:
    """What an operand was before anything was masked: its sizes (``None`` where not fixed) and type."""

    sizes: tuple[int | None, ...]
    dtype: ir.DataType


def _kind(node: ir.Node, operand: int, facts: ShapeFacts) -> Kind:
    value = node.inputs[operand]
    shape, dtype = (None, None) if value is None else (facts.shape(value), facts.dtype(value))
    if shape is None or dtype is None:
        raise PassError("shape or type of an operand is not known", where=f"{node.op_type} {node.name!r}")
    return Kind(tuple(size if isinstance(size, int) else None for size in shape), dtype)


def _mask(
    node: ir.Node, operand: int, axes: dict[tuple[int, Mixing], set[int]], kind: Kind, constants: Constants
) -> None:
    statistics: dict[int, Array] = {}
    for (axis, how), removed in axes.items():
        mask = np.ones(kind.sizes[axis] or 0, dtype=bool)
        mask[sorted(removed)] = False
        if how is Mixing.STATISTICS:
            statistics[axis] = mask
            continue
        shape = [1] * len(kind.sizes)
        shape[axis] = -1
        _fill(node, operand, mask.reshape(shape), _FILL[how], constants, kind.dtype)
        if how is Mixing.MEAN:
            _rescale(node, float(mask.size / mask.sum()), constants, kind.dtype)
    if statistics:
        spell_out(node, statistics, len(kind.sizes), kind.dtype, constants)


def _fill(node: ir.Node, operand: int, mask: Array, fill: float, constants: Constants, dtype: ir.DataType) -> None:
    """Put ``fill`` where the mask is false: into a weight, or by an operator in front of ``node``."""
    value = node.inputs[operand]
    if value is None:
        return
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is not None:
        array = np.asarray(tensor.numpy())
        filled = np.where(mask, array, np.array(fill).astype(array.dtype))
        if len(value.uses()) == 1 and not value.is_graph_output():
            put_constant(value, ir.Tensor(filled, dtype=tensor.dtype, name=value.name))
        else:
            constants.give(node, operand, constants.add(filled, str(value.name), tensor.dtype))
        return
    condition = constants.add(mask, f"{value.name}_mask")
    neutral = constants.add(np.array(fill, dtype=dtype.numpy()), f"{value.name}_neutral", dtype)
    masked = new_node("Where", [condition, value, neutral], node, constants.names)
    masked.outputs[0].shape, masked.outputs[0].type = value.shape, value.type
    node.replace_input_with(operand, masked.outputs[0])


def _rescale(node: ir.Node, factor: float, constants: Constants, dtype: ir.DataType) -> None:
    """Multiply the result of ``node`` for all that read it."""
    output = node.outputs[0]
    if node.graph is None:
        raise ValueError(f"node {node.name!r} is in no graph")
    scalar = constants.add(np.array(factor, dtype=dtype.numpy()), f"{output.name}_kept", dtype)
    scaled = ir.Node("", "Mul", [output, scalar], name=constants.names.fresh(f"{output.name}_rescaled"))
    scaled.outputs[0].name = constants.names.fresh(f"{output.name}_over_kept")
    scaled.outputs[0].shape, scaled.outputs[0].type = output.shape, output.type
    users = [use for use in output.uses() if use.node is not scaled]
    node.graph.insert_after(node, scaled)
    for use in users:
        use.node.replace_input_with(use.idx, scaled.outputs[0])
