"""Shows a module as an ``onnx_graphsurgeon`` graph, for passes written that way, and takes the graph back.

Neither graphsurgeon's importer nor its exporter is used: they drop metadata, types of sequences and optionals, and
some attribute kinds, and they copy weights. Here each graphsurgeon object remembers the object it shows, and what a
pass left alone comes back as it was. Weights are loaded when a pass looks at them, as read-only arrays.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
from onnx_ir.passes import common

from mmopt.errors import PassError
from mmopt.frontends.opset import schema
from mmopt.ir.module import Module

_ORIGIN = "_mmopt_origin"
"""Attribute of a graphsurgeon object that holds the onnx_ir object it shows."""

_LAZY = "_mmopt_lazy"
"""Attribute of a Constant that holds the :class:`_Weight` it was made with."""

_PLAIN = {
    ir.AttributeType.FLOAT: float,
    ir.AttributeType.INT: int,
    ir.AttributeType.STRING: str,
    ir.AttributeType.FLOATS: list,
    ir.AttributeType.INTS: list,
    ir.AttributeType.STRINGS: list,
}
_REFERENCED = {float: ir.AttributeType.FLOAT, int: ir.AttributeType.INT, str: ir.AttributeType.STRING}


class _Weight(gs.ir.tensor.LazyValues):  # type: ignore[misc]
    """A weight that is read when a pass asks for it."""

    def __init__(self, source: ir.TensorProtocol) -> None:
        self.source = source
        self.shape = list(source.shape.numpy())
        self.dtype = _surgeon_dtype(source.dtype)
        self.nbytes = source.nbytes
        self.loaded: np.ndarray | None = None

    @property
    def tensor(self) -> onnx.TensorProto:
        """The weight as graphsurgeon's own exporter (behind ``fold_constants``) wants it."""
        proto: onnx.TensorProto = ir.to_proto(self.source)
        return proto

    def load(self) -> np.ndarray:
        """The values; a pass that wants to change them makes a copy."""
        if self.loaded is None:
            self.loaded = self.source.numpy().view()
            self.loaded.flags.writeable = False
        return self.loaded


def to_graphsurgeon(module: Module) -> gs.Graph:
    """Show ``module`` as a graphsurgeon graph. The module is not changed by changes to the graph.

    Weights are ``Constant`` tensors whose ``values`` are read-only numpy arrays, loaded when first used (dtypes that
    numpy lacks, such as bfloat16 and int4, as ``ml_dtypes``). Attributes of kinds graphsurgeon does not know are
    left as ``onnx_ir.Attr`` objects; they may be moved about. There is no need to sort or clean up the graph before it
    is taken back.
    """
    model = module.model
    functions = [_function(function) for function in model.functions.values()]
    graph = _graph(model.graph, {}, dict(model.opset_imports), functions)
    graph.producer_name, graph.producer_version = model.producer_name or "", model.producer_version or ""
    graph.ir_version = model.ir_version
    return graph


def _function(function: ir.Function) -> gs.Function:
    seen: dict[int, gs.Tensor] = {}
    shown = gs.Function(
        function.name,
        domain=function.domain,
        inputs=[_tensor(value, seen) for value in function.inputs],
        nodes=[_node(node, seen, dict(function.opset_imports)) for node in function],
        outputs=[_tensor(value, seen) for value in function.outputs],
        doc_string=function.doc_string,
        opset=function.opset_imports.get("", 0),
        import_domains=_imports(function.opset_imports),
        attrs={
            name: None if attr.value is None else _plain(attr, {}, {}) for name, attr in function.attributes.items()
        },
    )
    shown.__dict__[_ORIGIN] = function
    return shown


def _graph(
    graph: ir.Graph, seen: dict[int, gs.Tensor], imports: Mapping[str, int], functions: Sequence[gs.Function] = ()
) -> gs.Graph:
    shown = gs.Graph(
        inputs=[_tensor(value, seen) for value in graph.inputs],
        nodes=[_node(node, seen, imports) for node in graph],
        outputs=[_tensor(value, seen) for value in graph.outputs],
        name=graph.name,
        doc_string=graph.doc_string,
        opset=imports.get("", 0),
        import_domains=_imports(imports),
        functions=functions,
    )
    shown.__dict__[_ORIGIN] = graph
    return shown


