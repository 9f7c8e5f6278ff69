"""Takes nodes out of the bodies of control flow, into the graph around them."""

from __future__ import annotations

import onnx_ir as ir

from mmopt.transforms.canonicalize.editing import Names, constant, is_onnx


def unnamed(value: ir.Value) -> ir.Value:
    """``value`` before Identity nodes gave it other names, as results of bodies often have."""
    node = value.producer()
    inner = node.inputs[0] if node is not None and is_onnx(node, "Identity") else None
    return value if inner is None else unnamed(inner)


def goes_on(value: ir.Value | None, given: ir.Value | None = None) -> bool:
    """Whether a loop's condition is left out, always true, or handed on as ``given``."""
    if value is None:
        return True
    source = unnamed(value)
    array = constant(source)
    return source is given or (array is not None and bool(array.all()))


def move_initializer(value: ir.Value, body: ir.Graph, graph: ir.Graph, names: Names) -> None:
    """Make an initializer of ``body`` one of ``graph``, under another name where its own is taken."""
    del body.initializers[str(value.name)]
    if names.is_shared(value.name) or value.name in graph.initializers:
        value.name = names.fresh(str(value.name))
    graph.register_initializer(value)


def rename(node: ir.Node, names: Names) -> None:
    """Give a node and its outputs names that nothing in the graph they move to has."""
    if names.is_shared(node.name):
        node.name = names.fresh(node.name or node.op_type)
    for output in node.outputs:
        if output.name != "" and names.is_shared(output.name):
            output.name = names.fresh(output.name or node.op_type)


def spill(body: ir.Graph, before: ir.Node, names: Names) -> tuple[list[ir.Node], list[ir.Value]]:
    """Move all that ``body`` holds to where ``before`` stands.

    Args:
        body: Is empty afterwards. Its inputs must have no uses left.
        before: A node of the graph around.
        names: Names of the whole model.

    Returns:
        The nodes, and the values that were the body's outputs.
    """
    graph = before.graph
    if graph is None:
        raise ValueError(f"node {before.name!r} is in no graph")
    results = list(body.outputs)
    body.outputs.clear()
    for value in list(body.initializers.values()):
        move_initializer(value, body, graph, names)
    nodes = list(body)
    body.remove(nodes)
    for node in nodes:
        rename(node, names)
    graph.insert_before(before, nodes)
    return nodes, results
