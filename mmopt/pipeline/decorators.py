"""Passes from functions: on the module, on a graphsurgeon graph, or on a torch.fx graph.

    @module_pass(fidelity=Fidelity.ROUNDING)
    def fuse_scale(module: Module, context: PassContext, *, threshold: float = 0.5) -> bool: ...

    @graphsurgeon_pass
    def drop_nodes(graph: gs.Graph, *, op: str = "Identity") -> bool: ...

    @fx_pass
    def fold_dropout(graph_module: torch.fx.GraphModule) -> torch.fx.GraphModule: ...

Each becomes a :class:`~mmopt.pipeline.base.Pass` class named like the function in kebab case; keyword-only parameters
become its options.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any

from mmopt.errors import PassError
from mmopt.ir.module import Module
from mmopt.pipeline.base import Fidelity, FxPass, Pass, PassContext, kebab_case

_Function = Callable[..., Any]


def module_pass(function: _Function | None = None, *, name: str = "", fidelity: Fidelity = Fidelity.EXACT) -> Any:
    """Make a pass class from ``function(module, context, *, options…) -> bool``.

    Args:
        function: The function; left out when the decorator is given options.
        name: Name of the pass; that of the function in kebab case when empty.
        fidelity: How far the pass may move the outputs.

    Returns:
        The class, or, without ``function``, a decorator.
    """

    def decorate(target: _Function) -> type[Pass]:
        def run(self: Pass, module: Module, context: PassContext) -> bool:
            return typing.cast(bool, target(module, context, **_options(self)))

        return _make_class(target, Pass, {"run": run}, name, fidelity)

    return decorate if function is None else decorate(function)


def graphsurgeon_pass(function: _Function | None = None, *, name: str = "", fidelity: Fidelity = Fidelity.EXACT) -> Any:
    """Make a pass class from ``function(graph, *, options…) -> bool`` on an ``onnx_graphsurgeon.Graph``.

    The graph is edited in place; cleaning it up and sorting it is up to the function, as in graphsurgeon itself.
    Takes the same arguments as :func:`module_pass`.
    """

    def decorate(target: _Function) -> type[Pass]:
        def run(self: Pass, module: Module, context: PassContext) -> bool:
            from mmopt.frontends.graphsurgeon import from_graphsurgeon, to_graphsurgeon

            graph = to_graphsurgeon(module)
            changed = typing.cast(bool, target(graph, **_options(self)))
            if changed:
                module.model = from_graphsurgeon(graph, module).model
            return changed

        return _make_class(target, Pass, {"run": run}, name, fidelity)

    return decorate if function is None else decorate(function)


def fx_pass(function: _Function | None = None, *, name: str = "", fidelity: Fidelity = Fidelity.EXACT) -> Any:
    """Make a pass class from ``function(graph_module, *, options…) -> GraphModule`` on a ``torch.fx.GraphModule``.

    It runs on models that come from torch, before export. Takes the same arguments as :func:`module_pass`.
    """

    def decorate(target: _Function) -> type[Pass]:
        def run_fx(self: FxPass, graph_module: Any) -> Any:
            result = target(graph_module, **_options(self))
            if result is None:
                raise PassError(
                    "returned None, must return the GraphModule to go on with",
                    where=f"pass {self.name}",
                    hint="end the function with `return graph_module`",
                )
            return result

        return _make_class(target, FxPass, {"run_fx": run_fx}, name, fidelity)

    return decorate if function is None else decorate(function)


def _make_class(
    function: _Function, base: type[Any], methods: dict[str, Any], name: str, fidelity: Fidelity
) -> type[Pass]:
    namespace = {
        **methods,
        "name": name or kebab_case(function.__name__),
        "fidelity": fidelity,
        "__doc__": function.__doc__,
        "__module__": function.__module__,
        "__qualname__": function.__qualname__,
    }
    cls = dataclasses.make_dataclass(
        function.__name__, _fields(function), bases=(base,), namespace=namespace, frozen=True
    )
    cls.__module__ = function.__module__
    return typing.cast(type[Pass], cls)


def _fields(function: _Function) -> list[Any]:
    """The keyword-only parameters of ``function`` as dataclass fields; those without a default first."""
    options = [
        parameter
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    options.sort(key=lambda parameter: parameter.default is not inspect.Parameter.empty)
    return [(option.name, _annotation(function, option), *_default(option.default)) for option in options]


def _annotation(function: _Function, option: inspect.Parameter) -> Any:
    """The option's type. Only options are evaluated: other annotations may name what is imported for checkers only."""
    if option.annotation is inspect.Parameter.empty:
        return str if option.default is inspect.Parameter.empty else type(option.default)
    if not isinstance(option.annotation, str):
        return option.annotation
    holder = types.SimpleNamespace(__annotations__={option.name: option.annotation})
    return typing.get_type_hints(holder, globalns=getattr(function, "__globals__", {}))[option.name]


def _default(default: Any) -> tuple[Any, ...]:
    if default is inspect.Parameter.empty:
        return ()
    if isinstance(default, list | dict | set):
        return (dataclasses.field(default_factory=lambda: type(default)(default)),)
    return (dataclasses.field(default=default),)


def _options(pass_: Pass) -> dict[str, Any]:
    return {field.name: getattr(pass_, field.name) for field in dataclasses.fields(pass_)}
