"""How well a model does its task, by a function of the user's, and how much of that may be lost.

    def accuracy(run):                                   # mytask.py
        right = [run({"x": x})["logits"].argmax() == label for x, label in data()]
        return {"accuracy": sum(right) / len(right)}

``mmopt optimize … --eval mytask:accuracy --metrics accuracy=-0.003`` lets it fall by at most 0.003.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import numpy as np

from mmopt.errors import ContractError, MmoptError, UserError, did_you_mean
from mmopt.frontends.functions import find_function, one_line, user_line
from mmopt.ir.evaluate import ReferenceRunner
from mmopt.ir.module import Module

Run = Callable[[Mapping[str, Any]], dict[str, Any]]
"""Runs a model: inputs by name to outputs by name."""

Evaluator = Callable[..., Mapping[str, float]]
"""``evaluator(run)`` gives metrics by name. One that takes ``share`` too is told what part of its data to use where
it is called often, as for every layer."""

_NUMBER = r"\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?"
_CHANGE = re.compile(rf"([+-])({_NUMBER})(%?)")
_BOUND = re.compile(rf"(-?(?:{_NUMBER}))\.\.|\.\.(-?(?:{_NUMBER}))")
_LIMIT_HINT = "NAME=-0.003 (may fall by so much), +0.01 (may rise), -1%, +2%, 0.95.. (at least) or ..0.3 (at most)"

_SLACK = 1e-9
"""What a limit forgives, of its own size: 0.96 - 0.003 is not a number that floats have."""


@dataclasses.dataclass(frozen=True)
class Limit:
    """What a metric may become.

    Attributes:
        metric: Its name.
        kind: ``fall`` or ``rise``: the change from the original model that is allowed; ``least`` or ``most``: a bound.
        amount: Of the change, or the bound.
        relative: Whether the change is a part of what the original model has.
    """

    metric: str
    kind: Literal["fall", "rise", "least", "most"]
    amount: float
    relative: bool = False

    def __str__(self) -> str:
        if self.kind in ("least", "most"):
            return f"at {self.kind} {self.amount:g}"
        amount = f"{self.amount:.6g} %" if self.relative else f"{self.amount:g}"
        return f"may {self.kind} by {amount}"

    def bound(self, original: float) -> float:
        """The value that must not be passed, when the original model has ``original``."""
        if self.kind in ("least", "most"):
            return self.amount
        step = self.amount / 100 * abs(original) if self.relative else self.amount
        return original - step if self.kind == "fall" else original + step

    def keeps(self, value: float, original: float) -> bool:
        """Whether ``value`` is within the limit."""
        return self.excess(value, original) <= _SLACK * max(1.0, abs(self.bound(original)))

    def excess(self, value: float, original: float) -> float:
        """How far ``value`` lies beyond the bound; negative within it."""
        bound = self.bound(original)
        return bound - value if self.kind in ("fall", "least") else value - bound

    def used(self, value: float, original: float) -> float:
        """The part of what is allowed that ``value`` takes: 0 as the original, 1 at the bound, negative when better."""
        allowed = abs(self.bound(original) - original)
        change = original - value if self.kind in ("fall", "least") else value - original
        return change / max(allowed, _SLACK * max(1.0, abs(original)))


def parse_limits(texts: Iterable[str]) -> tuple[Limit, ...]:
    """``accuracy=-0.003,loss=..0.4`` and more such texts as limits.

    Raises:
        UserError: A text has another form, or limits a metric twice in the same direction.
    """
    limits = [_parse_limit(part) for text in texts for part in text.split(",")]
    downward = [(limit.metric, limit.kind in ("fall", "least")) for limit in limits]
    for place, key in enumerate(downward):
        if key in downward[:place]:
            raise UserError(f"{key[0]!r} has two limits of the same direction", where="--metrics")
    return tuple(limits)


def _parse_limit(text: str) -> Limit:
    metric, equals, given = text.strip().partition("=")
    change, bound = _CHANGE.fullmatch(given), _BOUND.fullmatch(given)
    if not equals or not metric or not (change or bound):
        raise UserError(f"{text!r} is no limit of a metric", where="--metrics", hint=_LIMIT_HINT)
    if change:
        sign, amount, percent = change.groups()
        return Limit(metric, "fall" if sign == "-" else "rise", float(amount), bool(percent))
    assert bound is not None
    least, most = bound.groups()
    return Limit(metric, "least", float(least)) if least else Limit(metric, "most", float(most))


@dataclasses.dataclass(frozen=True)
class Judgement:
    """Metrics of a result beside those of the original model.

    Attributes:
        metrics: Of the result, by name.
        original: Of the original model.
        limits: What the result has to keep.
        on: What was measured: ``artifact``, or ``optimized model`` (by onnxruntime) where the artifact cannot run.
    """

    metrics: Mapping[str, float]
    original: Mapping[str, float]
    limits: tuple[Limit, ...] = ()
    on: str = "artifact"

    @property
    def missed(self) -> list[str]:
        """What is beyond its limit, in words."""
        return [
            f"{limit.metric} is {self.metrics[limit.metric]:.6g}, was {self.original[limit.metric]:.6g} ({limit})"
            for limit in self.limits
            if not limit.keeps(self.metrics[limit.metric], self.original[limit.metric])
        ]

    def check(self, hint: str = "") -> None:
        """Raise :class:`ContractError` when a limit is missed."""
        if self.missed:
            raise ContractError("; ".join(self.missed), where="metrics", hint=hint)

    def __str__(self) -> str:
        limits = {name: [str(limit) for limit in self.limits if limit.metric == name] for name in self.metrics}
        return ", ".join(
            f"{name} {self.original[name]:.6g} → {value:.6g}"
            + (f" ({', '.join(limits[name])})" if limits[name] else "")
            for name, value in self.metrics.items()
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "on": self.on,
            "metrics": dict(self.metrics),
            "original": dict(self.original),
            "limits": [dataclasses.asdict(limit) for limit in self.limits],
            "missed": self.missed,
        }


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """An evaluator with the limits of its metrics, and, once it has seen it, with those of the original model.

    Attributes:
        function: The evaluator.
        limits: What its metrics may become.
        name: How to call it in messages.
        original: Metrics of the original model; empty before :meth:`against`.
    """

    function: Evaluator
    limits: tuple[Limit, ...] = ()
    name: str = "evaluator"
    original: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def partial(self) -> bool:
        """Whether the evaluator can be asked to use a part of its data."""
        return "share" in inspect.signature(self.function).parameters

    def against(self, module: Module, *, threads: int = 0, seed: int = 0) -> Evaluation:
        """The same, knowing the metrics of ``module``, the original.

        Raises:
            UserError: The evaluator fails, or gives no metric of a name that is limited.
        """
        with ReferenceRunner(threads=threads, seed=seed) as runner:
            original = self.measure(runner.prepare(module))
        for limit in self.limits:
            if limit.metric not in original:
                raise UserError(
                    f"it gives no metric {limit.metric!r}",
                    where=f"evaluator {self.name}",
                    hint=did_you_mean(limit.metric, original),
                )
        return dataclasses.replace(self, original=original)

    def measure(self, run: Run, *, share: float = 1.0) -> dict[str, float]:
        """The metrics of the model behind ``run``, on ``share`` of the data where the evaluator knows how.

        Raises:
            UserError: The evaluator raises, or gives something else than finite numbers by name.
            BackendError: The model does not run on what the evaluator gives it.
        """
        try:
            found = self.function(run, share=share) if self.partial else self.function(run)
        except MmoptError:
            raise
        except Exception as error:  # the user's code: anything can be raised
            place = user_line(error)
            raise UserError(
                f"it raised {type(error).__name__}: {one_line(error)}",
                where=f"evaluator {self.name}",
                hint=f"at {place}" if place else "",
            ) from error
        return self._checked(found)

    def judge(self, run: Run, *, on: str = "artifact") -> Judgement:
        """The metrics of the model behind ``run``, beside the original's.

        Raises:
            UserError: As :meth:`measure`.
        """
        metrics = self.measure(run)
        if set(metrics) != set(self.original):
            odd = sorted(set(metrics) ^ set(self.original))[0]
            raise UserError(f"it gives {odd!r} for one model and not for another", where=f"evaluator {self.name}")
        return Judgement(metrics, self.original, self.limits, on)

    def judge_module(self, module: Module, *, threads: int = 0, seed: int = 0) -> Judgement:
        """As :meth:`judge`, with ``module`` run by onnxruntime."""
        with ReferenceRunner(threads=threads, seed=seed) as runner:
            return self.judge(runner.prepare(module), on="optimized model")

    def damage(self, metrics: Mapping[str, float], original: Mapping[str, float] | None = None) -> float:
        """How much of what the limits allow ``metrics`` take, by the limit that is nearest to being missed.

        Without limits, where it is not known which way is worse: the largest change of a metric, of its own size.
        """
        before = self.original if original is None else original
        if self.limits:
            return max(limit.used(metrics[limit.metric], before[limit.metric]) for limit in self.limits)
        return max(abs(metrics[name] - value) / max(abs(value), _SLACK) for name, value in before.items())

    def _checked(self, found: object) -> dict[str, float]:
        where, hint = f"evaluator {self.name}", "return metrics by name, for example {'accuracy': 0.97}"
        if not isinstance(found, Mapping) or not found:
            raise UserError(f"it returned {type(found).__name__}, not metrics", where=where, hint=hint)
        metrics: dict[str, float] = {}
        for name, value in found.items():
            number = np.asarray(value)
            if not isinstance(name, str) or number.size != 1 or number.dtype.kind not in "fiub":
                raise UserError(f"its metric {name!r} is no number but {value!r:.80}", where=where, hint=hint)
            metrics[name] = float(number.reshape(-1)[0])
            if not math.isfinite(metrics[name]):
                raise UserError(f"its metric {name!r} is {metrics[name]}", where=where)
        return metrics


def load_evaluation(source: Evaluator | str, metrics: Iterable[str] = (), *, trust_code: bool = False) -> Evaluation:
    """An evaluation by a function or by its name.

    Args:
        source: The evaluator, or ``package.module:function``.
        metrics: Limits, as ``--metrics`` takes them.
        trust_code: Allow naming a function, whose code is run.

    Raises:
        UserError: Code is not trusted, there is no such function, or a limit has another form.
        LoadError: Importing it fails.
    """
    limits = parse_limits(metrics)
    if not isinstance(source, str):
        return Evaluation(source, limits, getattr(source, "__qualname__", "evaluator"))
    if not trust_code:
        raise UserError(
            "this would run the code of that package", where=f"--eval {source}", hint="say so with --trust-code"
        )
    return Evaluation(find_function(source), limits, source)
