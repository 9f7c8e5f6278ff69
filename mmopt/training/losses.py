"""Losses on outputs by name: against labels, against a teacher, and against nothing at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

from mmopt.errors import UserError, did_you_mean
from mmopt.training.lazy import functional, torch

if TYPE_CHECKING:
    from torch import Tensor

Outputs: TypeAlias = "Mapping[str, Tensor]"

_TINY = 1e-30

LABEL_FREE = ("sampled", "categorical", "norm")
"""Losses that need no labels, by name; :func:`label_free` says what they are."""


def floating(outputs: Outputs) -> dict[str, Tensor]:
    """Those outputs that gradients can come from; while none are recorded, all of floats."""
    found = {name: value for name, value in outputs.items() if torch.is_tensor(value) and value.is_floating_point()}
    return {name: value for name, value in found.items() if value.requires_grad or not torch.is_grad_enabled()}


def task(outputs: Outputs, labels: Tensor, output: str | None) -> Tensor:
    """Cross entropy of an output ``[batch, classes, …]`` for integer labels, mean squared error for others.

    Raises:
        UserError: There is no such output, or its shape does not fit the labels.
    """
    value = chosen(outputs, output)
    labels = labels.to(value.device)
    if labels.dtype.is_floating_point:
        _fits(value.shape == labels.shape, value, labels)
        return functional.mse_loss(value, labels.to(value.dtype))
    _fits(value.ndim >= 2 and value.shape[:1] + value.shape[2:] == labels.shape, value, labels)
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < value.shape[1]:
        raise UserError(
            f"labels reach from {int(labels.min())} to {int(labels.max())}", hint=f"{value.shape[1]} classes"
        )
    return functional.cross_entropy(value, labels.to(torch.int64))


def _fits(fits: bool, value: Tensor, labels: Tensor) -> None:
    if not fits:
        hint = "classes come with one integer label for each row, values with as many as the output has"
        raise UserError(f"labels {list(labels.shape)} do not fit an output {list(value.shape)}", hint=hint)


def chosen(outputs: Outputs, output: str | None) -> Tensor:
    """The output named, or the first with a gradient.

    Raises:
        UserError: There is none.
    """
    found = floating(outputs)
    if output is None and found:
        return next(iter(found.values()))
    if output not in found:
        raise UserError(f"there is no output {output!r} with gradients", hint=did_you_mean(str(output), found))
    return found[output]


def label_free(outputs: Outputs, kind: str, output: str | None, generator: torch.Generator) -> Tensor:
    """A scalar whose gradient says how much outputs depend on what is before them.

    ``sampled``      ``Σ ⟨e, y⟩ / rms(y)`` over all outputs, with ``e ~ N(0, 1)``: squared gradients have the mean
                     ``diag JᵀJ``, the Fisher information of outputs with Gaussian noise
    ``categorical``  ``−log softmax(y)[c]`` for a class ``c`` drawn from ``softmax(y)``: the Fisher information of a
                     classifier
    ``norm``         ``½ Σ ‖y‖² / mean y²``

    Raises:
        UserError: There is no such kind, or no output with gradients.
    """
    if kind == "categorical":
        logits = chosen(outputs, output)
        rows = logits.movedim(1, -1).reshape(-1, logits.shape[1]) if logits.ndim > 1 else logits[None]
        drawn = torch.multinomial(torch.softmax(rows.detach().float(), -1), 1, generator=generator)
        return functional.cross_entropy(rows, drawn[:, 0], reduction="sum")
    found = floating(outputs) if output is None else {output: chosen(outputs, output)}
    if not found:
        raise UserError("no output depends on the weights", hint="give a model with floating-point outputs")
    if kind == "norm":
        return torch.stack([(y.square() / _power(y)).sum() / 2 for y in found.values()]).sum()
    if kind == "sampled":
        return torch.stack([_sampled(y, generator) for y in found.values()]).sum()
    raise UserError(f"there is no loss {kind!r}", hint=did_you_mean(kind, LABEL_FREE))


def _sampled(y: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(y.shape, generator=generator, dtype=torch.float32).to(y)
    return (noise * y / _power(y).sqrt()).sum()


def _power(y: Tensor) -> Tensor:
    power = y.detach().square().mean()
    return torch.where(power > 0, power, torch.ones_like(power))


def imitation(student: Tensor, teacher: Tensor, temperature: float | None, scale: float) -> Tensor:
    """How far an output is from the teacher's.

    With a temperature T, ``T² · KL(softmax(t/T) ‖ softmax(s/T))`` over axis 1, per row; without, the mean squared
    error as a part of ``scale``.
    """
    teacher = teacher.detach()
    if temperature is None or student.ndim < 2:
        return functional.mse_loss(student, teacher) / scale
    s = functional.log_softmax(student.movedim(1, -1) / temperature, -1)
    t = functional.log_softmax(teacher.movedim(1, -1) / temperature, -1)
    return (t.exp() * (t - s)).sum(-1).mean() * temperature**2


def variance(values: Sequence[Tensor]) -> float:
    """Mean square of what several samples of a tensor are about the mean sample: what an error is a part of.

    Samples of different sizes have one mean for all elements; of samples that are all alike, it is the mean square.
    """
    rows = [value.float().reshape(1) if value.ndim == 0 else value.float() for value in values]
    alike = len({row.shape[1:] for row in rows}) == 1
    whole = torch.cat(rows) if alike else torch.cat([row.reshape(-1) for row in rows])
    found = float((whole - (whole.mean(0) if alike else whole.mean())).square().mean())
    return max(found or float(whole.square().mean()), _TINY)
