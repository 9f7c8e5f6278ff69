"""The weights of a module by name, wherever they stand, and their way back from training."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from mmopt.errors import UserError
from mmopt.ir.module import Module

_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_CONSTANTS = ("value", "value_float", "value_floats", "value_int", "value_ints")


@dataclasses.dataclass(frozen=True)
class Weight:
    """One constant tensor of a model: an initializer, or what a Constant node makes.

    Attributes:
        name: Its name in the model; a later one of the same name, in another body, has ``#2`` behind it.
        value: The value that stands for it in the graph.
        tensor: Its elements.
    """

    name: str
    value: ir.Value
    tensor: ir.TensorProtocol

    @property
    def trainable(self) -> bool:
        """Whether it holds floating-point numbers; of Constant nodes, those with several."""
        return self.tensor.dtype in _FLOATS and (self.value.producer() is None or self.tensor.size > 1)

    def replace(self, tensor: ir.TensorProtocol) -> None:
        """Put ``tensor`` in its place. The old one is left as it was, for modules that share it."""
        node = self.value.producer()
        if node is None:
            self.value.const_value = tensor
            return
        for name in _CONSTANTS:
            node.attributes.pop(name, None)
        node.attributes["value"] = ir.AttrTensor("value", tensor)
        if self.value.const_value is not None:
            self.value.const_value = tensor


def weights(module: Module) -> Iterator[Weight]:
    """Every constant of the main graph and of the bodies of its nodes, in a fixed order."""
    seen: dict[str, int] = {}
    for graph in _graphs(module.graph):
        found: list[tuple[ir.Value, ir.TensorProtocol]] = [
            (value, value.const_value) for value in graph.initializers.values() if value.const_value is not None
        ]
        for node in graph:
            tensor = constant_of(node)
            if tensor is not None:
                found.append((node.outputs[0], tensor))
        for value, tensor in found:
            name = str(value.name)
            seen[name] = seen.get(name, 0) + 1
            yield Weight(name if seen[name] == 1 else f"{name}#{seen[name]}", value, tensor)


def _graphs(graph: ir.Graph) -> Iterator[ir.Graph]:
    yield graph
    for node in graph:
        for attribute in node.attributes.values():
            for body in bodies(attribute):
                yield from _graphs(body)


def bodies(attribute: ir.Attr) -> list[ir.Graph]:
    """Graphs an attribute holds."""
    if attribute.is_ref():
        return []
    if attribute.type == ir.AttributeType.GRAPH:
        return [attribute.as_graph()]
    return list(attribute.as_graphs()) if attribute.type == ir.AttributeType.GRAPHS else []


def constant_of(node: ir.Node) -> ir.TensorProtocol | None:
    """What a Constant node makes, as a tensor; None for other nodes and for strings and sparse tensors."""
    if node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
        return None
    name, attribute = next(iter(node.attributes.items()))
    if name not in _CONSTANTS or attribute.is_ref():
        return None
    if name == "value":
        return attribute.as_tensor()
    dtype = np.float32 if "float" in name else np.int64
    return ir.tensor(np.asarray(attribute.value, dtype), name=node.outputs[0].name)


def update_weights(module: Module, graph_module: Any) -> bool:
    """Return the parameters of an FX form to the module it was made of, in place.

    Names, order and dtypes stay; a tensor shared by several readers stays one. A weight whose bytes are the same keeps
    its tensor, and tensors that other modules share are not written to.

    Args:
        module: What ``graph_module`` was made of by :func:`mmopt.training.to_fx`, or a clone of it.
        graph_module: The trained form.

    Returns:
        Whether any weight changed.

    Raises:
        UserError: ``graph_module`` has a parameter that ``module`` does not, or of another shape.
    """
    from mmopt.training.tensors import to_numpy

    targets = {weight.name: weight for weight in weights(module)}
    names: dict[str, str] = graph_module.meta["weights"]
    changes: list[tuple[Weight, ir.TensorProtocol]] = []
    for path, parameter in graph_module.named_parameters():
        weight = targets.get(names.get(path, path))
        if weight is None or tuple(weight.tensor.shape) != tuple(parameter.shape):
            what = "is not in the module" if weight is None else f"is {list(weight.tensor.shape)} in the module"
            hint = "give the module that the graph was made of"
            raise UserError(f"the parameter {list(parameter.shape)} {what}", where=names.get(path, path), hint=hint)
        array = to_numpy(parameter, weight.tensor.dtype)
        if array.tobytes() != weight.tensor.numpy().tobytes():
            changes.append((weight, ir.Tensor(array, dtype=weight.tensor.dtype, name=weight.tensor.name)))
    for weight, tensor in changes:
        weight.replace(tensor)
    return bool(changes)


def parameter_names(graph_module: Any) -> dict[str, str]:
    """The name in the model of every parameter, by its name in ``graph_module.named_parameters()``.

    They are the same unless the model's is not one that torch can take (empty parts, or one the start of another).
    """
    names: dict[str, str] = graph_module.meta["weights"]
    return {path: names[path] for path, _ in graph_module.named_parameters()}
