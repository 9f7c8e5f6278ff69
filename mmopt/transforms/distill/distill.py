"""Trains the weights of a module that was cut or rounded until it answers as the one it was made from.

weights := argmin  outputs + λ · features        over calibration samples, without labels
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import ClassVar

from mmopt.errors import UserError
from mmopt.frontends.onnx import load_onnx
from mmopt.ir.module import Module
from mmopt.pipeline.base import Fidelity, Pass, PassContext
from mmopt.training import Distillation, DistillResult, distill
from mmopt.training.weights import weights
from mmopt.transforms.prune.reference import reference_of


@dataclasses.dataclass(frozen=True)
class Distill(Pass):
    """Train weights on calibration samples until the module answers as it did before it was pruned or rounded.

    Attributes:
        teacher: The model to learn from, a file; the one that pruning started from when empty.
        epochs: Passes over the samples; 3 when neither this nor ``minutes`` is given.
        minutes: Time to train for.
        batch: Samples of a step.
        rate: Largest step, as a part of the root mean square of each weight.
        features: Towers whose last features are imitated; all that both models have when empty.
        feature_weight: Weight of features in the loss; of outputs it is 1.
        classes: Outputs that are logits: imitated as shares, by divergence.
        temperature: Divides logits before they become shares.
        freeze: Patterns of names of weights to leave alone.
        held_out: Part of the samples to judge by.
        patience: Epochs without progress before training stops; 0 for no early stop.
    """

    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY

    teacher: str = ""
    epochs: float | None = None
    minutes: float | None = None
    batch: int = 16
    rate: float = 5e-3
    features: tuple[str, ...] = ()
    feature_weight: float = 0.5
    classes: tuple[str, ...] = ()
    temperature: float = 2.0
    freeze: tuple[str, ...] = ()
    held_out: float = 0.1
    patience: int = 5

    def run(self, module: Module, context: PassContext) -> bool:
        """Train, and take over the weights that do best on what is held out, if they beat those that are there.

        Raises:
            UserError: There are no samples, or the teacher does not fit.
        """
        teacher = self._teacher(module)
        if teacher is None:
            self.remark(context, "missed", "", "Nothing was cut from this module, and no teacher is given.")
            return False
        if context.inputs is None:
            raise UserError("distillation needs samples", where=self.spec(), hint="give some with --calib FILE.npz")
        result = distill(module, teacher, context.inputs, settings=self._settings(context.seed))
        if not result.best.step:
            self.remark(context, "missed", "", "Training found nothing better on the samples held out.")
            return False
        self._take(module, result)
        self.remark(context, "applied", "", _summary(result, context.samples_from))
        return True

    def _teacher(self, module: Module) -> Module | None:
        if self.teacher:
            return load_onnx(pathlib.Path(self.teacher))
        reference = reference_of(module)
        return None if reference is None else reference.module

    def _settings(self, seed: int) -> Distillation:
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del given["teacher"]
        return Distillation(**{**given, "features": self.features or None}, seed=seed)

    @staticmethod
    def _take(module: Module, result: DistillResult) -> None:
        trained = {weight.name: weight.tensor for weight in weights(result.module)}
        for weight in weights(module):
            if weight.name in result.trained:
                weight.replace(trained[weight.name])


def _summary(result: DistillResult, source: str) -> str:
    before, best = result.before.loss, result.best.loss
    made_up = ", which were made up" if source == "random" else ""
    return (
        f"The loss on held-out samples fell from {before:.4g} to {best:.4g} in {result.steps} steps "
        f"on {result.samples[0]} samples{made_up}."
    )
