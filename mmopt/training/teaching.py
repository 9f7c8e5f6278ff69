"""What a student learns from: the teacher's outputs, the features its towers end in, and labels."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mmopt.analysis.towers import analyze_towers
from mmopt.errors import UserError, did_you_mean
from mmopt.ir.module import Module
from mmopt.training import losses
from mmopt.training.fx import to_fx
from mmopt.training.lazy import torch
from mmopt.training.tensors import feed, from_numpy

if TYPE_CHECKING:
    from torch import Tensor

_RIDGE = 1e-2
_MEASURED = 64
"""Runs of the teacher that its variance is taken from."""


@dataclasses.dataclass(frozen=True)
class Feature:
    """The end of a tower in both models.

    Attributes:
        tower: Name of the tower.
        student: Tensor of the student.
        teacher: Tensor of the teacher.
    """

    tower: str
    student: str
    teacher: str


def features_of(student: Module, teacher: Module, wanted: Sequence[str] | None) -> list[Feature]:
    """The ends of towers, paired by the tower's name.

    Args:
        student: The student.
        teacher: The teacher.
        wanted: Names of towers; all that both have when None.

    Raises:
        UserError: A tower that is named is not in both models, or does not end in a tensor of the main graph.
    """
    ends = [{tower.name: tower.outputs for tower in analyze_towers(module).towers} for module in (student, teacher)]
    known = [name for name in ends[1] if name in ends[0]]
    inner = [{str(v.name) for node in module.graph for v in node.outputs} for module in (student, teacher)]
    found = []
    for name in known if wanted is None else wanted:
        if name not in known:
            raise UserError(f"there is no tower {name!r} in both models", hint=did_you_mean(name, known))
        pairs = [
            Feature(name, a, b)
            for a, b in zip(ends[0][name], ends[1][name], strict=False)
            if a in inner[0] and b in inner[1] and len(ends[0][name]) == len(ends[1][name])
        ]
        if wanted is not None and not pairs:
            raise UserError(f"the tower {name!r} ends in no tensor that both models have", hint="leave it out")
        found += pairs
    outputs = {str(value.name) for value in teacher.graph.outputs}
    return found if wanted is not None else [feature for feature in found if feature.teacher not in outputs]


class Lesson:
    """Student and teacher in their differentiable form, and the loss between them.

    Args:
        student: The student; ``graph`` is its form.
        teacher: The teacher.
        outputs: Outputs to imitate; all they have in common when None.
        features: Ends of towers to imitate.
        classes: Outputs that are logits, imitated by divergence at a temperature rather than by squared error.
        temperature: The temperature.
        labelled: The output that labels are about; the first when None.
        weights: Parts of the loss: of outputs, features, and labels.
    """

    def __init__(
        self,
        student: Module,
        teacher: Module,
        outputs: Sequence[str] | None,
        features: Sequence[Feature],
        *,
        classes: Sequence[str],
        temperature: float,
        labelled: str | None,
        weights: tuple[float, float, float],
    ) -> None:
        self._names = _common(student, teacher, outputs)
        for name in (*classes, *([labelled] if labelled else [])):
            if name not in {str(value.name) for value in student.graph.outputs}:
                known = [str(value.name) for value in student.graph.outputs]
                raise UserError(f"the student has no output {name!r}", hint=did_you_mean(name, known))
        self._labelled = labelled or str(student.graph.outputs[0].name)
        self._features, self._temperatures = list(features), dict.fromkeys(classes, temperature)
        self._scales: dict[str, float] = {}
        self._weights = weights
        ends = [feature.student for feature in features]
        self.graph = to_fx(student, list(dict.fromkeys([*self._names, self._labelled, *ends])))
        wanted = list(dict.fromkeys([*self._names, *(feature.teacher for feature in features)]))
        self._teacher = to_fx(teacher, wanted).requires_grad_(False)
        self.adapters = torch.nn.ModuleDict()

    def measure(self, feeds: Iterable[Mapping[str, Any]]) -> None:
        """Note how much the teacher's outputs and features vary over some samples: what errors are a part of."""
        rows: dict[str, list[Tensor]] = {}
        with torch.no_grad():
            for inputs in itertools.islice(feeds, _MEASURED):
                for name, value in self._teacher(**feed(self._teacher, inputs)).items():
                    rows.setdefault(name, []).append(value)
        self._scales = {name: losses.variance(values) for name, values in rows.items()}

    def parts(self, inputs: Mapping[str, Any], labels: np.ndarray[Any, Any] | None) -> dict[str, Tensor]:
        """The loss by part: ``output NAME``, ``feature TOWER``, ``task``; scalars, not yet weighed."""
        made = self.graph(**feed(self.graph, inputs))
        with torch.no_grad():
            right = self._teacher(**feed(self._teacher, inputs))
        found = {
            f"output {name}": losses.imitation(
                made[name].float(), right[name].float(), self._temperatures.get(name), self._scales.get(name, 1.0)
            )
            for name in self._names
        }
        for number, feature in enumerate(self._features):
            a, b = made[feature.student].float(), right[feature.teacher].float()
            key = f"feature {feature.tower}"
            loss = losses.imitation(self._adapted(number, a, b), b, None, self._scales.get(feature.teacher, 1.0))
            found[key] = found[key] + loss if key in found else loss
        if labels is not None:
            found["task"] = losses.task(made, from_numpy(labels), self._labelled)
        return found

    def total(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The weighed sum."""
        outputs, features, task = self._weights
        weights = {"output": outputs, "feature": features, "task": task}
        return torch.stack([part * weights[name.partition(" ")[0]] for name, part in parts.items()]).sum()

    def _adapted(self, number: int, a: Tensor, b: Tensor) -> Tensor:
        """The student's features in the width of the teacher's: a linear map, trained along and then thrown away."""
        if a.shape == b.shape:
            return a
        axis = 1 if a.ndim == 4 else -1
        rest = [[size for n, size in enumerate(x.shape) if n != axis % x.ndim] for x in (a, b)]
        if a.ndim != b.ndim or rest[0] != rest[1]:
            where = f"tower {self._features[number].tower}"
            what = f"its features are {list(a.shape)} in the student and {list(b.shape)} in the teacher"
            raise UserError(what, where=where, hint="leave the tower out of the features")
        a = a.movedim(axis, -1)
        if str(number) not in self.adapters:
            self.adapters[str(number)] = _fitted(a.detach(), b.movedim(axis, -1))
        adapted: Tensor = self.adapters[str(number)](a)
        return adapted.movedim(-1, axis)


def _fitted(a: Tensor, b: Tensor) -> torch.nn.Linear:
    """The linear map from ``a`` to ``b`` with the least squared error, kept small."""
    rows, right = a.reshape(-1, a.shape[-1]).double(), b.reshape(-1, b.shape[-1]).double()
    gram = rows.t() @ rows
    gram += torch.eye(len(gram)) * (_RIDGE * gram.diagonal().mean() + 1e-12)
    made = torch.nn.Linear(a.shape[-1], b.shape[-1], bias=False)
    with torch.no_grad():
        made.weight.copy_(torch.linalg.solve(gram, rows.t() @ right).t())
    return made


def _common(student: Module, teacher: Module, outputs: Sequence[str] | None) -> list[str]:
    """Outputs that both have.

    Raises:
        UserError: There are none, or one that is named is missing.
    """
    theirs = [[str(value.name) for value in module.graph.outputs] for module in (student, teacher)]
    known = [name for name in theirs[0] if name in theirs[1]]
    for name in outputs or ():
        if name not in known:
            raise UserError(f"there is no output {name!r} in both models", hint=did_you_mean(name, known))
    if not known:
        what = f"the student's outputs are {', '.join(theirs[0])}, the teacher's {', '.join(theirs[1])}"
        raise UserError(what, hint="outputs are paired by name; give the student those of the teacher")
    return list(outputs) if outputs is not None else known