def _imports(imports: Mapping[str, int]) -> list[onnx.OperatorSetIdProto]:
    return [onnx.helper.make_opsetid(domain, version) for domain, version in imports.items()]


def _node(node: ir.Node, seen: dict[int, gs.Tensor], imports: Mapping[str, int]) -> gs.Node:
    shown = gs.Node(
        node.op_type,
        name=node.name,
        attrs={name: _plain(attr, seen, imports) for name, attr in node.attributes.items()},
        inputs=[gs.Variable.empty() if value is None else _tensor(value, seen) for value in node.inputs],
        outputs=[_tensor(value, seen) for value in node.outputs],
        domain=node.domain or None,
    )
    shown.__dict__[_ORIGIN] = node
    return shown


def _tensor(value: ir.Value, seen: dict[int, gs.Tensor]) -> gs.Tensor:
    shown = seen.get(id(value))
    if shown is None:
        if value.const_value is not None and value.producer() is None and not value.is_graph_input():
            weight = _Weight(value.const_value)
            shown = gs.Constant(value.name, weight)
            shown.__dict__[_LAZY] = weight
        else:
            shown = gs.Variable(value.name or "", *_surgeon_type(value))
        shown.__dict__[_ORIGIN] = value
        seen[id(value)] = shown
    return shown


def _surgeon_type(value: ir.Value) -> tuple[Any, list[int | str | None] | None, str]:
    """dtype, shape and kind of a value in graphsurgeon's terms."""
    kind = value.type
    name = "tensor_type"
    if isinstance(kind, (ir.SequenceType, ir.OptionalType)):
        name = "sequence_type" if isinstance(kind, ir.SequenceType) else "optional_type"
    dtype = None if kind is None else _surgeon_dtype(kind.dtype)
    shape = None if value.shape is None else [d if isinstance(d, int) else d.value for d in value.shape]
    return dtype, shape, name


def _surgeon_dtype(dtype: ir.DataType) -> Any:
    """As graphsurgeon has it: a numpy dtype, or the number of the ONNX dtype where numpy itself has none."""
    numpy = dtype.numpy()
    return numpy if numpy.isbuiltin == 1 or dtype == ir.DataType.STRING else int(dtype)


def _plain(attr: ir.Attr, seen: dict[int, gs.Tensor], imports: Mapping[str, int]) -> Any:
    if attr.is_ref():
        kinds = {number: kind for kind, number in _REFERENCED.items()}
        kind = kinds.get(attr.type)
        return attr if kind is None else gs.Node.AttributeRef(attr.ref_attr_name, kind)
    if attr.type in _PLAIN:
        return _PLAIN[attr.type](attr.value)
    if attr.type == ir.AttributeType.TENSOR:
        weight = _Weight(attr.as_tensor())
        shown = gs.Constant(attr.as_tensor().name or "", weight)
        shown.__dict__[_LAZY] = weight
        return shown
    return _graph(attr.as_graph(), seen, imports) if attr.type == ir.AttributeType.GRAPH else attr


def from_graphsurgeon(graph: gs.Graph, like: Module) -> Module:
    """Take a graphsurgeon graph back.

    Nodes, tensors and graphs that come from :func:`to_graphsurgeon` keep their metadata, doc strings, exact types and
    weights; those that lost their identity (``graph.copy()``) are found by name. Nodes are put in topological order.

    Args:
        graph: The graph, changed or not.
        like: The module it was made from; it is not changed. Modalities, remarks and provenance are taken from it.

    Raises:
        PassError: When the graph is no model: a tensor without a producer, two tensors of one name, a dtype or an
            attribute that ONNX does not have.
    """
    builder = _Builder(like)
    functions = [builder.function(function) for function in graph.functions]
    main = builder.graph(graph, {}, like.graph)
    main.opset_imports.update(_opsets(graph))
    old = like.model
    model = ir.Model(
        main,
        ir_version=graph.ir_version or old.ir_version,
        producer_name=graph.producer_name or old.producer_name,
        producer_version=graph.producer_version or old.producer_version,
        domain=old.domain,
        model_version=old.model_version,
        doc_string=old.doc_string,
        functions=functions,
        metadata_props=dict(old.metadata_props),
        device_configurations=old.device_configurations,
    )
    try:
        common.TopologicalSortPass()(model)
    except Exception as error:
        raise PassError("the graph has a cycle", hint="a node uses, through others, what it computes") from error
    return Module(model, dict(like.modalities), list(like.remarks), list(like.provenance))


