"""Any ONNX module as a ``torch.fx.GraphModule`` whose weights are parameters.

Every node becomes a call of the rule of its operator (:mod:`mmopt.training.registry`), on tensors of whatever sizes
come; what has no rule but a definition (local functions, fusion groups, functions of the standard) is expanded. Bodies
of If, Loop and Scan become GraphModules of their own, which are given what they read from outside as operands, so that
all weights are parameters of the outermost one.

The integers between QuantizeLinear and DequantizeLinear are carried in floating-point tensors, because torch has no
gradients for integers; rounding passes gradients on as if it were not there (straight-through). Where an operator needs
true integers, they are converted, and the gradient ends.
"""

from __future__ import annotations

import keyword
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from mmopt.errors import UnsupportedError, UserError, did_you_mean
from mmopt.ir.expand import instantiate, standard_body
from mmopt.ir.module import Module
from mmopt.training.registry import Rule, rule_of
from mmopt.training.requirement import require_torch
from mmopt.training.weights import Weight, bodies, constant_of, weights

if TYPE_CHECKING:
    import torch

_DEFAULT_DOMAINS = ("", "ai.onnx")
_OLDEST = 13
"""The oldest operator set whose operators mean what the rules compute; loading brings models to a newer one."""


def to_fx(module: Module, outputs: Sequence[str] = (), inputs: Sequence[str] = ()) -> torch.fx.GraphModule:
    """The differentiable form of a module.

    ``forward`` takes the inputs by name (``graph_module.meta["inputs"]`` gives the model's name of each argument, where
    one is no Python name) and returns a dict of tensors by output name. Floating-point initializers are parameters of
    the same names (:func:`mmopt.training.parameter_names`), everything else constant is a buffer. Weights are copies.

    Args:
        module: The module; it is unchanged.
        outputs: Names of tensors of the main graph to return instead of the model's outputs.
        inputs: Names of tensors of the main graph to take instead of the model's inputs: what makes them is left out.

    Returns:
        The GraphModule, on the CPU.

    Raises:
        UnsupportedError: An operator has neither a rule nor a definition, or torch has no tensors of a type; names the
            node.
        UserError: torch is not installed, or there is no such tensor.
    """
    torch = require_torch("a differentiable form")
    from mmopt.training.tensors import dtypes

    if module.opset and module.opset < _OLDEST:
        hint = f"convert it to opset {_OLDEST} or later; its operators of before mean other things"
        raise UnsupportedError(f"a model at opset {module.opset} cannot be differentiated", hint=hint)
    shared = _Shared(module)
    named = shared.named
    for name in (*outputs, *inputs):
        if name not in named:
            raise UserError(f"there is no tensor {name!r} in the main graph", hint=did_you_mean(name, named))
    wanted = [named[name] for name in outputs] or list(module.graph.outputs)
    given = [named[name] for name in inputs] or [v for v in module.graph.inputs if v not in shared.weights]
    scope = _Scope(shared, None)
    for value in given:
        if shared.dtype(value) not in (*dtypes(), None):
            raise UnsupportedError(f"torch has no tensors of {shared.dtype(value)}", where=f"input {value.name}")
        scope.take(value)
    scope.run(_needed(module.graph, wanted, given))
    result = scope.finish({str(value.name): value for value in wanted})
    result.meta["inputs"] = {scope.arguments[value]: str(value.name) for value in given}
    result.meta["weights"] = shared.paths
    result.meta["buffers"] = shared.buffers
    assert isinstance(result, torch.fx.GraphModule)
    return result


def _needed(graph: ir.Graph, wanted: Iterable[ir.Value], given: Iterable[ir.Value]) -> list[ir.Node]:
    """Nodes that ``wanted`` follows from, up to ``given``, in order."""
    stop, seen, stack = set(given), set(), list(wanted)
    while stack:
        value = stack.pop()
        node = value.producer()
        if value not in stop and node is not None and node.graph is graph and node not in seen:
            seen.add(node)
            stack.extend(_reads(node))
    return [node for node in graph if node in seen]


