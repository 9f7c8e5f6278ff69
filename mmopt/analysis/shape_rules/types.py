"""Element types from operator schemas, and the onnx library's own inference for what has no rule here.

The library is asked for one node at a time, with small constants only, so no weight is ever serialized.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import onnx
import onnx_ir as ir

from mmopt.analysis.dims import Size, parse_dim
from mmopt.analysis.shape_rules.registry import MAX_ELEMENTS, NodeView, Shape, constant_tensor

Typed = tuple[Shape, "ir.TypeProtocol | None"]

_NAMES = ("bool", "int64", "int32", "uint8", "string", "double", "float")
_PRIMITIVE = {f"tensor({name})": ir.DataType[name.upper()] for name in _NAMES}


@functools.lru_cache(maxsize=2048)
def schema_of(domain: str, op_type: str, version: int) -> onnx.defs.OpSchema | None:
    """The operator's schema, when the onnx library has one."""
    try:
        return onnx.defs.get_schema(op_type, version, domain)
    except onnx.defs.SchemaError:
        return None


@functools.lru_cache(maxsize=2048)
def _type_sources(domain: str, op_type: str, version: int) -> tuple[int | ir.DataType | None, ...]:
    """Per formal output: the input whose type it has, or its fixed type, or ``None`` when attributes decide."""
    schema = schema_of(domain, op_type, version)
    if schema is None:
        return ()
    inputs = {formal.type_str: i for i, formal in reversed(list(enumerate(schema.inputs)))}
    allowed = {constraint.type_param_str: constraint.allowed_type_strs for constraint in schema.type_constraints}
    sources: list[int | ir.DataType | None] = []
    for formal in schema.outputs:
        only = allowed.get(formal.type_str, [formal.type_str])
        if formal.type_str in inputs:
            sources.append(inputs[formal.type_str])
        else:
            sources.append(_PRIMITIVE.get(only[0]) if len(only) == 1 else None)
    if schema.outputs and schema.outputs[-1].option == onnx.defs.OpSchema.FormalParameterOption.Variadic:
        homogeneous = schema.outputs[-1].is_homogeneous
        sources += [sources[-1] if homogeneous else None] * 64
    return tuple(sources)


def output_types(view: NodeView, types: Sequence[ir.TypeProtocol | None]) -> list[ir.TypeProtocol | None]:
    """Types of a node's outputs as far as the schema alone tells, given those of its inputs."""
    count = len(view.node.outputs)
    for name in ("to", "output_dtype"):
        attribute = view.attribute(name)
        if attribute is not None and attribute.type == ir.AttributeType.INT and attribute.as_int():
            return [ir.TensorType(ir.DataType(attribute.as_int()))] * count
    sources = _type_sources(view.node.domain, view.node.op_type, view.version)[:count]
    found: list[ir.TypeProtocol | None] = []
    for source in sources:
        if isinstance(source, ir.DataType):
            found.append(ir.TensorType(source))
        else:
            found.append(types[source] if source is not None and source < len(types) else None)
    return found + [None] * (count - len(found))


def infer_by_onnx(view: NodeView, types: Sequence[ir.TypeProtocol | None]) -> list[Typed] | None:
    """Shapes and types of a node's outputs by the onnx library; ``None`` when it does not know the node."""
    node = view.node
    schema = schema_of(node.domain, node.op_type, view.version)
    if schema is None or not schema.has_type_and_shape_inference_function:
        return None
    names = ["" if value is None else f"i{i}" for i, value in enumerate(node.inputs)]
    if any(name and types[i] is None for i, name in enumerate(names)):
        return None
    proto = onnx.NodeProto(op_type=node.op_type, domain=node.domain, input=names)
    proto.output.extend(f"o{i}" for i in range(len(node.outputs)))
    for name in node.attributes:
        attribute = view.attribute(name)
        if attribute is not None:
            serialized = ir.serde.serialize_attribute(attribute)
            serialized.name = name
            proto.attribute.append(serialized)
    protos = {n: _type_proto(types[i], view.shape(i)) for i, n in enumerate(names) if n and types[i] is not None}
    data = {name: tensor for i, name in enumerate(names) if name and (tensor := _small_tensor(view, i)) is not None}
    opset = [onnx.helper.make_opsetid(node.domain, view.version)]
    try:
        inferred = onnx.shape_inference.infer_node_outputs(schema, proto, protos, data, None, opset)
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError, RuntimeError, ValueError):
        return None
    found = [_from_proto(inferred.get(name)) for name in proto.output]
    shapes = [shape for i in range(len(names)) if (shape := view.shape(i)) is not None]
    if all(isinstance(dim, int) for shape in shapes for dim in shape):
        return found
    # Some rules of the library read a symbolic size as 0.
    return [(None if s is None else tuple(None if d == 0 else d for d in s), kind) for s, kind in found]


def _type_proto(kind: ir.TypeProtocol | None, shape: Shape) -> onnx.TypeProto:
    proto = ir.serde.serialize_type(kind)  # type: ignore[arg-type]
    if shape is not None:
        ir.serde.serialize_shape_into(proto, to_ir_shape(shape))
    return proto


def _small_tensor(view: NodeView, index: int) -> onnx.TensorProto | None:
    value = view.input(index)
    tensor = constant_tensor(value) if value is not None else None
    if tensor is not None and tensor.size <= MAX_ELEMENTS:
        return ir.serde.serialize_tensor(tensor)
    integers, dtype, shape = view.integers(index), view.dtype(index), view.shape(index)
    if integers is None or dtype is None or shape is None:
        return None
    return onnx.helper.make_tensor("", int(dtype), [len(integers)] * len(shape), integers)


def _from_proto(proto: onnx.TypeProto | None) -> Typed:
    if proto is None or proto.WhichOneof("value") is None:
        return None, None
    kind = ir.serde.deserialize_type_proto_for_type(proto)
    shape = ir.serde.deserialize_type_proto_for_shape(proto)
    undefined = kind is not None and isinstance(kind, ir.TensorType) and kind.dtype == ir.DataType.UNDEFINED
    return from_ir_shape(shape), None if undefined else kind


def from_ir_shape(shape: ir.Shape | None) -> Shape:
    """An annotation as dimensions to calculate with."""
    if shape is None:
        return None
    dims: list[Size | None] = []
    for dim in shape:
        if isinstance(dim, int):
            dims.append(dim)
        else:
            dims.append(parse_dim(dim.value) if dim.value else None)
    return tuple(dims)


def to_ir_shape(shape: tuple[Size | None, ...]) -> ir.Shape:
    """Dimensions as an annotation."""
    return ir.Shape([dim if isinstance(dim, int) else (None if dim is None else str(dim)) for dim in shape])
