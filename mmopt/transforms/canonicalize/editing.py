"""What every canonicalizing pass needs to change a graph safely: names, replacement, removal, constants."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from mmopt.analysis.shape_facts import own_type
from mmopt.analysis.shape_rules import ONNX_DOMAINS, constant_tensor

Array = np.ndarray[Any, Any]

RANDOM_OPS = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)
"""Operators of the default domain that draw random numbers. Dropout does when it trains."""


def is_onnx(node: ir.Node, *op_types: str) -> bool:
    """Whether ``node`` is one of these operators of the default domain."""
    return node.op_type in op_types and node.domain in ONNX_DOMAINS


def bodies(node: ir.Node) -> Iterator[ir.Graph]:
    """Graphs in the attributes of ``node``."""
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def is_random(node: ir.Node) -> bool:
    """Whether two runs of ``node`` (or of a node in its bodies) may differ."""
    if is_onnx(node, *RANDOM_OPS):
        return True
    if is_onnx(node, "Dropout") and len(node.inputs) > 2 and node.inputs[2] is not None:
        training = constant(node.inputs[2])
        return training is None or bool(np.any(training))
    return any(is_random(inner) for body in bodies(node) for inner in body)


def tensor_of(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initializer or of a ``Constant`` node's output; ``None`` for anything that can vary."""
    if value is None:
        return None
    producer = value.producer()
    if producer is None:
        return constant_tensor(value)
    if is_onnx(producer, "Constant") and len(producer.attributes) == 1:
        return constant_node_tensor(producer)
    return None


def constant_node_tensor(node: ir.Node) -> ir.TensorProtocol | None:
    """The tensor that a ``Constant`` node holds; ``None`` for a sparse one or a reference to a function's attribute."""
    ((kind, attribute),) = node.attributes.items()
    if attribute.is_ref():
        return None
    if kind == "value":
        return attribute.as_tensor()
    name = node.outputs[0].name
    if kind in ("value_string", "value_strings"):
        texts = [attribute.as_string()] if kind == "value_string" else list(attribute.as_strings())
        data = [text.encode() if isinstance(text, str) else text for text in texts]
        return ir.StringTensor(data, shape=ir.Shape([] if kind == "value_string" else [len(data)]), name=name)
    if kind not in ("value_int", "value_ints", "value_float", "value_floats"):
        return None
    dtype = np.int64 if "int" in kind else np.float32
    return ir.tensor(np.array(attribute.value, dtype=dtype), name=name)


MAX_READ = 1 << 16
"""Constants with more elements are weights: peephole rules do not read them."""


def constant(value: ir.Value | None) -> Array | None:
    """Contents of a small constant, strings excepted."""
    tensor = tensor_of(value)
    if tensor is None or tensor.size > MAX_READ or tensor.dtype == ir.DataType.STRING:
        return None
    return np.asarray(tensor.numpy())


def constant_ints(value: ir.Value | None) -> list[int] | None:
    """Contents of a small integer constant, flattened."""
    array = constant(value)
    return [int(i) for i in array.reshape(-1)] if array is not None and array.dtype.kind in "iu" else None


def axes_of(node: ir.Node, position: int = 1) -> list[int] | None:
    """Constant ``axes``, from the attribute or from the input at ``position``; ``None`` when absent or not constant."""
    attribute = node.attributes.get("axes")
    if attribute is not None:
        return None if attribute.is_ref() else list(attribute.as_ints())
    return constant_ints(node.inputs[position]) if len(node.inputs) > position else None


def integer(node: ir.Node, name: str, default: int) -> int | None:
    """An integer attribute; ``None`` when it refers to an attribute of the enclosing function."""
    attribute = node.attributes.get(name)
    if attribute is None:
        return default
    return None if attribute.is_ref() else attribute.as_int()


