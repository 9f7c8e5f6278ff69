"""A model's protobuf without its weights: small enough to build after every pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import onnx
import onnx_ir as ir

INLINE_BYTES = 4096
"""Tensors up to this size stay inside the protobuf: shapes, axes and scalars, which inference and kernels look at."""

PLACEHOLDER = "weights.placeholder"
"""External location written for the weights that were left out."""


def skeleton_proto(model: ir.Model, *, inline_bytes: int = INLINE_BYTES) -> tuple[onnx.ModelProto, dict[str, ir.Value]]:
    """Serialize ``model`` with the main graph's large initializers left out.

    Args:
        model: The model. It is unchanged afterwards, but must not be used from another thread meanwhile.
        inline_bytes: Initializers larger than this are left out. Strings always stay inside.

    Returns:
        The protobuf, whose left-out initializers claim to lie in the external file :data:`PLACEHOLDER`, and those
        initializers by name.
    """
    left_out = {
        str(name): value
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
        # An initializer that is an input too is only that input's default; runtimes want its data in the file.
        and not value.is_graph_input()
        and _can_leave_out(value.const_value, inline_bytes)
    }
    with _stubs(left_out), _loaded_subgraph_tensors(model):
        proto = ir.to_proto(model)
    return proto, left_out


def weights_as_inputs(proto: onnx.ModelProto, left_out: dict[str, ir.Value]) -> None:
    """Turn the left-out initializers of ``proto`` into graph inputs, so that onnx's own tools accept it."""
    graph = proto.graph
    kept = [tensor for tensor in graph.initializer if tensor.name not in left_out]
    known_inputs = {value.name for value in graph.input}
    del graph.initializer[:]
    graph.initializer.extend(kept)
    for name, value in left_out.items():
        tensor = value.const_value
        if name in known_inputs or tensor is None:
            continue
        graph.input.append(onnx.helper.make_tensor_value_info(name, tensor.dtype.value, tensor.shape.numpy()))


def _can_leave_out(tensor: ir.TensorProtocol, inline_bytes: int) -> bool:
    return tensor.dtype != ir.DataType.STRING and tensor.nbytes > inline_bytes


@contextlib.contextmanager
def _stubs(values: dict[str, ir.Value]) -> Iterator[None]:
    originals = {name: value.const_value for name, value in values.items()}
    try:
        for name, value in values.items():
            value.const_value = _stub(name, originals[name])
        yield
    finally:
        for name, value in values.items():
            value.const_value = originals[name]


def _stub(name: str, tensor: ir.TensorProtocol | None) -> ir.ExternalTensor | None:
    if tensor is None:
        return None
    return ir.ExternalTensor(
        PLACEHOLDER, 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name
    )


@contextlib.contextmanager
def _loaded_subgraph_tensors(model: ir.Model) -> Iterator[None]:
    """While open, external tensors that the skeleton keeps hold their data in memory, as their file may be far away."""
    changed: list[tuple[ir.Value, ir.TensorProtocol]] = []
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor) and str(tensor.location) != PLACEHOLDER:
                changed.append((value, tensor))
    try:
        for value, tensor in changed:
            value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name)
        yield
    finally:
        for value, tensor in changed:
            value.const_value = tensor
