"""Structural verifier: is this module a valid ONNX model? Every problem is collected, then shown."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import onnx
import onnx_ir as ir

from mmopt.errors import VerifyError, did_you_mean
from mmopt.ir.module import FUSED_DOMAIN, Module
from mmopt.ir.skeleton import skeleton_proto, weights_as_inputs

_SHOWN = 20
"""Most problems listed in one error message."""


@dataclasses.dataclass(frozen=True)
class Diagnostic:
    """One thing that is wrong with a module.

    Attributes:
        code: Kind of problem, kebab-case: ``undefined-value``, ``stale-shape``, …
        severity: ``error`` when the module is not valid ONNX, ``warning`` when it is, but says something untrue or
            ambiguous about itself (wrong shape annotations, two nodes of one name).
        where: Node (``name (Op)``), value or function it is about.
        message: What is wrong.
        hint: What to do about it, or "".
    """

    code: str
    severity: str
    where: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        text = f"{self.severity}[{self.code}] {self.where}: {self.message}"
        return f"{text}\n    {self.hint}" if self.hint else text


def verify(module: Module, *, infer: bool = True) -> list[Diagnostic]:
    """Check everything about ``module`` that can be checked without running it.

    Args:
        module: The module; it is unchanged afterwards.
        infer: Also compare type and shape annotations with onnx's own inference and run onnx's checker (this builds
            a protobuf without weights; both are skipped when the graph itself is broken).

    Returns:
        All problems, errors first. Empty when the module is valid.
    """
    found: list[Diagnostic] = []
    _Structure(module.model, found.append).check()
    if infer and not any(problem.severity == "error" for problem in found):
        found.extend(_check_protobuf(module.model))
    return sorted(found, key=lambda problem: problem.severity != "error")


def require_valid(module: Module, *, where: str = "") -> None:
    """Raise unless ``module`` is free of errors.

    Args:
        module: The module to check.
        where: What to name as the place: a file or a pass.

    Raises:
        VerifyError: With all errors (the first twenty in the text).
    """
    errors = [problem for problem in verify(module) if problem.severity == "error"]
    if errors:
        raise VerifyError(describe(errors), where=where, hint="the model is not valid ONNX")


def describe(problems: Sequence[Diagnostic]) -> str:
    """``problems`` as text, one below the other."""
    lines = [str(problem) for problem in problems[:_SHOWN]]
    if len(problems) > _SHOWN:
        lines.append(f"… and {len(problems) - _SHOWN} more")
    count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
    return "\n  ".join([f"{count}:", *lines])


def node_label(node: ir.Node) -> str:
    """How messages name a node: ``name (Op)``, or by its first output when it has no name."""
    first = node.outputs[0].name if node.outputs else ""
    operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    return f"{node.name or f'node of {first}'} ({operator})"


class _Structure:
    """Walks the graphs of one model and reports what breaks the rules of the ONNX IR."""

    def __init__(self, model: ir.Model, report: Callable[[Diagnostic], None]) -> None:
        self._model = model
        self._report = report
        self._names: collections.ChainMap[str, str] = collections.ChainMap()
        self._node_names: set[str] = set()
        self._imports: dict[str, int] = model.opset_imports

    def check(self) -> None:
        self._graph(self._model.graph, (), "graph")
        for identifier, function in self._model.functions.items():
            self._imports = function.opset_imports
            self._graph(function.graph, (), f"function {'.'.join(identifier[:2])}")
        self._recursion()

    def _error(self, code: str, where: str, message: str, hint: str = "") -> None:
        self._report(Diagnostic(code, "error", where, message, hint))

    def _warning(self, code: str, where: str, message: str, hint: str = "") -> None:
        self._report(Diagnostic(code, "warning", where, message, hint))

    def _graph(self, graph: ir.Graph, outer: tuple[set[ir.Value], ...], where: str) -> None:
        # Names must differ from those of the graphs around, but sibling branches may use the same ones.
        names, node_names = self._names, self._node_names
        self._names, self._node_names = collections.ChainMap({}, names), set()
        here: set[ir.Value] = set()
        visible = (here, *outer)
        for value in graph.inputs:
            self._define(value, f"input of {where}")
            here.add(value)
        for name, value in graph.initializers.items():
            self._initializer(str(name), value, already=value in here)
            here.add(value)
        # The order of nodes is the order of execution: a value is visible to what comes after its node.
        for node in graph:
            self._node(node, visible)
            here.update(node.outputs)
        self._outputs(graph, visible, where)
        self._names, self._node_names = names, node_names

    def _define(self, value: ir.Value, where: str) -> None:
        if not value.name:
            self._error("unnamed-value", where, "a value has no name", "give it a fresh name")
            return
        first = self._names.get(value.name)
        if first is None:
            self._names[value.name] = where
            return
        self._error(
            "duplicate-name",
            where,
            f"value name {value.name!r} is already defined by {first}",
            "give new values fresh names; a graph is in single-assignment form",
        )

    def _initializer(self, name: str, value: ir.Value, *, already: bool) -> None:
        where = f"initializer {name}"
        if not already:
            self._define(value, where)
        if value.name != name:
            self._error(
                "renamed-initializer", where, f"is registered as {name!r} but its value is named {value.name!r}"
            )
        if value.const_value is None:
            self._error("empty-initializer", where, "has no data", "set const_value, or make it an input")
            return
        tensor = value.const_value
        if value.dtype is not None and value.dtype != tensor.dtype:
            self._error("initializer-type", where, f"is declared {value.dtype.name} but holds {tensor.dtype.name}")
        declared, held = value.shape, tuple(tensor.shape.numpy())
        if declared is not None and not _shapes_agree(declared, held):
            self._error("initializer-shape", where, f"is declared {declared} but holds {list(held)}")

    def _node(self, node: ir.Node, visible: tuple[set[ir.Value], ...]) -> None:
        where = node_label(node)
        if node.name:
            if node.name in self._node_names:
                self._warning("duplicate-node-name", where, "another node has the same name", "give it a fresh name")
            self._node_names.add(node.name)
        for position, value in enumerate(node.inputs):
            if value is not None and not _sees(visible, value):
                self._undefined(value, node.graph, f"{where}, input {position}")
        self._operator(node, where)
        for attribute in node.attributes.values():
            for number, graph in enumerate(_graphs_of(attribute)):
                self._graph(graph, visible, f"{attribute.name}[{number}] of {where}")
        for value in node.outputs:
            # An output of the empty name is an optional output that nobody wants.
            if value.name != "" or value.uses():
                self._define(value, where)

    def _undefined(self, value: ir.Value, graph: ir.Graph | ir.Function | None, where: str) -> None:
        producer = value.producer()
        if producer is not None and producer.graph is not None and producer.graph is graph:
            self._error(
                "used-before-definition",
                where,
                f"value {value.name!r} is made later, by {node_label(producer)}",
                "insert new nodes before their first use; if it also depends on this node, there is a cycle",
            )
            return
        if producer is not None and producer.graph is None:
            reason = f"was made by {node_label(producer)}, which is in no graph"
            hint = "replace all uses of a node's outputs before removing it"
        elif producer is not None:
            reason, hint = f"is made by {node_label(producer)} in a graph that cannot be seen from here", ""
        elif value.const_value is not None:
            reason, hint = "is a constant, but no initializer of the graph", "call graph.register_initializer(value)"
        else:
            reason, hint = "is no input, no initializer and no node's output", "connect it to something"
        self._error("undefined-value", where, f"value {value.name!r} {reason}", hint)

    def _outputs(self, graph: ir.Graph, visible: tuple[set[ir.Value], ...], where: str) -> None:
        seen: set[ir.Value] = set()
        for position, value in enumerate(graph.outputs):
            place = f"output {position} of {where}"
            if not _sees(visible, value):
                self._undefined(value, graph, place)
            if value in seen:
                self._error("duplicate-output", place, f"{value.name!r} is listed twice", "add an Identity")
            seen.add(value)

    def _operator(self, node: ir.Node, where: str) -> None:
        identifier = node.op_identifier()
        domain = "" if node.domain == "ai.onnx" else node.domain
        version = self._imports.get(domain, self._imports.get("ai.onnx") if domain == "" else None)
        if version is None:
            self._error(
                "missing-opset", where, f"domain {domain!r} is not imported", "add it to the model's opset_imports"
            )
            return
        if identifier in self._model.functions:
            self._call(node, self._model.functions[identifier], where)
            return
        if domain == FUSED_DOMAIN:
            known = [name for space, name, _ in self._model.functions if space == FUSED_DOMAIN]
            self._error(
                "undefined-function", where, "no function defines this operator", did_you_mean(node.op_type, known)
            )
            return
        schema = _schema(node.op_type, version, domain)
        if schema is not None:
            self._against_schema(node, schema, where)
        elif domain in _standard_operators():
            hint = did_you_mean(node.op_type, _standard_operators()[domain])
            self._error("unknown-operator", where, f"is not in version {version} of operator set {domain!r}", hint)

    def _call(self, node: ir.Node, function: ir.Function, where: str) -> None:
        for kind, given, wanted in (
            ("inputs", len(node.inputs), len(function.inputs)),
            ("outputs", len(node.outputs), len(function.outputs)),
        ):
            if given > wanted:
                self._error("arity", where, f"has {given} {kind}, its function takes {wanted}")

    def _against_schema(self, node: ir.Node, schema: onnx.defs.OpSchema, where: str) -> None:
        for kind, count, low, high in (
            ("inputs", len(node.inputs), schema.min_input, schema.max_input),
            ("outputs", len(node.outputs), schema.min_output, schema.max_output),
        ):
            if not low <= count <= high:
                wanted = str(low) if low == high else f"{low} to {high}"
                self._error("arity", where, f"has {count} {kind}, the operator takes {wanted}")
                return
        for name, attribute in schema.attributes.items():
            if attribute.required and name not in node.attributes:
                self._error("missing-attribute", where, f"required attribute {name!r} is missing")
        for name in node.attributes:
            if name not in schema.attributes:
                hint = did_you_mean(name, schema.attributes)
                self._error("unknown-attribute", where, f"the operator has no attribute {name!r}", hint)
        self._types(node, schema, where)

    def _types(self, node: ir.Node, schema: onnx.defs.OpSchema, where: str) -> None:
        """Check the known types of inputs against the operator's type variables."""
        bound: dict[str, str] = {}
        allowed = {constraint.type_param_str: constraint.allowed_type_strs for constraint in schema.type_constraints}
        for position, value in enumerate(node.inputs):
            formal = schema.inputs[min(position, len(schema.inputs) - 1)]
            found = _type_string(value)
            if found is None:
                continue
            choices = allowed.get(formal.type_str, [formal.type_str])
            if found not in choices:
                self._error("type", where, f"input {position} ({formal.name}) cannot be {found}", "insert a Cast")
            heterogeneous = (
                formal.option == onnx.defs.OpSchema.FormalParameterOption.Variadic and not formal.is_homogeneous
            )
            if heterogeneous:
                continue
            first = bound.setdefault(formal.type_str, found)
            if first != found and formal.type_str in allowed:
                self._error(
                    "type", where, f"input {position} ({formal.name}) is {found}, another of the same kind is {first}"
                )

    def _recursion(self) -> None:
        """Report functions that call themselves, directly or through others."""
        functions = self._model.functions
        calls = {
            identifier: {node.op_identifier() for node in function.all_nodes()} & functions.keys()
            for identifier, function in functions.items()
        }
        # Peel off functions that call only finished ones; a cycle is what cannot be peeled.
        done: set[tuple[str, str, str]] = set()
        while ready := {key for key, called in calls.items() if key not in done and called <= done}:
            done |= ready
        for key in functions.keys() - done:
            self._error("recursive-function", f"function {'.'.join(key[:2])}", "calls itself or a function that does")


