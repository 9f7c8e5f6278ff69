"""Hashes of models: one that sees every change, one that sees only what a model computes.

Weights are hashed once per tensor object and remembered for as long as it lives, so that hashing a large model again
after a pass costs time in the number of nodes only.
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator

import onnx_ir as ir

_digests: dict[int, tuple[weakref.ref[ir.TensorProtocol], str]] = {}
_digests_lock = threading.Lock()


def tensor_digest(tensor: ir.TensorProtocol) -> str:
    """Hex digest of dtype, shape and bytes of ``tensor``, remembered while the tensor object lives."""
    key = id(tensor)
    known = _digests.get(key)
    if known is not None and known[0]() is tensor:
        return known[1]
    digest = _hash_tensor(tensor)
    with _digests_lock:
        _digests[key] = (weakref.ref(tensor, lambda _: _forget(key)), digest)
    return digest


def fingerprint(model: ir.Model) -> str:
    """Hex digest of everything that would be written to a file: two models with equal ones serialize alike.

    Names, node order, annotations of types and shapes, metadata and weights all count. Graph and node attributes are
    taken in the order of their names.
    """
    digest = hashlib.blake2b(digest_size=16)
    write = _writer(digest.update)
    write("model", model.ir_version, sorted(model.opset_imports.items()), _metadata(model.metadata_props))
    write(model.producer_name, model.producer_version, model.domain, model.model_version, model.doc_string)
    _write_graph(write, model.graph)
    for identifier, function in model.functions.items():
        write("function", identifier, sorted(function.opset_imports.items()), list(map(_attribute, _formals(function))))
        _write_graph(write, function.graph)
    return digest.hexdigest()


def structure_hash(model: ir.Model) -> str:
    """Hex digest of what ``model`` computes: blind to names inside, node order, annotations and metadata.

    The names, types and order of the model's inputs and outputs count. Nodes from which no output can be reached do
    not, and a computation done twice counts as one. Two models with equal hashes compute the same, to the bit, unless
    they draw random numbers. Time is linear in the number of nodes.
    """
    functions = [
        (
            identifier,
            sorted(function.opset_imports.items()),
            list(map(_attribute, _formals(function))),
            _structure(function.graph, {}, depth=1),
        )
        for identifier, function in sorted(model.functions.items())
    ]
    parts = [sorted(model.opset_imports.items()), _structure(model.graph, {}, depth=0), functions]
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def _forget(key: int) -> None:
    with _digests_lock:
        known = _digests.get(key)
        if known is not None and known[0]() is None:
            del _digests[key]


def _hash_tensor(tensor: ir.TensorProtocol) -> str:
    digest = hashlib.sha256(f"{tensor.dtype.name}{list(tensor.shape.numpy())}".encode())
    for part in _bytes_of(tensor):
        digest.update(part)
    return digest.hexdigest()[:32]


def _bytes_of(tensor: ir.TensorProtocol) -> Iterator[bytes | memoryview]:
    """The raw bytes of ``tensor``, without a copy where its array is contiguous and not packed."""
    if tensor.dtype == ir.DataType.STRING:
        yield repr(tensor.numpy().tolist()).encode()
        return
    if tensor.dtype.bitwidth >= 8:
        array = tensor.numpy()
        if array.flags.c_contiguous:
            yield array.reshape(-1).view("u1").data
            return
    yield tensor.tobytes()


def _writer(update: Callable[[bytes], None]) -> Callable[..., None]:
    def write(*parts: object) -> None:
        update(repr(parts).encode())

    return write


def _write_graph(write: Callable[..., None], graph: ir.Graph) -> None:
    write("graph", graph.name, graph.doc_string, _metadata(graph.metadata_props))
    write([_value(value) for value in graph.inputs])
    # Initializers are a mapping: their order carries no meaning, but is what gets written to a file.
    write([(_value(value), _tensor(value.const_value)) for value in graph.initializers.values()])
    for node in graph:
        write(
            (node.domain, node.op_type, node.overload, node.name, node.doc_string),
            [None if value is None else value.name for value in node.inputs],
            [_value(value) for value in node.outputs],
            _metadata(node.metadata_props),
        )
        for name in sorted(node.attributes):
            _write_attribute(write, node.attributes[name])
    write([_value(value) for value in graph.outputs])


def _write_attribute(write: Callable[..., None], attribute: ir.Attr) -> None:
    graphs = list(_graphs_of(attribute))
    if not graphs:
        write(_attribute(attribute))
        return
    write(attribute.name, len(graphs))
    for graph in graphs:
        _write_graph(write, graph)


def _graphs_of(attribute: ir.Attr) -> Iterable[ir.Graph]:
    if attribute.is_ref():
        return ()
    if attribute.type == ir.AttributeType.GRAPH:
        return (attribute.as_graph(),)
    if attribute.type == ir.AttributeType.GRAPHS:
        return attribute.as_graphs()
    return ()


def _attribute(attribute: ir.Attr) -> tuple[object, ...]:
    if attribute.is_ref():
        return (attribute.name, attribute.type.name, "ref", attribute.ref_attr_name)
    value: object = attribute.value
    if attribute.type == ir.AttributeType.TENSOR and value is not None:
        value = tensor_digest(attribute.as_tensor())
    elif attribute.type == ir.AttributeType.TENSORS:
        value = [tensor_digest(tensor) for tensor in attribute.as_tensors()]
    return (attribute.name, attribute.type.name, value)


def _formals(function: ir.Function) -> list[ir.Attr]:
    return [function.attributes[name] for name in sorted(function.attributes)]


def _value(value: ir.Value) -> tuple[object, ...]:
    shape = None if value.shape is None else [str(dim) for dim in value.shape]
    return (value.name, repr(value.type), shape, value.doc_string, _metadata(value.metadata_props))


def _tensor(tensor: ir.TensorProtocol | None) -> str:
    return "" if tensor is None else tensor_digest(tensor)


def _metadata(properties: dict[str, str]) -> list[tuple[str, str]]:
    return sorted(properties.items()) if properties else []


def _structure(graph: ir.Graph, outer: dict[ir.Value, str], *, depth: int) -> str:
    """Digest of the outputs of ``graph``, each value identified by the computation that makes it.

    Only the names of the main graph, at depth 0, count. The depth keeps the inputs of nested bodies apart.
    """
    named = depth == 0
    known = dict(outer)
    for index, value in enumerate(graph.inputs):
        known[value] = f"in{depth}.{index}:{value.name if named else ''}:{value.type!r}"
    for value in graph.initializers.values():
        known[value] = f"{known.get(value, '')}tensor:{_tensor(value.const_value)}"
    for node in graph:
        inputs = ["" if value is None else known.get(value, f"?{value.name}") for value in node.inputs]
        attributes = [_structure_of_attribute(node.attributes[name], known, depth) for name in sorted(node.attributes)]
        what = repr((node.domain, node.op_type, node.overload, inputs, attributes, _wanted(node)))
        digest = hashlib.blake2b(what.encode(), digest_size=16).hexdigest()
        for index, value in enumerate(node.outputs):
            known[value] = f"{digest}.{index}"
    ends = [(value.name if named else "", known.get(value, "?")) for value in graph.outputs]
    signature = [f"{value.name}:{value.type!r}" for value in graph.inputs] if named else len(graph.inputs)
    return hashlib.blake2b(repr((signature, ends)).encode(), digest_size=16).hexdigest()


def _wanted(node: ir.Node) -> list[bool]:
    """Which outputs a node is asked for: some operators compute others when an optional one is there."""
    return [value.name != "" for value in node.outputs]


def _structure_of_attribute(attribute: ir.Attr, known: dict[ir.Value, str], depth: int) -> object:
    graphs = list(_graphs_of(attribute))
    if graphs:
        return (attribute.name, [_structure(graph, known, depth=depth + 1) for graph in graphs])
    return _attribute(attribute)
