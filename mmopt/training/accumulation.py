"""Gradients for criteria of pruning: mean, diagonal Fisher information, and products of values with gradients (Taylor).

    Fisher    F_i = mean over batches of (dL/dw_i)²
    Taylor    the change of L when a unit u goes:  ΔL ≈ Σ over the unit's elements of −v · dL/dv

Without labels, L is made of the outputs alone (:func:`mmopt.training.losses.label_free`): what matters is how much they
depend on a weight, not whether they are right. The gradient of "outputs against themselves" would be zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mmopt.errors import UserError, did_you_mean
from mmopt.ir.module import Module
from mmopt.training.fx import to_fx
from mmopt.training.requirement import require_torch
from mmopt.training.weights import parameter_names

if TYPE_CHECKING:
    from torch import Tensor

Array = np.ndarray[Any, Any]
Place = tuple[str, int]
Loss = str | Callable[[Mapping[str, "Tensor"], Any], "Tensor"]


@dataclasses.dataclass(frozen=True)
class Gradients:
    """What :func:`gradients` gives.

    Attributes:
        mean: Mean gradient of each initializer, in its shape, float64.
        fisher: Mean square of the gradient, likewise; one square for each batch and draw, so batches of one sample give
            the diagonal of the Fisher information, larger ones an estimate that is lower.
        products: For each place (name, axis), ``[batches · draws, size of the axis]`` in float64: value times gradient,
            summed over all other axes. Sum over the positions of a unit, then square or take the absolute value,
            then the mean over rows.
        losses: The loss of each row.
    """

    mean: dict[str, Array]
    fisher: dict[str, Array]
    products: dict[Place, Array]
    losses: Array


def gradients(
    module: Module,
    batches: Iterable[Mapping[str, Array]],
    *,
    labels: Iterable[Array] | None = None,
    loss: Loss = "sampled",
    output: str | None = None,
    places: Sequence[Place] = (),
    weights: Sequence[str] | None = None,
    draws: int = 1,
    seed: int = 0,
) -> Gradients:
    """Accumulate gradients over batches, in memory that does not grow with their number (but for ``products``).

    Args:
        module: The module; it is unchanged.
        batches: Inputs by name, as the module takes them.
        labels: One array for each batch: integers for cross entropy, others for the mean squared error. Without, the
            loss is made of the outputs.
        loss: Without labels ``sampled``, ``categorical`` or ``norm`` (:func:`mmopt.training.losses.label_free`); or a
            function of outputs by name and labels (None without).
        output: The output that labels or ``categorical`` are about; the first that has gradients when None.
        places: Axes of initializers or tensors of the main graph to take products along.
        weights: Initializers to keep mean and Fisher information of; all of floats when None.
        draws: Noise or classes drawn for each batch, where the loss draws any.
        seed: Seed of what is drawn.

    Raises:
        UserError: A name that does not exist, an axis that a tensor does not have, no batch, labels that do not fit, or
            gradients that are not finite (names the batch).
        UnsupportedError: The module has no differentiable form.
    """
    require_torch("gradients")
    run = _Accumulation(module, places, weights, loss, output, seed)
    given = None if labels is None else iter(labels)
    for number, batch in enumerate(batches):
        truth = None if given is None else next(given, None)
        if given is not None and truth is None:
            raise UserError(f"there are no labels for batch {number}", hint="give one array for each batch")
        for _ in range(max(1, draws)):
            run.add(batch, truth, number)
    return run.result()


class _Accumulation:
    """Sums over batches."""

    def __init__(
        self,
        module: Module,
        places: Sequence[Place],
        weights: Sequence[str] | None,
        loss: Loss,
        output: str | None,
        seed: int,
    ) -> None:
        import torch

        outputs = [str(value.name) for value in module.graph.outputs]
        inner = {str(v.name) for node in module.graph for v in node.outputs} - set(outputs)
        taps = list(dict.fromkeys(name for name, _ in places if name in inner))
        self._graph = to_fx(module, [*outputs, *taps])
        self._names = parameter_names(self._graph)
        self._parameters = {self._names[path]: p for path, p in self._graph.named_parameters()}
        self._outputs, self._places, self._loss, self._output = outputs, tuple(places), loss, output
        self._generator = torch.Generator().manual_seed(seed)
        known = {*self._parameters, *inner, *outputs}
        for name, _ in places:
            if name not in known:
                raise UserError(f"there is no tensor {name!r} that has gradients", hint=did_you_mean(name, known))
        kept = list(self._parameters) if weights is None else list(weights)
        for name in kept:
            if name not in self._parameters:
                hint = did_you_mean(name, self._parameters)
                raise UserError(f"there is no initializer {name!r} that has gradients", hint=hint)
        self._sum = {name: np.zeros(tuple(self._parameters[name].shape)) for name in kept}
        self._squares = {name: np.zeros(tuple(self._parameters[name].shape)) for name in kept}
        self._rows: dict[Place, list[Array]] = {place: [] for place in places}
        self._losses: list[float] = []

    def add(self, batch: Mapping[str, Array], labels: Array | None, number: int) -> None:
        """One more row."""
        import torch

        from mmopt.training.tensors import feed

        made = self._graph(**feed(self._graph, batch))
        taps = {name: made[name] for name, _ in self._places if name not in self._parameters}
        loss = self._value({name: made[name] for name in self._outputs}, labels)
        if not bool(torch.isfinite(loss)):
            raise UserError(
                f"the loss is {float(loss.detach())}", where=f"batch {number}", hint="look for NaN in the inputs"
            )
        read = dict.fromkeys([*self._sum, *(name for name, _ in self._places if name not in taps)])
        wanted = {name: self._parameters[name] for name in read if name in self._parameters}
        tensors = {**wanted, **{name: tap for name, tap in taps.items() if tap.requires_grad}}
        found = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
        grads = dict(zip(tensors, found, strict=True))
        for name, total in self._sum.items():
            if grads.get(name) is not None:
                gradient = grads[name].double().numpy()
                total += gradient
                self._squares[name] += gradient**2
        for name, axis in self._places:
            self._rows[name, axis].append(_product(tensors.get(name, taps.get(name)), grads.get(name), name, axis))
        self._losses.append(float(loss.detach()))

    def _value(self, outputs: Mapping[str, Any], labels: Array | None) -> Any:
        from mmopt.training import losses
        from mmopt.training.tensors import from_numpy

        truth = None if labels is None else from_numpy(labels)
        if callable(self._loss):
            return self._loss(outputs, truth)
        if truth is not None:
            return losses.task(outputs, truth, self._output)
        return losses.label_free(outputs, self._loss, self._output, self._generator)

    def result(self) -> Gradients:
        """The means."""
        count = len(self._losses)
        if not count:
            raise UserError("there is no batch", hint="give at least one set of inputs")
        return Gradients(
            {name: total / count for name, total in self._sum.items()},
            {name: total / count for name, total in self._squares.items()},
            {place: np.stack(rows) for place, rows in self._rows.items()},
            np.array(self._losses),
        )


def _product(value: Any, gradient: Any, name: str, axis: int) -> Array:
    """Sum of value times gradient over all axes but one."""
    if not -value.ndim <= axis < value.ndim:
        raise UserError(f"the tensor {name!r} has {value.ndim} axes, there is no axis {axis}")
    if gradient is None:
        return np.zeros(value.shape[axis])
    whole = (value.detach() * gradient).double().movedim(axis, 0).reshape(value.shape[axis], -1)
    return np.asarray(whole.sum(1).numpy())