def _sees(visible: tuple[set[ir.Value], ...], value: ir.Value) -> bool:
    return any(value in scope for scope in visible)


def _graphs_of(attribute: ir.Attr) -> Iterable[ir.Graph]:
    if attribute.is_ref():
        return ()
    if attribute.type == ir.AttributeType.GRAPH:
        return (attribute.as_graph(),)
    if attribute.type == ir.AttributeType.GRAPHS:
        return attribute.as_graphs()
    return ()


@functools.cache
def _schema(operator: str, version: int, domain: str) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(operator, version, domain)
    except onnx.defs.SchemaError:
        return None


@functools.cache
def _standard_operators() -> dict[str, set[str]]:
    names: dict[str, set[str]] = {}
    for schema in onnx.defs.get_all_schemas():
        names.setdefault(schema.domain, set()).add(schema.name)
    return names


_TYPE_STRINGS: dict[ir.DataType, str] = {
    dtype: f"tensor({'double' if dtype.name == 'DOUBLE' else dtype.name.lower()})"
    for dtype in ir.DataType
    if dtype != ir.DataType.UNDEFINED
}


def _type_string(value: ir.Value | None) -> str | None:
    """The schema spelling of a tensor's type; None when unknown or no plain tensor."""
    if value is None or not isinstance(value.type, ir.TensorType) or value.dtype is None:
        return None
    return _TYPE_STRINGS.get(value.dtype)


