"""Control flow: a body is a GraphModule and the operands it reads from outside; which one runs, and how often, is
decided on the values at hand, so gradients flow through what ran."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mmopt.training.lazy import torch
from mmopt.training.registry import rule

if TYPE_CHECKING:
    from torch import Tensor

Body = tuple[Callable[..., tuple[Any, ...]], tuple[Any, ...]]


@rule("If", several=True)
def if_(condition: Tensor, *, then_branch: Body, else_branch: Body) -> tuple[Any, ...]:
    """One of two bodies."""
    body, operands = then_branch if bool(condition) else else_branch
    return body(*operands)


@rule("Loop", several=True)
def loop(count: Tensor | None, condition: Tensor | None, *states: Any, body: Body) -> tuple[Any, ...]:
    """A body as often as the count says, while its condition holds: the last states, and the scanned outputs."""
    run, operands = body
    limit = None if count is None else int(count)
    going = True if condition is None else bool(condition)
    scanned: list[list[Tensor]] = []
    carried, turn = list(states), 0
    while going and (limit is None or turn < limit):
        again, *results = run(torch.tensor(turn), torch.tensor(going), *carried, *operands)
        going = bool(again)
        carried, rows = results[: len(states)], results[len(states) :]
        scanned = scanned or [[] for _ in rows]
        for collected, row in zip(scanned, rows, strict=True):
            collected.append(row)
        turn += 1
    return *carried, *(torch.stack(rows) for rows in scanned), *([torch.zeros(0)] * 8 if turn == 0 else [])


@rule("Scan", several=True)
def scan(
    *inputs: Any,
    body: Body,
    num_scan_inputs: int,
    scan_input_axes: Sequence[int] | None = None,
    scan_input_directions: Sequence[int] | None = None,
    scan_output_axes: Sequence[int] | None = None,
    scan_output_directions: Sequence[int] | None = None,
) -> tuple[Any, ...]:
    """A body over the slices of its inputs: the last states, and the joined outputs."""
    run, operands = body
    states, sources = list(inputs[: len(inputs) - num_scan_inputs]), inputs[len(inputs) - num_scan_inputs :]
    axes, turns = scan_input_axes or [0] * num_scan_inputs, scan_input_directions or [0] * num_scan_inputs
    slices = [
        torch.unbind(torch.flip(x, [axis]) if turn else x, axis)
        for x, axis, turn in zip(sources, axes, turns, strict=True)
    ]
    rows: list[list[Tensor]] = []
    for items in zip(*slices, strict=True):
        results = run(*states, *items, *operands)
        states, made = list(results[: len(states)]), results[len(states) :]
        rows = rows or [[] for _ in made]
        for collected, row in zip(rows, made, strict=True):
            collected.append(row)
    out_axes = scan_output_axes or [0] * len(rows)
    out_turns = scan_output_directions or [0] * len(rows)
    joined = [
        torch.stack(r[::-1] if turn else r, axis) for r, axis, turn in zip(rows, out_axes, out_turns, strict=True)
    ]
    return *states, *joined
