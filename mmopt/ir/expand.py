"""Function bodies: those of local functions, and those that the ONNX standard itself gives for an operator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx
import onnx.shape_inference
import onnx_ir as ir
from onnx import defs

Type = ir.TypeAndShape | None


def standard_body(node: ir.Node, opset: int, types: Sequence[Type] = ()) -> ir.Function | None:
    """The standard's own definition of ``node``, with its attributes bound and the inputs it leaves out absent.

    The body states the operator sets that its nodes follow, which may differ from the model's.

    Args:
        node: A node of a standard operator.
        opset: Version of its operator set in the model.
        types: What is known of its inputs, for definitions that depend on it; what the model states when empty.

    Returns:
        A function with at most as many outputs as ``node``, or ``None`` when the standard defines none.
    """
    try:
        schema = defs.get_schema(node.op_type, opset, node.domain)
    except defs.SchemaError:
        return None
    found = _fixed_definition(schema, opset) or _definition_of(schema, node, opset, types)
    if found is None:
        return None
    _make_every_output(found, len(node.outputs))
    default = {
        name: ir.serde.deserialize_attribute(attribute.default_value)
        for name, attribute in schema.attributes.items()
        if attribute.default_value.type != onnx.AttributeProto.UNDEFINED
    }
    return instantiate(ir.serde.deserialize_function(found), node, default)


def contradiction(node: ir.Node, opset: int, types: Sequence[Type]) -> str:
    """Why the standard does not allow ``node`` with inputs of these types, or "" where it may.

    Control flow is not judged: what its bodies hold is, node by node, and may be calls of the model's own functions.
    """
    if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
        return ""
    try:
        schema = defs.get_schema(node.op_type, opset, node.domain)
        known = {str(v.name): _type_proto(t) for v, t in zip(node.inputs, types, strict=True) if v is not None and t}
        onnx.shape_inference.infer_node_outputs(schema, ir.serde.serialize_node(node), known)
    except onnx.shape_inference.InferenceError as error:
        return str(error).splitlines()[0]
    except (defs.SchemaError, KeyError, ValueError, TypeError):
        return ""
    return ""


def instantiate(function: ir.Function, node: ir.Node, defaults: Mapping[str, ir.Attr] | None = None) -> ir.Function:
    """``function`` as ``node`` calls it: attributes bound, inputs that the call leaves out absent in the body.

    Args:
        function: A local or standard function; it is unchanged.
        node: The call.
        defaults: Values of attributes that neither the call nor the function gives.
    """
    given = [*node.inputs, *[None] * (len(function.inputs) - len(node.inputs))]
    if not function.attributes and not defaults and None not in given:
        return function
    bound = {**(defaults or {}), **{name: a for name, a in function.attributes.items() if a.value is not None}}
    bound.update(node.attributes)
    made = function.clone()
    absent = {formal for formal, actual in zip(made.inputs, given, strict=False) if actual is None}
    for inner in ir.traversal.RecursiveGraphIterator(made.graph):
        _bind(inner, bound)
        for position, value in enumerate(inner.inputs):
            if value in absent:
                inner.replace_input_with(position, None)
    return made


def _bind(node: ir.Node, bound: Mapping[str, ir.Attr]) -> None:
    """Replace references to attributes of the function; a reference to one that is not given means its absence."""
    for name, attribute in list(node.attributes.items()):
        if not attribute.is_ref():
            continue
        actual = bound.get(str(attribute.ref_attr_name))
        if actual is None:
            del node.attributes[name]
        else:
            node.attributes[name] = ir.Attr(name, actual.type, actual.value)


def _fixed_definition(schema: Any, opset: int) -> onnx.FunctionProto | None:
    if not schema.has_function:
        return None
    version = _version(schema.function_opset_versions, opset)
    return _parsed(schema.get_function_with_opset_version(version))


def _definition_of(schema: Any, node: ir.Node, opset: int, types: Sequence[Type]) -> onnx.FunctionProto | None:
    if not schema.has_context_dependent_function:
        return None
    version = _version(schema.context_dependent_function_opset_versions, opset)
    known = types or [None if v is None else ir.TypeAndShape(v.type, v.shape) for v in node.inputs]
    protos = [_type_proto(t).SerializeToString() for t in known]
    call = ir.serde.serialize_node(node).SerializeToString()
    return _parsed(schema.get_context_dependent_function_with_opset_version(version, call, protos))


def _version(versions: Sequence[int], opset: int) -> int:
    """The definition for ``opset``: all of them define the same operator, with nodes of different ages."""
    return max((v for v in versions if v <= opset), default=min(versions))


def _parsed(data: bytes) -> onnx.FunctionProto | None:
    proto = onnx.FunctionProto()
    proto.ParseFromString(data)
    return proto if proto.node else None


def _type_proto(known: Type) -> onnx.TypeProto:
    proto = onnx.TypeProto()
    if known is not None and known.type is not None:
        ir.serde.serialize_type_into(proto, known.type)
        if known.shape is not None:
            ir.serde.serialize_shape_into(proto, known.shape)
    return proto


def _make_every_output(proto: onnx.FunctionProto, count: int) -> None:
    """Drop outputs the call does not have; what the definition leaves unmade (nobody reads it) becomes a copy."""
    del proto.output[count:]
    made = {*proto.input, *(name for node in proto.node for name in node.output)}
    for name in proto.output:
        if name not in made:
            proto.node.append(onnx.helper.make_node("Identity", [proto.input[0]], [name]))
