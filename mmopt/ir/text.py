"""The readable form of a module: one line a node, weights as a short hash.

    opset 23 · ir 11
    graph main(%x: f32[batch,8]) -> (%y: f32[batch,3]) {
      %w: f32[8,3] = weight 5f0a1c22d3e4b596
      %y: f32[batch,3] = MatMul(%x, %w)  # head
    }

The text follows from the module alone: attributes and metadata are sorted, the rest stands in the module's own order,
and numbers are written so that reading them back gives the same bits. Constants of up to eight elements are shown by
value. What follows ``#`` is the node's place in the source model's module tree.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import onnx_ir as ir

from mmopt.ir.fingerprint import tensor_digest
from mmopt.ir.module import MODULE_PATH_KEY, Module

_SHOWN_ELEMENTS = 8
_DIGEST_DIGITS = 16
_INDENT = "  "

_DTYPES = {
    "FLOAT": "f32",
    "DOUBLE": "f64",
    "FLOAT16": "f16",
    "BFLOAT16": "bf16",
    "STRING": "str",
    "UNDEFINED": "?",
    "COMPLEX64": "c64",
    "COMPLEX128": "c128",
}

_PLAIN_NAME = re.compile(r"[\w./:\-]+")


def to_text(module: Module) -> str:
    """The module as text, deterministic, ending in a newline. Weights are read once and their hashes remembered."""
    return "".join(f"{line}\n" for line, _ in _lines(module.model))


def annotate(module: Module, notes: Mapping[str, str], *, context: int | None = None) -> str:
    """The module as text with messages below the nodes they are about.

    Args:
        module: The module.
        notes: Messages by node name (by the name of the first output for a node that has none).
        context: Show only so many lines around each note; None shows all.

    Returns:
        The text; notes about no node of the module stand at its end.
    """
    shown: list[tuple[str, bool]] = []
    open_notes = dict(notes)
    for line, node in _lines(module.model):
        label = "" if node is None else node.name or (node.outputs[0].name if node.outputs else "") or ""
        message = open_notes.pop(label, None) if label else None
        shown.append((line, False))
        if message is not None:
            margin = " " * (len(line) - len(line.lstrip()))
            first, *rest = message.splitlines() or [""]
            shown.append((f"{margin}^ {first}", True))
            shown.extend((f"{margin}  {more}", True) for more in rest)
    shown.extend((f"^ {label}: {message}", True) for label, message in open_notes.items())
    return "".join(f"{line}\n" for line in _near(shown, context))


def _near(lines: list[tuple[str, bool]], context: int | None) -> Iterator[str]:
    """Lines within ``context`` of a marked one, with ``…`` for those left out."""
    marked = [index for index, (_, mark) in enumerate(lines) if mark]
    keep = {near for index in marked for near in range(index - (context or 0), index + (context or 0) + 1)}
    hidden = False
    for index, (line, _) in enumerate(lines):
        if context is None or index in keep:
            hidden = False
            yield line
        elif not hidden:
            hidden = True
            yield "…"


_Line = tuple[str, "ir.Node | None"]


def _lines(model: ir.Model) -> Iterator[_Line]:
    yield f"{_imports(model.opset_imports)} · ir {model.ir_version}", None
    for key, value in sorted(model.metadata_props.items()):
        yield f"meta {key} = {_quoted(value)}", None
    yield from _graph(model.graph, "graph", "")
    for identifier in sorted(model.functions):
        yield "", None
        yield from _function(model.functions[identifier])


def _imports(imports: Mapping[str, int]) -> str:
    return ", ".join(
        f"opset {version}" if not domain else f"{domain} {version}" for domain, version in sorted(imports.items())
    )


def _function(function: ir.Function) -> Iterator[_Line]:
    name = ":".join(part for part in (f"{function.domain}.{function.name}", function.overload) if part)
    formals = [
        attr.name if attr.value is None else f"{attr.name}={_attribute(attr)}"
        for _, attr in sorted(function.attributes.items())
    ]
    header = f" {{{', '.join(formals)}}}" if formals else ""
    heading = f"function {_name(name)}{header} [{_imports(function.opset_imports)}]"
    yield from _body(function.inputs, function.outputs, {}, function, heading, "")


def _graph(graph: ir.Graph, keyword: str, margin: str) -> Iterator[_Line]:
    heading = f"{keyword} {_name(graph.name)}" if graph.name else keyword
    yield from _body(graph.inputs, graph.outputs, graph.initializers, graph, heading, margin)


def _body(
    inputs: Iterable[ir.Value],
    outputs: Iterable[ir.Value],
    initializers: Mapping[str, ir.Value],
    nodes: Iterable[ir.Node],
    heading: str,
    margin: str,
) -> Iterator[_Line]:
    yield f"{margin}{heading}({_typed(inputs)}) -> ({_typed(outputs)}) {{", None
    inner = margin + _INDENT
    for value in initializers.values():
        default = "default " if value.is_graph_input() else ""
        yield f"{inner}{_result(value)} = {default}{_weight(value.const_value)}", None
    for node in nodes:
        yield from _node(node, inner)
    yield f"{margin}}}", None


def _node(node: ir.Node, margin: str) -> Iterator[_Line]:
    results = ", ".join(_result(value) for value in node.outputs)
    operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    operator = f"{operator}:{node.overload}" if node.overload else operator
    operands = ", ".join("_" if value is None else _value(value) for value in node.inputs)
    plain = [(name, attr) for name, attr in sorted(node.attributes.items()) if attr.is_ref() or not _graphs(attr)]
    attributes = ", ".join(f"{name}={_attribute(attr)}" for name, attr in plain)
    line = f"{margin}{results} = {_name(operator)}({operands})" + (f" {{{attributes}}}" if attributes else "")
    path = node.metadata_props.get(MODULE_PATH_KEY, "")
    yield line + (f"  # {path}" if path else ""), node
    for name, attr in sorted(node.attributes.items()):
        for graph in _graphs(attr):
            yield from _graph(graph, f"{name}:", margin + _INDENT)


def _graphs(attr: ir.Attr) -> tuple[ir.Graph, ...]:
    if attr.is_ref() or attr.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        return ()
    return (attr.as_graph(),) if attr.type == ir.AttributeType.GRAPH else tuple(attr.as_graphs())


def _typed(values: Iterable[ir.Value]) -> str:
    return ", ".join(_result(value) for value in values)


def _result(value: ir.Value) -> str:
    """``%name: f32[2,3]``; only the name where the type is not known, ``_`` for an output that is left out."""
    if not value.name:
        return "_"
    kind = type_text(value)
    return f"{_value(value)}: {kind}" if kind else _value(value)


def _value(value: ir.Value) -> str:
    return f"%{_name(value.name or '')}"


def type_text(value: ir.Value) -> str:
    """Type and shape of a value: ``f32[batch,8]``, ``i64[]``, ``f32`` (any shape), ``seq(f32[?,8])``; "" if unknown."""
    if value.type is None:
        return "" if value.shape is None else f"?{_shape(value.shape)}"
    wrappers, kind = [], value.type
    while isinstance(kind, (ir.SequenceType, ir.OptionalType)):
        wrappers.append("seq" if isinstance(kind, ir.SequenceType) else "opt")
        kind = kind.elem_type
    if isinstance(kind, ir.SparseTensorType):
        wrappers.append("sparse")
    text = dtype_text(kind.dtype) + _shape(value.shape)
    for wrapper in reversed(wrappers):
        text = f"{wrapper}({text})"
    return text


def dtype_text(dtype: ir.DataType) -> str:
    """Short name of a dtype: ``f32``, ``bf16``, ``i64``, ``u4``, ``f8e4m3fn``, ``bool``."""
    name = dtype.name
    if name in _DTYPES:
        return _DTYPES[name]
    for long, short in (("UINT", "u"), ("INT", "i"), ("FLOAT", "f")):
        if name.startswith(long):
            return short + name[len(long) :].lower()
    return name.lower()


def _shape(shape: ir.ShapeProtocol | None) -> str:
    if shape is None:
        return ""
    dims = [str(dim) if isinstance(dim, int) else dim.value or "?" for dim in shape]
    return f"[{','.join(dims)}]"


def _weight(tensor: ir.TensorProtocol | None) -> str:
    return "weight ?" if tensor is None else _content(tensor, "weight ")


def _content(tensor: ir.TensorProtocol, keyword: str = "") -> str:
    if tensor.size > _SHOWN_ELEMENTS:
        return f"{keyword}{tensor_digest(tensor)[:_DIGEST_DIGITS]}"
    elements = [_element(item, tensor.dtype) for item in tensor.numpy().reshape(-1)]
    return elements[0] if not len(tensor.shape) and elements else f"[{', '.join(elements)}]"


def _element(item: object, dtype: ir.DataType) -> str:
    if isinstance(item, (bytes, str)):
        return _quoted(item)
    if dtype == ir.DataType.BOOL:
        return "true" if item else "false"
    return _float(item) if dtype.is_floating_point() else str(item)


def _float(item: object) -> str:
    """Shortest digits that give the same value back in the item's own dtype; always recognisable as a float."""
    text = str(item)
    return text if any(mark in text for mark in ".eijn") else f"{text}.0"


