"""The table of operator rules. Each family lives in its own file under ``training/ops`` and registers itself.

A rule is a function of torch tensors that computes what the ONNX operator computes. It becomes the target of a
``call_function`` node, so sizes are those of the tensors at hand and nothing is specialised to one shape.

    inputs of the node       positional arguments; None for one that is absent
    attributes of the node   keyword arguments of the same name, when the node states them
    ``n_outputs``            how many outputs the node has, for a rule with such a parameter
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir as ir

Function = Callable[..., Any]
Static = Callable[[ir.Node, "Types"], Mapping[str, Any]]
Types = Callable[[ir.Value | None], ir.DataType | None]


@dataclasses.dataclass(frozen=True)
class Rule:
    """How one operator is computed.

    Attributes:
        function: The function, or its dotted name in torch.
        several: It returns a tuple, one item for each output.
        integers: Whether it takes and hands on integers that are carried in floats, and of which type they are after
            it: ``keep`` for that of the first input, a dtype for its own, ``none`` when it reads them but makes floats;
            "" when it has to be given true integers.
        static: Keyword arguments that follow from the node rather than from tensors.
    """

    function: Function | str
    several: bool = False
    integers: str = ""
    static: Static | None = None

    @property
    def target(self) -> Function:
        """The function."""
        if not isinstance(self.function, str):
            return self.function
        module, _, name = self.function.rpartition(".")
        found: Function = getattr(importlib.import_module(module), name)
        return found

    def arguments(self, node: ir.Node, types: Types) -> dict[str, Any]:
        """Keyword arguments for ``node``.

        Raises:
            TypeError: The node has an attribute or an input that the function does not know.
        """
        given = {name: _plain(attribute) for name, attribute in node.attributes.items()}
        if self.static is not None:
            given = {**given, **self.static(node, types)}
        try:
            signature = inspect.signature(self.target)
        except ValueError:  # torch's built-in functions have none, and here no attributes
            if given:
                raise TypeError(f"the attribute {next(iter(given))!r} is unknown") from None
            return given
        if "n_outputs" in signature.parameters:
            given["n_outputs"] = len(node.outputs)
        signature.bind(*node.inputs, **given)
        return given


def _plain(attribute: ir.Attr) -> Any:
    """Value of an attribute as FX can write it into code."""
    value = attribute.value
    return list(value) if isinstance(value, tuple) else value


_TABLE: dict[tuple[str, str], Rule] = {}


def rule(
    *op_types: str, several: bool = False, integers: str = "", static: Static | None = None, domain: str = ""
) -> Callable[[Function], Function]:
    """Register the decorated function as the rule of ``op_types``; see :class:`Rule`."""

    def register(function: Function) -> Function:
        add(function, *op_types, several=several, integers=integers, static=static, domain=domain)
        return function

    return register


def add(
    function: Function | str,
    *op_types: str,
    several: bool = False,
    integers: str = "",
    static: Static | None = None,
    domain: str = "",
) -> None:
    """As :func:`rule`, for a function that is there already, or one of torch by its dotted name."""
    for op_type in op_types:
        if (domain, op_type) in _TABLE:
            raise ValueError(f"{op_type} already has a rule")
        _TABLE[(domain, op_type)] = Rule(function, several, integers, static)


def rule_of(domain: str, op_type: str) -> Rule | None:
    """The rule of an operator, or ``None``."""
    _load()
    return _TABLE.get(("" if domain == "ai.onnx" else domain, op_type))


def rules() -> list[tuple[str, str]]:
    """All (domain, operator) pairs that have a rule, sorted."""
    _load()
    return sorted(_TABLE)


_LOADED = False


def _load() -> None:
    global _LOADED
    if _LOADED:
        return
    import mmopt.training.ops as family

    for module in pkgutil.iter_modules(family.__path__):
        importlib.import_module(f"{family.__name__}.{module.name}")
    _LOADED = True
