"""Keeps recurrent layers whole, and their length symbolic, on the way from torch to ONNX.

Torch (seen in 2.13) finds the shapes of a recurrent operator by running its decomposition, a Python loop over time
steps, and so fixes the length to that of the example: in the program or, silently, in the shapes it hands to the ONNX
exporter. The exporter's own remedy for LSTM and GRU covers the first only, and only until a kernel is cached.
``nn.RNN`` has no remedy and no translation to ONNX; it is unrolled.
"""

from __future__ import annotations

import collections
import contextlib
import threading
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

from mmopt.errors import LoadError

if TYPE_CHECKING:
    from torch import Tensor

_ARGUMENTS = (
    "input",
    "hx",
    "params",
    "has_biases",
    "num_layers",
    "dropout",
    "train",
    "bidirectional",
    "batch_first",
)
_PARAMS, _HAS_BIASES, _NUM_LAYERS, _BIDIRECTIONAL = (
    _ARGUMENTS.index(name) for name in ("params", "has_biases", "num_layers", "bidirectional")
)
_TABLES_LOCK = threading.RLock()
"""Torch's tables belong to the process: of two threads that put back what they found, the second must come later."""


def to_onnx(torch: Any, program: Any) -> Any:
    """Convert an exported program with torch's ONNX exporter.

    Args:
        torch: The torch package.
        program: The ``torch.export.ExportedProgram``.

    Returns:
        The ``torch.onnx.ONNXProgram``.

    Raises:
        LoadError: The program has recurrent layers, and they have no ONNX form or this version of torch treats them
            in a way that is not known here.
    """
    layers = _recurrent_nodes(torch, program)
    for node in layers:
        _refuse_projection(node)
    with symbolic_length(torch, required=bool(layers)) as asked:
        table = translations(torch) if layers else None
        converted = torch.onnx.export(program, custom_translation_table=table, dynamo=True, verbose=False)
    if layers and not asked:
        raise _unknown_torch(torch, "its ONNX exporter finds their shapes without asking their kernels")
    return converted


@contextlib.contextmanager
def symbolic_length(torch: Any, *, required: bool = True) -> Iterator[collections.Counter[str]]:
    """Let ``torch.export`` trace recurrent operators without looping over time steps.

    Inside, they can be traced with fake tensors only: their kernels give shapes and no values. Capture of a module
    looks for shapes in the operator's own kernels, decomposition of a program in torch's table of decompositions.

    Args:
        torch: The torch package.
        required: Whether to insist. Otherwise nothing happens where torch is not as known here, which is right for
            a model without recurrent layers.

    Yields:
        How often torch has asked for shapes so far, by operator.

    Raises:
        LoadError: Torch's internals are not as known here, and ``required``.
    """
    asked: collections.Counter[str] = collections.Counter()
    reason = _unknown_internals(torch)
    if reason and required:
        raise _unknown_torch(torch, reason)
    if reason:
        yield asked
        return
    capture = torch._C.DispatchKey.CompositeImplicitAutograd
    kernels = {operator: _counted(asked, operator, shapes) for operator, shapes in _shape_kernels(torch).items()}
    with _TABLES_LOCK, contextlib.ExitStack() as stack:
        for operator, kernel in kernels.items():
            stack.callback(operator._dispatch_cache.clear)
            stack.enter_context(_replaced(operator.py_kernels, {capture: kernel}))
            operator._dispatch_cache.clear()
        stack.enter_context(_replaced(torch._decomp.decomposition_table, kernels))
        yield asked


def translations(torch: Any) -> dict[Any, Callable[..., Any]]:
    """Translations of recurrent operators that torch's ONNX exporter lacks, for its ``custom_translation_table``."""
    aten = torch.ops.aten
    return {aten.rnn_tanh.input: _translate_rnn("Tanh"), aten.rnn_relu.input: _translate_rnn("Relu")}


def has_recurrent_layers(torch: Any, module: Any) -> bool:
    """Whether a ``torch.nn.Module`` contains an LSTM, GRU or RNN."""
    return any(isinstance(part, torch.nn.RNNBase) for part in module.modules())


