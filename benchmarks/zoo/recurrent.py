"""Keeps recurrent layers whole, and their length symbolic, on the way from torch to ONNX.

Torch (seen in 2.13) finds the shapes of a recurrent operator by running its decomposition, a Python loop over time
steps, and so fixes the length to that of the example: in the program or, silently, in the shapes it hands to the ONNX
exporter. The exporter's own remedy for LSTM and GRU covers the first only, and only until a kernel is cached.
``nn.RNN`` has no remedy and no translation to ONNX; it is unrolled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any

import torch
from onnxscript import opset18 as op
from torch import Tensor

_CAPTURE = torch._C.DispatchKey.CompositeImplicitAutograd


@contextlib.contextmanager
def symbolic_length() -> Iterator[None]:
    """Let ``torch.export`` trace recurrent operators without looping over time steps.

    Inside, they can be traced with fake tensors only: their kernels give shapes and no values. Capture of a module
    looks for shapes in the operator's own kernels, decomposition of a program in torch's table of decompositions.
    """
    aten = torch.ops.aten
    kernels: dict[Any, Callable[..., Any]] = {
        aten.lstm.input: _lstm_shapes,
        aten.gru.input: _rnn_shapes,
        aten.rnn_tanh.input: _rnn_shapes,
        aten.rnn_relu.input: _rnn_shapes,
    }
    with contextlib.ExitStack() as stack:
        for operator, kernel in kernels.items():
            stack.callback(operator._dispatch_cache.clear)
            stack.enter_context(_replaced(operator.py_kernels, {_CAPTURE: kernel}))
            operator._dispatch_cache.clear()
        stack.enter_context(_replaced(torch._decomp.decomposition_table, kernels))
        yield


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
    return input.new_empty((*input.shape[:2], width)), torch.empty_like(hx)


def _lstm_shapes(input: Tensor, hx: list[Tensor], *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    output, hidden = _rnn_shapes(input, hx[0], *options)
    return output, hidden, torch.empty_like(hx[1])


def _translate_rnn(activation: str) -> Callable[..., Any]:
    """Translate ``aten::rnn_tanh.input`` and its like to the ONNX operator RNN.

    Torch keeps ``[w_ih, w_hh, b_ih, b_hh]`` for each layer and direction; ONNX wants each kind stacked over the
    directions and both biases in one row. Hidden states of all layers are ``[layers · directions, batch, hidden]``.
    """

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
                _stack([one[0] for one in sets]),
                _stack([one[1] for one in sets]),
                _stack([op.Concat(*one[2:], axis=0) for one in sets]) if has_biases else None,
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


def _stack(values: Sequence[Any]) -> Any:
    return op.Concat(*(op.Unsqueeze(value, [0]) for value in values), axis=0)


TRANSLATIONS = {
    torch.ops.aten.rnn_tanh.input: _translate_rnn("Tanh"),
    torch.ops.aten.rnn_relu.input: _translate_rnn("Relu"),
}
"""Translations of torch operators that the ONNX exporter lacks."""