def _attribute(attr: ir.Attr) -> str:
    kind, value = attr.type, attr.value
    if attr.is_ref():
        return f"@{attr.ref_attr_name}"
    if kind == ir.AttributeType.FLOAT:
        return _float(np.float32(attr.as_float()))
    if kind == ir.AttributeType.FLOATS:
        return f"[{', '.join(_float(np.float32(item)) for item in attr.as_floats())}]"
    if kind == ir.AttributeType.TENSOR:
        return _tensor(attr.as_tensor())
    if kind == ir.AttributeType.TENSORS:
        return f"[{', '.join(map(_tensor, attr.as_tensors()))}]"
    if kind in (ir.AttributeType.STRING, ir.AttributeType.STRINGS):
        strings = [value] if kind == ir.AttributeType.STRING else list(value)
        quoted = ", ".join(map(_quoted, strings))
        return quoted if kind == ir.AttributeType.STRING else f"[{quoted}]"
    if kind == ir.AttributeType.INTS:
        return f"[{', '.join(map(str, attr.as_ints()))}]"
    return str(value)


def _tensor(tensor: ir.TensorProtocol) -> str:
    return f"{dtype_text(tensor.dtype)}{_shape(tensor.shape)} {_content(tensor)}"


def _name(name: str) -> str:
    return name if _PLAIN_NAME.fullmatch(name) else _quoted(name)


def _quoted(text: str | bytes) -> str:
    decoded = text.decode("utf-8", "backslashreplace") if isinstance(text, bytes) else text
    return '"' + decoded.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