def _opsets(graph: gs.Graph) -> dict[str, int]:
    imports = {entry.domain: entry.version for entry in graph.import_domains or ()}
    if graph.opset:
        imports[""] = graph.opset
    for node in graph.nodes:
        imports.setdefault(node.domain or "", 1)
    return imports


class _Builder:
    """Builds onnx_ir objects from graphsurgeon ones, with what the original module knows about them."""

    def __init__(self, like: Module) -> None:
        scopes: list[ir.Graph | ir.Function] = [like.graph, *like.model.functions.values()]
        nodes = [node for scope in scopes for node in scope.all_nodes()]
        self._values = {value.name: value for node in nodes for value in node.outputs}
        for graph in like.model.graphs():
            self._values |= {value.name: value for value in (*graph.inputs, *graph.initializers.values())}
        self._nodes = {node.name: node for node in nodes}
        self._opset = like.opset

    def function(self, shown: gs.Function) -> ir.Function:
        origin = shown.__dict__.get(_ORIGIN)
        body = self._body(shown, {}, None)
        body.opset_imports.update(_opsets(shown))
        constants = [self._constant_node(value) for value in list(body.initializers.values())]
        body.initializers.clear()
        if len(body):
            body.insert_before(body[0], constants)
        else:
            body.extend(constants)
        body.doc_string = shown.doc_string or None
        attributes = [
            origin.attributes[name]
            if origin is not None and name in origin.attributes
            else ir.Attr(name, ir.AttributeType.UNDEFINED, None)
            if value is None
            else _inferred(name, value, f"function {shown.name!r}")
            for name, value in shown.attrs.items()
        ]
        overload = "" if origin is None else origin.overload
        function = ir.Function(shown.domain, shown.name, overload, graph=body, attributes=attributes)
        if origin is not None:
            function.metadata_props.update(origin.metadata_props)
        return function

    def _constant_node(self, value: ir.Value) -> ir.Node:
        assert value.const_value is not None
        node = ir.Node("", "Constant", [], [ir.AttrTensor("value", value.const_value)], name=value.name)
        node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = value.name, value.type, value.shape
        ir.convenience.replace_all_uses_with(value, node.outputs[0])
        return node

    def graph(self, shown: gs.Graph, outer: Mapping[int, ir.Value], origin: ir.Graph | None) -> ir.Graph:
        origin = shown.__dict__.get(_ORIGIN, origin)
        graph = self._body(shown, outer, origin)
        if origin is not None:
            graph.metadata_props.update(origin.metadata_props)
        return graph

    def _body(self, shown: gs.Graph, outer: Mapping[int, ir.Value], origin: ir.Graph | None) -> ir.Graph:
        scope, initializers = _Scope(self, outer, shown.name), []
        inputs = [scope.define(tensor) for tensor in shown.inputs]
        outputs_of = [[scope.define(tensor) for tensor in node.outputs] for node in shown.nodes]
        for tensor in _own_constants(shown, origin):
            if id(tensor) not in scope.values and id(tensor) not in outer:
                initializers.append(scope.define(tensor))
        nodes = [self._node(node, scope, outputs) for node, outputs in zip(shown.nodes, outputs_of, strict=True)]
        outputs = [scope.look_up(tensor, "an output of the graph") for tensor in shown.outputs]
        initializers += _carried_over(origin, inputs, scope)
        if origin is not None:
            rank = {name: index for index, name in enumerate(origin.initializers)}
            initializers.sort(key=lambda value: rank.get(str(value.name), len(rank)))
        return ir.Graph(
            inputs,
            outputs,
            nodes=nodes,
            initializers=initializers,
            name=shown.name,
            doc_string=shown.doc_string or None,
        )

    def _node(self, shown: gs.Node, scope: _Scope, outputs: list[ir.Value]) -> ir.Node:
        origin = shown.__dict__.get(_ORIGIN)
        if origin is None and shown.name:
            named = self._nodes.get(shown.name)
            origin = named if named is not None and named.op_type == shown.op else None
        inputs = [None if tensor.is_empty() else scope.look_up(tensor, _label(shown)) for tensor in shown.inputs]
        attributes = [self._attribute(shown, name, value, origin, scope) for name, value in shown.attrs.items()]
        node = ir.Node(shown.domain or "", shown.op, inputs, attributes, outputs=outputs, name=shown.name)
        if origin is not None:
            node.doc_string, node.version = origin.doc_string, origin.version
            node.overload, node.device_configurations = origin.overload, origin.device_configurations
            node.metadata_props.update(origin.metadata_props)
        return node

    def _attribute(self, shown: gs.Node, name: str, value: Any, origin: ir.Node | None, scope: _Scope) -> ir.Attr:
        label = _label(shown)
        old = None if origin is None else origin.attributes.get(name)
        if isinstance(value, gs.Graph):
            inner = old.as_graph() if old is not None and old.type == ir.AttributeType.GRAPH else None
            return ir.AttrGraph(name, self.graph(value, scope.visible(), inner))
        if isinstance(value, ir.Attr):
            return value if value.name == name else ir.Attr(name, value.type, value.value)
        if isinstance(value, gs.Constant):
            tensor = _weight(value, label)
            return old if old is not None and old.value is tensor else ir.AttrTensor(name, tensor)
        if old is not None and not isinstance(value, np.ndarray) and _same_plain(_plain(old, {}, {}), value):
            return old
        return _inferred(name, value, label, old.type if old is not None else self._attribute_type(shown, name))

    def _attribute_type(self, shown: gs.Node, name: str) -> ir.AttributeType | None:
        """The type the standard gives the attribute of an operator, so that ``1`` for a float becomes ``1.0``."""
        known = None if shown.domain else schema(shown.op, self._opset)
        formal = None if known is None else known.attributes.get(name)
        return None if formal is None else ir.AttributeType(int(formal.type))  # type: ignore[call-overload]

    def typed(self, value: ir.Value, tensor: gs.Tensor) -> ir.Value:
        """Give ``value`` the type, shape, weight and metadata that ``tensor`` stands for."""
        origin = tensor.__dict__.get(_ORIGIN) or self._values.get(tensor.name)
        if isinstance(tensor, gs.Constant):
            value.const_value = _weight(tensor, f"tensor {tensor.name!r}")
            value.type, value.shape = ir.TensorType(value.const_value.dtype), ir.Shape(value.const_value.shape.numpy())
        elif origin is not None and _surgeon_type(origin) == (tensor.dtype, _listed(tensor.shape), tensor.type):
            value.type = origin.type
            value.shape = None if origin.shape is None else origin.shape.copy()
        else:
            dtype = None if tensor.dtype is None else ir.TensorType(_dtype(tensor.dtype, f"tensor {tensor.name!r}"))
            value.type = ir.SequenceType(dtype) if tensor.type == "sequence_type" and dtype else dtype
            dims = _listed(tensor.shape)
            value.shape = None if dims is None else ir.Shape([None if dim == -1 else dim for dim in dims])
        if origin is not None:
            value.doc_string = origin.doc_string
            value.metadata_props.update(origin.metadata_props)
            value.meta.update(origin.meta)
        return value


