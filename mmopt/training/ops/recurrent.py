"""LSTM, GRU and RNN, step by step, or by torch's own layers where these compute the same.

Gates lie in other orders: ONNX has i o f c (LSTM) and z r h (GRU), torch i f c o and r z n.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from mmopt.training.lazy import torch
from mmopt.training.registry import rule

if TYPE_CHECKING:
    from torch import Tensor

Activation: TypeAlias = "Callable[[Tensor], Tensor]"
Step: TypeAlias = "Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]"

_DEFAULTS = {"lstm": ("sigmoid", "tanh", "tanh"), "gru": ("sigmoid", "tanh"), "rnn": ("tanh",)}
_ALPHA = {"leakyrelu": 0.01, "thresholdedrelu": 1.0, "hardsigmoid": 0.2, "elu": 1.0, "affine": 1.0, "scaledtanh": 1.0}
_BETA = {"hardsigmoid": 0.5, "affine": 0.0, "scaledtanh": 1.0}
_FUNCTIONS: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "relu": lambda x, a, b: torch.relu(x),
    "tanh": lambda x, a, b: torch.tanh(x),
    "sigmoid": lambda x, a, b: torch.sigmoid(x),
    "affine": lambda x, a, b: a * x + b,
    "leakyrelu": lambda x, a, b: torch.nn.functional.leaky_relu(x, a),
    "thresholdedrelu": lambda x, a, b: torch.where(x >= a, x, torch.zeros_like(x)),
    "scaledtanh": lambda x, a, b: a * torch.tanh(b * x),
    "hardsigmoid": lambda x, a, b: torch.clamp(a * x + b, 0, 1),
    "elu": lambda x, a, b: torch.nn.functional.elu(x, a),
    "softsign": lambda x, a, b: torch.nn.functional.softsign(x),
    "softplus": lambda x, a, b: torch.nn.functional.softplus(x),
}


def _activations(
    kind: str,
    directions: int,
    names: Sequence[str] | None,
    alphas: Sequence[float] | None,
    betas: Sequence[float] | None,
) -> list[list[Activation]]:
    """For every direction, its activations. Numbers go to those that take some, in order."""
    each = len(_DEFAULTS[kind])
    wanted = [name.lower() for name in names] if names else list(_DEFAULTS[kind]) * directions
    first, second = list(alphas or ()), list(betas or ())
    made: list[Activation] = []
    for name in wanted:
        if name not in _FUNCTIONS:
            raise ValueError(f"there is no activation {name!r}")
        a = first.pop(0) if name in _ALPHA and first else _ALPHA.get(name, 0.0)
        b = second.pop(0) if name in _BETA and second else _BETA.get(name, 0.0)
        made.append(lambda x, f=_FUNCTIONS[name], a=a, b=b: f(x, a, b))  # type: ignore[misc]
    return [made[n * each : (n + 1) * each] for n in range(directions)]


def _run(x: Tensor, states: tuple[Tensor, ...], step: Step, lengths: Tensor | None, reverse: bool) -> list[Tensor]:
    """Outputs ``[steps, batch, hidden]`` of one direction, and the last of every state.

    Sequences shorter than the longest keep their state at its end, and give zeros behind it.
    """
    steps = x.shape[0]
    if reverse and lengths is not None:
        x = _reversed(x, lengths)
    order = range(steps) if not reverse or lengths is not None else range(steps - 1, -1, -1)
    found: list[Tensor] = []
    for t in order:
        new = step(x[t], states)
        if lengths is not None:
            alive = (t < lengths)[:, None]
            states = tuple(torch.where(alive, a, b) for a, b in zip(new, states, strict=True))
            found.append(torch.where(alive, new[0], torch.zeros_like(new[0])))
        else:
            states = new
            found.append(new[0])
    empty = torch.zeros(0, *states[0].shape, dtype=x.dtype)
    outputs = torch.stack(found if order.step > 0 else found[::-1]) if found else empty
    if reverse and lengths is not None:
        outputs = _reversed(outputs, lengths)
    return [outputs, *states]


def _reversed(x: Tensor, lengths: Tensor) -> Tensor:
    steps = torch.arange(x.shape[0])[:, None]
    places = torch.where(steps < lengths, lengths - 1 - steps, steps)
    return x[places, torch.arange(x.shape[1])]


def _layer(
    x: Tensor,
    lengths: Tensor | None,
    initial: Sequence[Tensor | None],
    direction: str,
    layout: int,
    hidden: int,
    run: Callable[[int, Tensor, tuple[Tensor, ...], bool], list[Tensor]],
) -> tuple[Tensor, ...]:
    """All directions of a layer: Y and the last states, in the layout of the operator."""
    directions = 2 if direction == "bidirectional" else 1
    x = x.transpose(0, 1) if layout else x
    zero = torch.zeros(directions, x.shape[1], hidden, dtype=x.dtype, device=x.device)
    states = [zero if s is None else s.transpose(0, 1) if layout else s for s in initial]
    parts = []
    for n in range(directions):
        backwards = direction == "reverse" or n == 1
        parts.append(run(n, x, tuple(state[n] for state in states), backwards))
    outputs = torch.stack([part[0] for part in parts], 1)
    last = [torch.stack([part[k] for part in parts]) for k in range(1, len(initial) + 1)]
    if layout:
        return outputs.permute(2, 0, 1, 3), *(state.transpose(0, 1) for state in last)
    return outputs, *last


def _biases(b: Tensor | None, n: int, gates: int, hidden: int, x: Tensor) -> tuple[Tensor, Tensor]:
    if b is None:
        zero = torch.zeros(gates * hidden, dtype=x.dtype, device=x.device)
        return zero, zero
    return b[n, : gates * hidden], b[n, gates * hidden :]


def _reordered(weight: Tensor, hidden: int, order: Sequence[int]) -> Tensor:
    """Gates of the first axis in another order."""
    return torch.cat([weight[k * hidden : (k + 1) * hidden] for k in order])


def _clipped(clip: float | None) -> Activation:
    return (lambda x: x) if clip is None else lambda x: torch.clamp(x, -clip, clip)


@rule("LSTM", several=True)
def lstm(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    initial_h: Tensor | None = None,
    initial_c: Tensor | None = None,
    peepholes: Tensor | None = None,
    *,
    hidden_size: int | None = None,
    direction: str = "forward",
    layout: int = 0,
    input_forget: int = 0,
    clip: float | None = None,
    activations: Sequence[str] | None = None,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
) -> tuple[Tensor, ...]:
    """``i, o, f, c = W x + R h + b``; ``C = f · C + i · g(c)``; ``H = o · h(C)``. Outputs Y, Y_h, Y_c."""
    hidden = r.shape[2]
    functions = _activations("lstm", w.shape[0], activations, activation_alpha, activation_beta)
    usual = [n.lower() for n in activations or ()] in ([], list(_DEFAULTS["lstm"]) * w.shape[0])
    fast = usual and peepholes is None and lengths is None and clip is None and not input_forget

    def run(n: int, x: Tensor, states: tuple[Tensor, ...], backwards: bool) -> list[Tensor]:
        before, behind = _biases(b, n, 4, hidden, x)
        if fast:
            order = (0, 2, 3, 1)
            flat = [_reordered(part, hidden, order) for part in (w[n], r[n], before, behind)]
            source = torch.flip(x, [0]) if backwards else x
            hx = tuple(state[None].contiguous() for state in states)
            y, h, c = torch._VF.lstm(source, hx, flat, True, 1, 0.0, False, False, False)
            return [torch.flip(y, [0]) if backwards else y, h[0], c[0]]
        p = None if peepholes is None else peepholes[n].chunk(3)
        cut, (f, g, h) = _clipped(clip), functions[n]
        inputs = x @ w[n].t() + before + behind

        def step(x_t: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            i, o, forget, c = (x_t + states[0] @ r[n].t()).chunk(4, -1)
            memory = states[1]
            i = f(cut(i if p is None else i + p[0] * memory))
            forget = 1 - i if input_forget else f(cut(forget if p is None else forget + p[2] * memory))
            memory = forget * memory + i * g(cut(c))
            return f(cut(o if p is None else o + p[1] * memory)) * h(memory), memory

        return _run(inputs, states, step, lengths, backwards)

    return _layer(x, lengths, (initial_h, initial_c), direction, layout, hidden, run)


@rule("GRU", several=True)
def gru(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    initial_h: Tensor | None = None,
    *,
    hidden_size: int | None = None,
    direction: str = "forward",
    layout: int = 0,
    linear_before_reset: int = 0,
    clip: float | None = None,
    activations: Sequence[str] | None = None,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
) -> tuple[Tensor, ...]:
    """``z, r = f(W x + R h + b)``; ``h' = g(W x + R (r · h) + b)``; ``H = (1 − z) · h' + z · H``. Outputs Y, Y_h."""
    hidden = r.shape[2]
    functions = _activations("gru", w.shape[0], activations, activation_alpha, activation_beta)
    usual = [n.lower() for n in activations or ()] in ([], list(_DEFAULTS["gru"]) * w.shape[0])
    fast = usual and lengths is None and clip is None and linear_before_reset

    def run(n: int, x: Tensor, states: tuple[Tensor, ...], backwards: bool) -> list[Tensor]:
        before, behind = _biases(b, n, 3, hidden, x)
        if fast:
            flat = [_reordered(part, hidden, (1, 0, 2)) for part in (w[n], r[n], before, behind)]
            source = torch.flip(x, [0]) if backwards else x
            y, h = torch._VF.gru(source, states[0][None].contiguous(), flat, True, 1, 0.0, False, False, False)
            return [torch.flip(y, [0]) if backwards else y, h[0]]
        cut, (f, g) = _clipped(clip), functions[n]
        gates, candidate = r[n][: 2 * hidden].t(), r[n][2 * hidden :].t()
        inputs = x @ w[n].t() + before

        def step(x_t: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            state = states[0]
            z, reset = f(cut(x_t[:, : 2 * hidden] + state @ gates + behind[: 2 * hidden])).chunk(2, -1)
            if linear_before_reset:
                inner = reset * (state @ candidate + behind[2 * hidden :])
            else:
                inner = (reset * state) @ candidate + behind[2 * hidden :]
            return ((1 - z) * g(cut(x_t[:, 2 * hidden :] + inner)) + z * state,)

        return _run(inputs, states, step, lengths, backwards)

    return _layer(x, lengths, (initial_h,), direction, layout, hidden, run)


@rule("RNN", several=True)
def rnn(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    initial_h: Tensor | None = None,
    *,
    hidden_size: int | None = None,
    direction: str = "forward",
    layout: int = 0,
    clip: float | None = None,
    activations: Sequence[str] | None = None,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
) -> tuple[Tensor, ...]:
    """``H = f(W x + R H + b)``. Outputs Y, Y_h."""
    hidden = r.shape[2]
    functions = _activations("rnn", w.shape[0], activations, activation_alpha, activation_beta)

    def run(n: int, x: Tensor, states: tuple[Tensor, ...], backwards: bool) -> list[Tensor]:
        before, behind = _biases(b, n, 1, hidden, x)
        cut, recurrent, activation = _clipped(clip), r[n].t(), functions[n][0]
        inputs = x @ w[n].t() + before + behind

        def step(x_t: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (activation(cut(x_t + states[0] @ recurrent)),)

        return _run(inputs, states, step, lengths, backwards)

    return _layer(x, lengths, (initial_h,), direction, layout, hidden, run)