def _shapes_agree(shape: ir.Shape, other: Sequence[int | str | None]) -> bool:
    """Whether the ranks are equal and no two known sizes differ."""
    if len(shape) != len(other):
        return False
    return all(
        not (isinstance(mine, int) and isinstance(theirs, int) and mine != theirs)
        for mine, theirs in zip(shape, other, strict=True)
    )


def _check_protobuf(model: ir.Model) -> Iterator[Diagnostic]:
    proto, left_out = skeleton_proto(model)
    weights_as_inputs(proto, left_out)
    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as error:
        text = str(error).strip().replace("\n", " ")
        yield Diagnostic("onnx-checker", "error", "model", text)
        return
    yield from _compare_annotations(model.graph, proto)


def _compare_annotations(graph: ir.Graph, proto: onnx.ModelProto) -> Iterator[Diagnostic]:
    """Compare what the graph says about its values with what onnx infers from inputs and weights alone."""
    del proto.graph.value_info[:]
    for output in proto.graph.output:
        output.ClearField("type")
    try:
        inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=False)
    except onnx.shape_inference.InferenceError as error:
        yield Diagnostic("inference", "warning", "model", f"onnx cannot infer types: {str(error).splitlines()[0]}")
        return
    types = {info.name: info.type for info in itertools.chain(inferred.graph.value_info, inferred.graph.output)}
    for node in graph:
        for value in node.outputs:
            if value.name and (problem := _annotation(value, types.get(value.name), node)) is not None:
                yield problem


def _annotation(value: ir.Value, inferred: onnx.TypeProto | None, node: ir.Node) -> Diagnostic | None:
    if inferred is None or not inferred.HasField("tensor_type") or not isinstance(value.type, ir.TensorType):
        return None
    where, tensor = node_label(node), inferred.tensor_type
    if tensor.elem_type and value.dtype is not None and value.dtype.value != tensor.elem_type:
        found = ir.DataType(tensor.elem_type).name
        return Diagnostic("stale-type", "error", where, f"{value.name!r} is declared {value.dtype.name} but is {found}")
    if not tensor.HasField("shape") or value.shape is None:
        return None
    dims = [dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim]
    if _shapes_agree(value.shape, dims):
        return None
    shown = ["?" if dim is None else dim for dim in dims]
    message = f"{value.name!r} is declared {value.shape} but is {shown}"
    return Diagnostic("stale-shape", "warning", where, message, "update the shape, or set it to None")
