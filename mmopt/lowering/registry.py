"""The table of operator lowerings. Each family lives in its own file under ``lowering/ops`` and registers itself."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from mmopt.lowering.values import NotLowered, Value

if TYPE_CHECKING:
    from mmopt.lowering.function import FunctionLowering

Result = Value | Sequence[Value]
Lowering = Callable[["OpNode"], Result]


@dataclasses.dataclass
class OpNode:
    """What a lowering sees of one node.

    Attributes:
        context: The function being built.
        node: The ONNX node.
        inputs: Its inputs in order; ``None`` for one that is absent.
        opset: Version of the node's operator set in the model.
    """

    context: FunctionLowering
    node: ir.Node
    inputs: list[Value | None]
    opset: int

    @property
    def op_type(self) -> str:
        return self.node.op_type

    @property
    def name(self) -> str:
        return self.node.name or self.node.op_type

    @property
    def n_outputs(self) -> int:
        return len(self.node.outputs)

    def input(self, position: int) -> Value:
        """A required input."""
        if position >= len(self.inputs) or self.inputs[position] is None:
            raise NotLowered(f"input {position} is missing")
        value = self.inputs[position]
        assert value is not None
        return value

    def optional(self, position: int) -> Value | None:
        """An input that may be absent."""
        return self.inputs[position] if position < len(self.inputs) else None

    def attr(self, name: str, default: Any = None) -> Any:
        """Value of an attribute as a Python object: int, float, str, list, array or graph."""
        attribute = self.node.attributes.get(name)
        if attribute is None:
            return default
        if isinstance(attribute.value, ir.TensorProtocol):
            return np.asarray(attribute.value.numpy())
        if isinstance(attribute.value, tuple):
            return list(attribute.value)
        return attribute.value


_TABLE: dict[tuple[str, str], Lowering] = {}


def lowers(*op_types: str, domain: str = "") -> Callable[[Lowering], Lowering]:
    """Register the decorated function as the lowering of ``op_types``."""

    def register(function: Lowering) -> Lowering:
        for op_type in op_types:
            key = (domain, op_type)
            if key in _TABLE:
                raise ValueError(f"{op_type} already has a lowering")
            _TABLE[key] = function
        return function

    return register


def lowering_of(domain: str, op_type: str) -> Lowering | None:
    """The lowering of an operator, or ``None``."""
    _load()
    return _TABLE.get(("" if domain == "ai.onnx" else domain, op_type))


def lowered_operators() -> list[tuple[str, str]]:
    """All (domain, operator) pairs that have a lowering, sorted."""
    _load()
    return sorted(_TABLE)


_LOADED = False


def _load() -> None:
    global _LOADED
    if _LOADED:
        return
    import mmopt.lowering.ops as family

    for module in pkgutil.iter_modules(family.__path__):
        importlib.import_module(f"{family.__name__}.{module.name}")
    _LOADED = True