class _Scope:
    """The values of one graph by graphsurgeon tensor, and those of the graphs around it."""

    def __init__(self, builder: _Builder, outer: Mapping[int, ir.Value], name: str) -> None:
        self._builder, self._outer, self._name = builder, outer, name
        self.values: dict[int, ir.Value] = {}
        self.names: set[str] = set()

    def define(self, tensor: gs.Tensor) -> ir.Value:
        if tensor.name and tensor.name in self.names:
            what = f"graph {self._name!r} has two tensors named {tensor.name!r}"
            raise PassError(what, hint="give every new tensor a name of its own, and every tensor one producer")
        value = self._builder.typed(ir.Value(name=tensor.name), tensor)
        self.names.add(tensor.name)
        self.values[id(tensor)] = value
        return value

    def look_up(self, tensor: gs.Tensor, user: str) -> ir.Value:
        value = self.values.get(id(tensor), self._outer.get(id(tensor)))
        if value is None:
            hint = "add the node that computes it to graph.nodes, or make it an input or a Constant"
            raise PassError(f"nothing produces tensor {tensor.name!r}, which {user} uses", hint=hint)
        return value

    def visible(self) -> dict[int, ir.Value]:
        return {**self._outer, **self.values}


def _own_constants(shown: gs.Graph, origin: ir.Graph | None) -> Iterator[gs.Constant]:
    """Constants that the graph's nodes use, then those of the original graph that only graphs nested in it use."""
    for tensor in (*(tensor for node in shown.nodes for tensor in node.inputs), *shown.outputs):
        if isinstance(tensor, gs.Constant):
            yield tensor
    owned = set() if origin is None else {id(value) for value in origin.initializers.values()}
    for inner in shown.subgraphs(recursive=True) if owned else ():
        for tensor in (*(tensor for node in inner.nodes for tensor in node.inputs), *inner.outputs):
            if isinstance(tensor, gs.Constant) and id(tensor.__dict__.get(_ORIGIN)) in owned:
                yield tensor


