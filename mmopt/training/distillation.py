"""Distillation: a student's weights are trained until it answers as its teacher does.

    L = outputs + λ · features + μ · task

over unlabelled samples, of which a part is held out. The rate warms up and falls along a cosine; the weights that did
best on what is held out are the result, those of the start included. A run follows from models, samples, settings and
seed alone: one that was cut off goes on from its checkpoint to the same bits.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from mmopt.errors import UserError
from mmopt.ir.module import Module
from mmopt.training import checkpoints
from mmopt.training.data import Data
from mmopt.training.requirement import require_torch
from mmopt.training.weights import parameter_names, update_weights, weights

if TYPE_CHECKING:
    from mmopt.training.teaching import Lesson

Array = np.ndarray[Any, Any]
Progress = Callable[[int, int, str], None]

_WARM_UP, _LAST_RATE, _LARGEST_GRADIENT = 0.15, 0.02, 1.0
_LEAST_SCALE = 0.01
"""Scale of weights that are smaller: biases that are zero have to be able to leave it."""
_TIMED_STEPS, _TOO_LONG = 3, 1.2
_LARGEST_WEIGHT = 1e4
"""A constant with larger elements is a mask, not a weight."""
_SPARSE = 0.1
"""Share of zeros from which a weight is sparse."""
_STEERING = {"BatchNormalization": (3, 4), "QuantizeLinear": (1,), "DequantizeLinear": (1,), "Resize": (1, 2)}
"""Inputs of operators that are statistics or settings."""


@dataclasses.dataclass(frozen=True)
class Distillation:
    """How a student is trained.

    Attributes:
        epochs: Passes over the samples; 3 when neither this nor ``minutes`` is given.
        minutes: Time to train for: the number of steps is set by the first ones' time.
        batch: Samples of a step.
        rate: Largest step of Adam, as a part of the root mean square of each weight: weights that are there already are
            moved by so much, whatever their scale.
        outputs: Outputs to imitate; all that both models have when None.
        features: Towers whose last features are imitated; all that both models have when None, none when empty.
        classes: Outputs that are logits: imitated by divergence at ``temperature`` instead of by squared error.
        temperature: Divides logits before they become shares.
        labelled: The output that labels are about; the first when None.
        output_weight: Part of the loss that imitating outputs is.
        feature_weight: The same for features: λ.
        task_weight: The same for labels: μ.
        freeze: Patterns of names of initializers to leave alone.
        held_out: Part of the samples to judge by.
        patience: Epochs without progress on what is held out before training stops; 0 for no early stop.
        seed: Seed of what is held out, of the order of samples, and of operators that draw numbers.
    """

    epochs: float | None = None
    minutes: float | None = None
    batch: int = 16
    rate: float = 5e-3
    outputs: tuple[str, ...] | None = None
    features: tuple[str, ...] | None = None
    classes: tuple[str, ...] = ()
    temperature: float = 2.0
    labelled: str | None = None
    output_weight: float = 1.0
    feature_weight: float = 0.5
    task_weight: float = 1.0
    freeze: tuple[str, ...] = ()
    held_out: float = 0.1
    patience: int = 5
    seed: int = 0

    def check(self) -> None:
        """Raise :class:`UserError` for numbers that make no sense."""
        positive = {"batch": self.batch, "rate": self.rate, "temperature": self.temperature}
        positive |= {"epochs": self.epochs or 1, "minutes": self.minutes or 1}
        for name, value in positive.items():
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"{name} is {value}, it must be above 0")
        for name in ("epochs", "minutes"):
            if getattr(self, name) == 0:
                raise UserError(f"{name} is 0, it must be above 0")
        if not 0 < self.held_out < 1:
            raise UserError(f"held_out is {self.held_out}, it must be between 0 and 1")


@dataclasses.dataclass(frozen=True)
class Judged:
    """What was measured on the samples held out.

    Attributes:
        step: After how many steps.
        loss: The whole loss.
        parts: Its parts, not weighed: ``output NAME``, ``feature TOWER``, ``task``.
    """

    step: int
    loss: float
    parts: dict[str, float]


@dataclasses.dataclass(frozen=True)
class DistillResult:
    """What :func:`distill` gives.

    Attributes:
        module: The student with the best weights.
        before: The student as it came.
        best: The student as it is given back.
        history: Every judgement, in order, the first included.
        steps: Steps done.
        stopped: Why training ended: ``epochs``, ``minutes`` or ``patience``.
        trained: Names of the initializers that were trained.
        samples: Samples taught and held out.
        stacked: Whether a batch went through the models at once.
    """

    module: Module
    before: Judged
    best: Judged
    history: tuple[Judged, ...]
    steps: int
    stopped: str
    trained: tuple[str, ...]
    samples: tuple[int, int]
    stacked: bool


def distill(
    student: Module,
    teacher: Module,
    samples: Mapping[str, Array],
    *,
    labels: Array | None = None,
    settings: Distillation | None = None,
    checkpoint: pathlib.Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> DistillResult:
    """Train ``student`` to answer as ``teacher`` does; both are left as they are.

    Args:
        student: What to train, for example a pruned or quantized teacher.
        teacher: What is right. Inputs and outputs are paired by name, towers by theirs.
        samples: Arrays by input name with a leading axis of samples.
        labels: One row for each sample: integers for classes, others for values.
        settings: How.
        checkpoint: File that the state is written to after every epoch, at least every minute or so.
        resume: Go on from ``checkpoint``.
        progress: Told steps done, steps in all, and the losses.

    Raises:
        UserError: Samples, labels, names or settings that do not fit, nothing to train, a checkpoint of another run, or
            a loss that is not finite (names step and samples).
        UnsupportedError: A model has no differentiable form.
    """
    torch = require_torch("distillation")
    chosen = settings or Distillation()
    chosen.check()
    with torch.random.fork_rng(devices=[]):
        run = _Run(student, teacher, samples, labels, chosen, checkpoint)
        if resume:
            run.restore()
        return run.train(progress or (lambda done, total, text: None))


class _Run:
    """One training run: models, data, optimizer, and what was found so far."""

    def __init__(
        self,
        student: Module,
        teacher: Module,
        samples: Mapping[str, Array],
        labels: Array | None,
        settings: Distillation,
        checkpoint: pathlib.Path | None,
    ) -> None:
        import torch

        self._student, self._settings, self._path = student, settings, checkpoint
        self._data = Data(
            [student, teacher], samples, labels, batch=settings.batch, held_out=settings.held_out, seed=settings.seed
        )
        self._lesson = _lesson(student, teacher, settings, labels)
        self._trained = _trainable(student, settings.freeze)
        names = parameter_names(self._lesson.graph)
        self._parameters = []
        for path, parameter in self._lesson.graph.named_parameters():
            parameter.requires_grad_(names[path] in self._trained)
            if names[path] in self._trained:
                self._parameters.append(parameter)
                _keep_zeros(parameter)
        if not self._parameters:
            raise UserError("there is no weight to train", hint="no floating-point weight is left unfrozen")
        torch.manual_seed(settings.seed)
        self._identity = ""
        if checkpoint is not None:
            arrays = {**samples, **({} if labels is None else {"labels of the samples": labels})}
            models = {"student": student, "teacher": teacher}
            self._identity = checkpoints.identity_of(models, arrays, repr(settings))
        self._history: list[Judged] = []
        self._best_weights: list[Any] = []
        self._step, self._total = 0, self._planned()
        self._lesson.measure(inputs for inputs, _ in self._data.held_feeds())
        self._judge()  # also fits adapters, which the optimizer has to know
        trained = [*self._parameters, *self._lesson.adapters.parameters()]
        self._scales = [max(float(p.detach().square().mean().sqrt()), _LEAST_SCALE) for p in trained]
        self._optimizer = torch.optim.Adam([{"params": [p]} for p in trained], lr=settings.rate, foreach=False)
        self._saved = self._started = time.monotonic()

    def _planned(self) -> int | None:
        """Steps in all; None while they follow from time that is not measured yet."""
        if self._settings.epochs is None and self._settings.minutes is not None:
            return None
        return max(1, round((self._settings.epochs or 3) * self._data.steps))

    def train(self, progress: Progress) -> DistillResult:
        """Train to the end."""
        self._started = started = time.monotonic()
        timed = self._step
        while not self._over():
            if self._settings.minutes is not None and self._step == timed + _TIMED_STEPS:
                self._plan_by_time((time.monotonic() - started) / _TIMED_STEPS)
            loss = self._learn()
            self._step += 1
            if self._step % self._data.steps == 0 or self._step == self._total:
                self._judge()
                self._save()
            elif time.monotonic() - self._saved > 60:
                self._save()
            text = f"loss {loss:.4g}, held out {self._history[-1].loss:.4g}"
            progress(self._step, self._total or max(self._data.steps, self._step + 1), text)
        if self._history[-1].step != self._step:
            self._judge()
        return self._result()

    def _over(self) -> bool:
        return self._step == self._total or self._late() or self._impatient()

    def _late(self) -> bool:
        """Whether steps take so much longer than the first ones did that the time given is long over."""
        minutes = self._settings.minutes
        return minutes is not None and time.monotonic() - self._started > 60 * minutes * _TOO_LONG

    def _impatient(self) -> bool:
        patience = self._settings.patience
        best = min(range(len(self._history)), key=lambda n: self._history[n].loss)
        return patience > 0 and len(self._history) - 1 - best >= patience

    def _plan_by_time(self, seconds: float) -> None:
        """Set the number of steps, once: it is in the checkpoint, so that a resumed run ends where this one would."""
        assert self._settings.minutes is not None
        steps = max(_TIMED_STEPS + 1, int(self._settings.minutes * 60 / max(seconds, 1e-9)))
        if self._total is None or (steps < self._total and self._settings.epochs is not None):
            self._total = steps

    def _learn(self) -> float:
        """One step; a batch that has to go sample by sample adds its gradients up."""
        import torch

        numbers = self._data.chosen(self._step)
        feeds = list(self._data.feeds(numbers))
        rate = self._rate()
        for group, scale in zip(self._optimizer.param_groups, self._scales, strict=True):
            group["lr"] = rate * scale
        self._optimizer.zero_grad()
        total = 0.0
        for inputs, labels in feeds:
            loss = self._lesson.total(self._lesson.parts(inputs, labels)) / len(feeds)
            if not bool(torch.isfinite(loss)):
                where = f"step {self._step}, samples {', '.join(map(str, numbers))}"
                raise UserError(
                    f"the loss is {float(loss.detach())}", where=where, hint="look at these samples, or lower --rate"
                )
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_([p for p in self._parameters if p.grad is not None], _LARGEST_GRADIENT)
        self._optimizer.step()
        return total

    def _rate(self) -> float:
        total = self._total or 10 * self._data.steps
        warm = max(1, round(total * _WARM_UP))
        if self._step < warm:
            return self._settings.rate * (self._step + 1) / warm
        part = min(1.0, (self._step - warm) / max(1, total - warm))
        return self._settings.rate * (_LAST_RATE + (1 - _LAST_RATE) * (1 + math.cos(math.pi * part)) / 2)

    def _judge(self) -> None:
        """Measure on what is held out, and remember the weights when they are the best."""
        import torch

        sums: dict[str, float] = {}
        count = 0
        with torch.no_grad():
            for inputs, labels in self._data.held_feeds():
                size = len(next(iter(inputs.values()))) if self._data.stacked else 1
                for name, part in self._lesson.parts(inputs, labels).items():
                    sums[name] = sums.get(name, 0.0) + float(part) * size
                count += size
            parts = {name: total / count for name, total in sums.items()}
            loss = float(self._lesson.total({name: torch.tensor(part) for name, part in parts.items()}))
        if not self._history and not math.isfinite(loss):
            bad = next(name for name, part in parts.items() if not math.isfinite(part))
            raise UserError(
                f"the loss is {loss} before training: {bad}", where="step 0", hint="look for NaN in the samples"
            )
        if not self._history or loss < min(one.loss for one in self._history):
            self._best_weights = [parameter.detach().clone() for parameter in self._parameters]
        self._history.append(Judged(self._step, loss if math.isfinite(loss) else math.inf, parts))

    def _save(self) -> None:
        import torch

        self._saved = time.monotonic()
        if self._path is None:
            return
        state = {
            "identity": self._identity,
            "step": self._step,
            "total": self._total,
            "weights": [parameter.detach() for parameter in self._parameters],
            "best": self._best_weights,
            "adapters": self._lesson.adapters.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "history": [dataclasses.asdict(one) for one in self._history],
        }
        checkpoints.save(self._path, state)

    def restore(self) -> None:
        """Go back to where the checkpoint was written."""
        import torch

        if self._path is None:
            raise UserError("there is no checkpoint to resume from", hint="name its file")
        state = checkpoints.load(self._path, self._identity)
        self._step, self._total = state["step"], state["total"]
        with torch.no_grad():
            for parameter, tensor in zip(self._parameters, state["weights"], strict=True):
                parameter.copy_(tensor)
        self._best_weights = state["best"]
        self._lesson.adapters.load_state_dict(state["adapters"])
        self._optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        self._history = [Judged(**one) for one in state["history"]]

    def _result(self) -> DistillResult:
        import torch

        with torch.no_grad():
            for parameter, tensor in zip(self._parameters, self._best_weights, strict=True):
                parameter.copy_(tensor)
        module = self._student.clone()
        update_weights(module, self._lesson.graph)
        best = min(self._history, key=lambda one: one.loss)
        done = self._step == self._total
        minutes = self._late() or self._total != self._planned()
        return DistillResult(
            module=module,
            before=self._history[0],
            best=best,
            history=tuple(self._history),
            steps=self._step,
            stopped="patience" if self._impatient() and not done else "minutes" if minutes else "epochs",
            trained=tuple(sorted(self._trained)),
            samples=(len(self._data.taught), len(self._data.held)),
            stacked=self._data.stacked,
        )


def _lesson(student: Module, teacher: Module, settings: Distillation, labels: Array | None) -> Lesson:
    from mmopt.training.teaching import Lesson, features_of

    classes = settings.classes
    if labels is not None and labels.dtype.kind in "iu":
        # Labels that are classes say that the output is logits.
        classes = (*classes, settings.labelled or str(student.graph.outputs[0].name))
    return Lesson(
        student,
        teacher,
        settings.outputs,
        features_of(student, teacher, settings.features) if settings.feature_weight else [],
        classes=classes,
        temperature=settings.temperature,
        labelled=settings.labelled,
        weights=(settings.output_weight, settings.feature_weight, settings.task_weight),
    )


def _keep_zeros(parameter: Any) -> None:
    """Have the zeros of a sparse weight stay: they are what pruning has gained."""
    alive = parameter.detach() != 0
    if float(alive.float().mean()) < 1 - _SPARSE:
        parameter.register_hook(lambda gradient: gradient * alive)


def _trainable(module: Module, freeze: tuple[str, ...]) -> set[str]:
    """Names of weights to train: floats of several elements that are neither statistics, settings nor masks."""
    found = set()
    for weight in weights(module):
        if not weight.trainable or weight.tensor.size < 2:
            continue
        uses = [(use.node, use.idx) for use in weight.value.uses()]
        if uses and all(index in _STEERING.get(node.op_type, ()) for node, index in uses):
            continue
        if any(fnmatch.fnmatchcase(weight.name, pattern) for pattern in freeze):
            continue
        array = np.asarray(weight.tensor.numpy(), np.float64)
        if np.isfinite(array).all() and np.abs(array).max() < _LARGEST_WEIGHT:
            found.add(weight.name)
    return found