def _recurrent_nodes(torch: Any, program: Any) -> list[Any]:
    names = {f"aten::{name}" for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")}
    graphs = [part.graph for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    schemas = ((node, getattr(node.target, "_schema", None)) for graph in graphs for node in graph.nodes)
    return [node for node, schema in schemas if schema is not None and schema.name in names]


def _refuse_projection(node: Any) -> None:
    """A projected LSTM has one more weight in each direction, and ONNX no place for it."""
    arguments = node.args
    per_direction = 4 if arguments[_HAS_BIASES] else 2
    directions = arguments[_NUM_LAYERS] * (2 if arguments[_BIDIRECTIONAL] else 1)
    if len(arguments[_PARAMS]) != per_direction * directions:
        raise LoadError(
            "an LSTM with proj_size has no ONNX form",
            where=_place(node),
            hint="build it without proj_size, or write its loop over time steps with torch.nn.LSTMCell",
        )


def _place(node: Any) -> str:
    """Path of the layer in the module tree."""
    path = next((str(path) for path, _ in reversed(node.meta.get("nn_module_stack", {}).values())), "")
    return path or str(node.name)


def _unknown_internals(torch: Any) -> str:
    """In what torch differs from what :func:`symbolic_length` relies on; "" when in nothing."""
    table = getattr(getattr(torch, "_decomp", None), "decomposition_table", None)
    if not isinstance(table, MutableMapping):
        return "torch._decomp has no table of decompositions that can be changed"
    try:
        operators = list(_shape_kernels(torch))
        capture = torch._C.DispatchKey.CompositeImplicitAutograd
    except AttributeError as error:
        return str(error)
    for operator in operators:
        if tuple(argument.name for argument in operator._schema.arguments) != _ARGUMENTS:
            return f"{operator} takes other arguments"
        if capture not in getattr(operator, "py_kernels", ()) or not hasattr(operator, "_dispatch_cache"):
            return f"{operator} has no kernel in Python"
        if operator not in table:
            return f"{operator} has no decomposition"
    return ""


def _unknown_torch(torch: Any, reason: str) -> LoadError:
    return LoadError(
        f"recurrent layers cannot be exported with torch {torch.__version__}: {reason}",
        hint="use torch 2.13, or give the model as an ONNX file",
    )


@contextlib.contextmanager
def _replaced(table: MutableMapping[Any, Any], entries: dict[Any, Any]) -> Iterator[None]:
    originals = {key: table[key] for key in entries if key in table}
    table.update(entries)
    try:
        yield
    finally:
        for key in entries:
            del table[key]
        table.update(originals)


def _shape_kernels(torch: Any) -> dict[Any, Callable[..., Any]]:
    aten = torch.ops.aten
    return {
        aten.lstm.input: _lstm_shapes,
        aten.gru.input: _rnn_shapes,
        aten.rnn_tanh.input: _rnn_shapes,
        aten.rnn_relu.input: _rnn_shapes,
    }


def _counted(asked: collections.Counter[str], operator: Any, shapes: Callable[..., Any]) -> Callable[..., Any]:
    def kernel(*arguments: Any) -> Any:
        asked[str(operator)] += 1
        return shapes(*arguments)

    return kernel


def _rnn_shapes(
    input: Tensor,
    hx: Tensor,
    params: list[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor]:
    width = hx.shape[-1] * (2 if bidirectional else 1)
    return input.new_empty((*input.shape[:2], width)), hx.new_empty(hx.shape)


def _lstm_shapes(input: Tensor, hx: list[Tensor], *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    output, hidden = _rnn_shapes(input, hx[0], *options)
    return output, hidden, hx[1].new_empty(hx[1].shape)


def _translate_rnn(activation: str) -> Callable[..., Any]:
    """Translate ``aten::rnn_tanh.input`` and its like to the ONNX operator RNN.

    Torch keeps ``[w_ih, w_hh, b_ih, b_hh]`` for each layer and direction; ONNX wants each kind stacked over the
    directions and both biases in one row. Hidden states of all layers are ``[layers · directions, batch, hidden]``.
    """
    from onnxscript import opset18 as op

    def translate(  # type: ignore[no-untyped-def]
        input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first
    ):
        count, stride = 2 if bidirectional else 1, 4 if has_biases else 2
        sequence = op.Transpose(input, perm=[1, 0, 2]) if batch_first else input
        finals = []
        for layer in range(num_layers):
            sets = [params[(layer * count + direction) * stride :][:stride] for direction in range(count)]
            steps, final = op.RNN(
                sequence,
                _stack(op, [one[0] for one in sets]),
                _stack(op, [one[1] for one in sets]),
                _stack(op, [op.Concat(*one[2:], axis=0) for one in sets]) if has_biases else None,
                None,
                op.Slice(hx, [layer * count], [(layer + 1) * count], [0]),
                hidden_size=params[1].shape[1],
                activations=[activation] * count,
                direction="bidirectional" if bidirectional else "forward",
            )
            sequence = op.Reshape(op.Transpose(steps, perm=[0, 2, 1, 3]), [0, 0, -1])
            finals.append(final)
        return op.Transpose(sequence, perm=[1, 0, 2]) if batch_first else sequence, op.Concat(*finals, axis=0)

    return translate


def _stack(op: Any, values: Sequence[Any]) -> Any:
    return op.Concat(*(op.Unsqueeze(value, [0]) for value in values), axis=0)
