"""Gives every reader of a tensor that is one number all over a copy of its own, so that sharing it couples nobody.

    z = ConstantOfShape([1, batch, 64]);  LSTM_1(…, z, z);  LSTM_2(…, z, z)
    →    z and z_1 of the same kind: the units of the two layers can be cut apart

Exports with a symbolic batch compute the zeros that recurrences start from, and share them between layers of one width.
"""

from __future__ import annotations

import collections

import onnx_ir as ir

from mmopt.analysis.shape_rules import ONNX_DOMAINS
from mmopt.ir.module import Module
from mmopt.transforms.canonicalize.editing import Names

_PASS_ON = frozenset({"Cast", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"})


def separate_fills(module: Module) -> bool:
    """Copy operators that make or pass on such tensors, in place, one for each operator that reads them.

    Returns:
        Whether anything was copied.
    """
    fills: set[ir.Value] = set()
    chain = []
    for node in module.graph:
        if _makes_fill(node, fills):
            fills.add(node.outputs[0])
            chain.append(node)
    names = Names(module.model)
    return any([_copy_for_readers(node, names) for node in reversed(chain)])


def _makes_fill(node: ir.Node, fills: set[ir.Value]) -> bool:
    if node.domain not in ONNX_DOMAINS or len(node.outputs) != 1 or node.outputs[0].is_graph_output():
        return False
    if node.op_type == "ConstantOfShape":
        return True
    source = node.inputs[0] if node.inputs else None
    if node.op_type == "Expand" and source is not None:
        tensor = ir.convenience.get_const_tensor(source)
        return tensor is not None and tensor.size == 1
    return node.op_type in _PASS_ON and source in fills


def _copy_for_readers(node: ir.Node, names: Names) -> bool:
    readers: dict[ir.Node, list[int]] = collections.defaultdict(list)
    for use in node.outputs[0].uses():
        readers[use.node].append(use.idx)
    for reader in list(readers)[1:]:
        copy = _copy(node, names)
        for operand in readers[reader]:
            reader.replace_input_with(operand, copy)
    return len(readers) > 1


def _copy(node: ir.Node, names: Names) -> ir.Value:
    old = node.outputs[0]
    new = ir.Value(name=names.fresh(str(old.name)), shape=old.shape, type=old.type)
    copy = ir.Node(
        node.domain,
        node.op_type,
        node.inputs,
        node.attributes.values(),
        outputs=[new],
        name=names.fresh(node.name or node.op_type),
    )
    copy.metadata_props.update(node.metadata_props)
    if node.graph is None:
        raise ValueError(f"node {node.name!r} is in no graph")
    node.graph.insert_before(node, copy)
    return new