def _reads(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads, its bodies included."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        for body in bodies(attribute):
            yield from body.outputs
            for inner in body:
                yield from _reads(inner)


class _Shared:
    """What all scopes of one conversion have in common: the weights and their places, types, functions."""

    def __init__(self, module: Module) -> None:
        import torch

        self.module, self.root = module, torch.nn.Module()
        self.weights: dict[ir.Value, Weight] = {weight.value: weight for weight in weights(module)}
        self.named = {str(v.name): v for v in module.graph.inputs}
        self.named |= {str(v.name): v for v in module.graph.initializers.values()}
        self.named |= {str(v.name): v for node in module.graph for v in node.outputs if v.name}
        self.paths: dict[str, str] = {}
        self.buffers: dict[str, str] = {}
        self._placed: dict[ir.Value, str] = {}
        self._count = 0
        self._facts: Any = None

    def place(self, weight: Weight) -> str:
        """Where the root holds ``weight``, put there at the first call."""
        import torch

        from mmopt.training.tensors import to_torch

        if weight.value not in self._placed:
            try:
                tensor = to_torch(weight.tensor)
            except ValueError as error:
                raise UnsupportedError(str(error), where=f"initializer {weight.name}") from error
            path = self._path(weight.name)
            parent = _parent(self.root, path)
            if weight.trainable:
                parent.register_parameter(path.rpartition(".")[2], torch.nn.Parameter(tensor))
                self.paths[path] = weight.name
            else:
                parent.register_buffer(path.rpartition(".")[2], tensor)
                self.buffers[path] = weight.name
            self._placed[weight.value] = path
        return self._placed[weight.value]

    def keep(self, item: Any, name: str) -> str:
        """Register a buffer or a submodule under a fresh name."""
        path = self._fresh(name)
        if isinstance(item, type(self.root)):
            self.root.add_module(path, item)
        else:
            self.root.register_buffer(path, item)
        return path

    def _path(self, name: str) -> str:
        """``name`` where torch can take it as a path, else one with a number."""
        parts = name.split(".")
        legal = all(parts) and not any(c in name for c in "\"'\\\n")
        place: Any = self.root
        for part in parts:
            if not legal:
                break
            # A module's own attributes (training, forward…) and tensors on the way are in the way.
            taken = hasattr(place, part)
            place = getattr(place, part) if taken else None
            legal = not taken or (isinstance(place, type(self.root)) and part != parts[-1])
            if place is None:
                break
        # Bodies get GraphModules, which have more attributes of their own than plain modules.
        if legal and not hasattr(_graph_module_type(), parts[0]):
            return name
        return self._fresh("weight")

    def _fresh(self, name: str) -> str:
        """``name`` with a number that makes it new."""
        self._count += 1
        while hasattr(self.root, f"{name}_{self._count}"):
            self._count += 1
        return f"{name}_{self._count}"

    def dtype(self, value: ir.Value | None) -> ir.DataType | None:
        """Type of the elements of ``value``."""
        if value is None or value.dtype is not None:
            return None if value is None else value.dtype
        if self._facts is None:
            from mmopt.analysis.shapes import infer_shapes

            self._facts = infer_shapes(self.module.model)
        return self._facts.dtype(value)  # type: ignore[no-any-return]

    def body_of(self, node: ir.Node, opset: int) -> ir.Function | None:
        """The definition of a node that has no rule."""
        function = self.module.model.functions.get(node.op_identifier())
        if function is not None:
            return instantiate(function, node)
        types = [None if v is None else ir.TypeAndShape(self._type(v), v.shape) for v in node.inputs]
        return standard_body(node, opset, types)

    def _type(self, value: ir.Value) -> ir.TypeProtocol | None:
        if value.type is not None:
            return value.type
        dtype = self.dtype(value)
        return None if dtype is None else ir.TensorType(dtype)


def _graph_module_type() -> Any:
    import torch

    return torch.fx.GraphModule


def _parent(root: Any, path: str) -> Any:
    """The module that holds the last part of ``path``; modules on the way are made."""
    import torch

    for part in path.split(".")[:-1]:
        if part not in root._modules:
            root.add_module(part, torch.nn.Module())
        root = root._modules[part]
    return root


class _Scope:
    """One FX graph in the making: the main one, or that of a body, which takes what it reads from outside."""

    def __init__(self, shared: _Shared, outer: _Scope | None) -> None:
        import torch

        self.shared, self.outer = shared, outer
        self.graph = torch.fx.Graph()
        self.arguments: dict[ir.Value, str] = {}
        self.captured: list[ir.Value] = []
        self._nodes: dict[ir.Value, Any] = {}
        self._carried: dict[ir.Value, ir.DataType] = {}
        self._opsets: Mapping[str, int] = shared.module.model.opset_imports
        self._last: Any = None

    def take(self, value: ir.Value) -> Any:
        """Make ``value`` an argument."""
        name = str(value.name)
        legal = name.isidentifier() and not keyword.iskeyword(name) and name not in ("self", "super")
        name = name if legal else f"input_{len(self.arguments)}"
        while name in self.arguments.values():
            name += "_"
        # Arguments come first, also those found to be needed later.
        graph, last = self.graph, self._last
        with graph.inserting_after(last) if last else graph.inserting_before(next(iter(graph.nodes), graph._root)):
            self._last = self._nodes[value] = self.graph.placeholder(name)
        self.arguments[value] = str(self._last.target)
        return self._last

    def run(self, nodes: Iterable[ir.Node]) -> None:
        """Convert nodes, in order."""
        for node in nodes:
            self._node(node)

    def finish(self, outputs: Mapping[str, ir.Value] | Sequence[ir.Value]) -> Any:
        """The GraphModule that returns ``outputs``."""
        import torch

        if isinstance(outputs, Mapping):
            self.graph.output({name: self._true(value) for name, value in outputs.items()})
        else:
            self.graph.output(tuple(self._true(value) for value in outputs))
        return torch.fx.GraphModule(self.shared.root, self.graph)

    def _lookup(self, value: ir.Value) -> Any:
        """The FX node of a value made here, constant, or made outside."""
        if value not in self._nodes:
            weight = self.shared.weights.get(value)
            if self.outer is not None:
                self.captured.append(value)
                self.take(value)
            elif weight is not None:
                self._nodes[value] = self.graph.get_attr(self.shared.place(weight))
            else:
                raise UnsupportedError("is read before it is made", where=f"tensor {value.name}")
        return self._nodes[value]

    def _true(self, value: ir.Value) -> Any:
        """The FX node of ``value`` in its own type."""
        node, dtype = self._lookup(value), self._carried.get(value)
        if dtype is None:
            return node
        from mmopt.training.ops.quantize import narrow

        return self._call(narrow, (node,), {"dtype": dtype.name}, f"{value.name}_{dtype.name.lower()}")

    def _call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
        return self.graph.create_node("call_function", function, args, kwargs, name=name or None)

    def _node(self, node: ir.Node) -> None:
        if node.op_type == "Constant" and node.domain in _DEFAULT_DOMAINS:
            self._constant(node)
            return
        rule = rule_of(node.domain, node.op_type)
        if rule is None:
            self._expand(node)
            return
        args = tuple(None if v is None else self._lookup(v) if rule.integers else self._true(v) for v in node.inputs)
        try:
            kwargs = rule.arguments(node, self.shared.dtype)
        except (TypeError, ValueError, KeyError) as error:
            raise UnsupportedError(f"cannot be differentiated: {error}", where=_where(node)) from error
        kwargs = {name: self._body(item) if isinstance(item, ir.Graph) else item for name, item in kwargs.items()}
        made = self._call(rule.target, args, kwargs, str(node.outputs[0].name or ""))
        made.meta["onnx"] = _where(node)
        self._hand_on(node, rule, made)

    def _hand_on(self, node: ir.Node, rule: Rule, made: Any) -> None:
        """Note what the outputs of ``node`` are."""
        dtype = self._dtype_after(node, rule, made)
        for index, output in enumerate(node.outputs):
            if not output.name:
                continue
            self._nodes[output] = made
            if rule.several:
                self._nodes[output] = self._call(operator.getitem, (made, index), {}, output.name)
            self._carried.pop(output, None)
            if dtype is not None and (index == 0 or rule.integers == "keep"):
                self._carried[output] = dtype

    def _dtype_after(self, node: ir.Node, rule: Rule, made: Any) -> ir.DataType | None:
        if rule.integers == "keep":
            found = (self._carried.get(value) for value in node.inputs if value is not None)
            return next((dtype for dtype in found if dtype is not None), None)
        if rule.integers == "made":
            return ir.DataType[made.kwargs["dtype"]]
        return ir.DataType[rule.integers] if rule.integers not in ("", "none") else None

    def _constant(self, node: ir.Node) -> None:
        """A Constant node: a weight where it is one of the model's, else (in an expanded body) a buffer."""
        from mmopt.training.tensors import to_torch

        if node.outputs[0] in self.shared.weights:
            return
        tensor = constant_of(node)
        try:
            if tensor is None:
                raise ValueError("torch has no strings and no such sparse tensors")
            path = self.shared.keep(to_torch(tensor), "constant")
        except ValueError as error:
            raise UnsupportedError(str(error), where=_where(node)) from error
        self._nodes[node.outputs[0]] = self.graph.get_attr(path)

    def _expand(self, node: ir.Node) -> None:
        """Convert the definition of ``node`` in its place."""
        opsets = self._opsets
        function = self.shared.body_of(node, opsets.get(node.domain, opsets.get("", 1)))
        if function is None:
            raise UnsupportedError(
                f"the operator {node.domain or 'ai.onnx'}.{node.op_type} cannot be differentiated",
                where=_where(node),
                hint="it has no rule here and no definition in the standard",
            )
        for formal, actual in zip(function.inputs, node.inputs, strict=False):
            if actual is not None:
                self._nodes[formal] = self._true(actual)
        self._opsets = {**opsets, **function.opset_imports}
        try:
            self.run(function)
        finally:
            self._opsets = opsets
        for output, inner in zip(node.outputs, function.outputs, strict=False):
            self._nodes[output] = self._true(inner)

    def _body(self, graph: ir.Graph) -> tuple[Any, tuple[Any, ...]]:
        """A body as a GraphModule, and the operands it is given behind its own inputs."""
        inner = _Scope(self.shared, self)
        inner._opsets = self._opsets
        for value in graph.inputs:
            inner.take(value)
        inner.run(graph)
        made = inner.finish(list(graph.outputs))
        operands = tuple(self._true(value) for value in inner.captured)
        return self.graph.get_attr(self.shared.keep(made, "body")), operands


def _where(node: ir.Node) -> str:
    return f"{node.name or node.op_type} ({node.op_type})"