def _carried_over(origin: ir.Graph | None, inputs: Iterable[ir.Value], scope: _Scope) -> list[ir.Value]:
    """Initializers that graphsurgeon cannot show: defaults of inputs, and weights that nothing used before either."""
    if origin is None:
        return []
    by_name = {value.name: value for value in inputs}
    carried = []
    for name, old in origin.initializers.items():
        if name in by_name:
            by_name[name].const_value = old.const_value
            carried.append(by_name[name])
        elif name not in scope.names and not old.uses() and not old.is_graph_output():
            value = ir.Value(name=name, type=old.type, shape=old.shape, const_value=old.const_value)
            value.metadata_props.update(old.metadata_props)
            carried.append(value)
    return carried


def _listed(shape: Any) -> list[Any] | None:
    return None if shape is None else list(shape)


def _weight(tensor: gs.Constant, where: str) -> ir.TensorProtocol:
    """The tensor of a Constant: the original one where its values were not replaced."""
    lazy: _Weight | None = tensor.__dict__.get(_LAZY)
    values, wanted = tensor._values, tensor._export_dtype
    if lazy is not None and wanted is None and (values is lazy or values is lazy.loaded):
        return lazy.source
    if isinstance(values, _Weight) and wanted is None:
        return values.source
    array = tensor.values
    if wanted is not None:
        array = array.astype(_dtype(wanted, where).numpy())
    _dtype(array.dtype, where)
    return ir.tensor(array, name=tensor.name)


def _dtype(dtype: Any, where: str) -> ir.DataType:
    try:
        return ir.DataType(dtype) if isinstance(dtype, int) else ir.DataType.from_numpy(np.dtype(dtype))
    except (TypeError, ValueError):
        hint = "use a numpy dtype, one of ml_dtypes, or an onnx.TensorProto number"
        raise PassError(f"{dtype} is no ONNX dtype", where=where, hint=hint) from None


def _same_plain(old: Any, new: Any) -> bool:
    """Equal, and of the same kind: ``1`` is not ``1.0`` for an attribute."""
    if isinstance(old, list) and isinstance(new, (list, tuple)):
        return len(old) == len(new) and all(type(a) is type(b) and a == b for a, b in zip(old, new, strict=True))
    return type(old) is type(new) and bool(old == new)


def _label(node: gs.Node) -> str:
    return f"node {node.name!r} ({node.op})"


def _inferred(name: str, value: Any, where: str, wanted: ir.AttributeType | None = None) -> ir.Attr:
    """An attribute from the Python value a pass wrote, of the type ``wanted`` where the value fits it."""
    if wanted == ir.AttributeType.FLOAT and isinstance(value, int):
        value = float(value)
    elif wanted == ir.AttributeType.FLOATS and isinstance(value, (list, tuple)):
        value = [float(item) for item in value]
    if isinstance(value, gs.Node.AttributeRef):
        kind = _REFERENCED.get(value.type)
        if kind is not None:
            return ir.RefAttr(name, value.name, kind)
    elif isinstance(value, np.ndarray):
        return ir.AttrTensor(name, ir.tensor(value))
    elif isinstance(value, (type, np.dtype)):
        return ir.AttrInt64(name, int(_dtype(value, where)))
    elif isinstance(value, np.generic):
        value = value.item()
    try:
        empty = isinstance(value, (list, tuple)) and not value
        return ir.convenience.convert_attribute(name, value, (wanted or ir.AttributeType.INTS) if empty else None)
    except (TypeError, ValueError):
        what = f"attribute {name!r} has a value ONNX cannot hold: {type(value).__name__}"
        raise PassError(what, where=where, hint="use int, float, str, lists of them, numpy arrays or graphs") from None