class Names:
    """Names that no value or node of a model has."""

    def __init__(self, model: ir.Model) -> None:
        self._used: collections.Counter[str] = collections.Counter()
        self._next: dict[str, int] = {}
        for graph in model.graphs():
            listed = {*graph.inputs, *graph.initializers.values()}
            self._used.update(value.name for value in listed if value.name)
            self._used.update(output.name for node in graph for output in node.outputs if output.name)
            self._used.update(node.name for node in graph if node.name)

    def is_shared(self, name: str | None) -> bool:
        """Whether two values (in bodies beside each other, say) or nodes go by ``name``, or nothing has it."""
        return not name or self._used[name] > 1

    def fresh(self, base: str) -> str:
        """``base``, or ``base_1``, ``base_2``, … when it is taken."""
        name, count = base, self._next.get(base, 0)
        while name in self._used:
            count += 1
            name = f"{base}_{count}"
        self._next[base] = count
        self._used[name] += 1
        return name


def can_replace(old: ir.Value, new: ir.Value) -> bool:
    """Whether ``new`` may stand for ``old`` everywhere.

    A graph output keeps its name, so what takes its place must be free to be renamed: the result of a node of the same
    graph that is no output itself. An input or initializer that becomes an output needs an ``Identity`` in between.
    """
    if not old.is_graph_output():
        return True
    producer, owner = new.producer(), old.producer()
    return producer is not None and owner is not None and producer.graph is owner.graph and not new.is_graph_output()


def replace(old: ir.Value, new: ir.Value) -> None:
    """Make everything that reads ``old`` read ``new``; :func:`can_replace` must hold.

    ``new`` takes over the name and annotation of a graph output, and otherwise an annotation that it lacks.
    """
    if old.is_graph_output():
        name, kind, shape = old.name, old.type, old.shape
        new.doc_string = old.doc_string or new.doc_string
        new.metadata_props.update(old.metadata_props)
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        old.name = None
        new.name, new.type, new.shape = name, kind, shape
        return
    if new.shape is None:
        new.shape = old.shape
    if new.type is None and old.type is not None:
        new.type = own_type(old.type)
    old.replace_all_uses_with(new)


def erase(nodes: Iterable[ir.Node]) -> None:
    """Take nodes whose outputs nobody needs out of their graphs, with all uses that they or their bodies make."""
    doomed = list(nodes)
    for node in doomed:
        _detach(node)
    by_graph: dict[ir.Graph, list[ir.Node]] = {}
    for node in doomed:
        if node.graph is not None:
            by_graph.setdefault(node.graph, []).append(node)
    for graph, members in by_graph.items():
        graph.remove(members, safe=True)


def _detach(node: ir.Node) -> None:
    for index, value in enumerate(node.inputs):
        if value is not None:
            node.replace_input_with(index, None)
    for body in bodies(node):
        for inner in body:
            _detach(inner)


def new_node(
    op_type: str, inputs: Sequence[ir.Value | None], like: ir.Node, names: Names, attributes: Sequence[ir.Attr] = ()
) -> ir.Node:
    """A node with one output, put before ``like`` and named and described after it."""
    base = like.name or like.op_type
    output = ir.Value(name=names.fresh(f"{base}_{op_type}"))
    node = ir.Node("", op_type, inputs, attributes, outputs=[output], name=names.fresh(f"{base}_{op_type}_node"))
    node.metadata_props.update(like.metadata_props)
    if like.graph is None:
        raise ValueError(f"node {like.name!r} is in no graph")
    like.graph.insert_before(like, node)
    return node


def new_initializer(graph: ir.Graph, tensor: ir.TensorProtocol, name: str) -> ir.Value:
    """Register ``tensor`` as an initializer of ``graph`` under a name that must be free."""
    value = ir.Value(
        name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    tensor.name = name
    graph.register_initializer(value)
    return value


def drop_unused(value: ir.Value | None) -> None:
    """Remove an initializer that nothing reads any more; anything else stays."""
    if value is None or value.uses() or value.is_graph_input() or value.is_graph_output():
        return
    if value.is_initializer() and value.graph is not None:
        del value.graph.initializers[str(value.name)]
