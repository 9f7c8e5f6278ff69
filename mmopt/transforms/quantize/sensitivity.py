"""How much the outputs of a model move when one layer alone is quantized."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mmopt.analysis.calibration import Calibration
from mmopt.analysis.calibration.collect import Batches
from mmopt.ir.evaluate import ReferenceRunner
from mmopt.ir.module import Module
from mmopt.transforms.canonicalize.editing import Array
from mmopt.transforms.quantize.assignment import FLOAT, assign, offered, relative_error
from mmopt.transforms.quantize.compress_weights import Store
from mmopt.transforms.quantize.layers import Layer

if TYPE_CHECKING:
    from mmopt.evaluation import Evaluation

EVALUATIONS = 3.0
"""Runs over all samples, for every hundred layers, that measuring may cost; schemes share them."""


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """Errors of the outputs by layer and scheme.

    Attributes:
        errors: By (layer, scheme): root mean square error of the worst output, of its root mean square; with an
            evaluator, the part of what the limits of its metrics allow on top.
        samples: Samples each was measured on.
        runs: Runs over all samples that it took.
        evaluations: Runs over all data of the evaluator that it took.
    """

    errors: Mapping[tuple[str, str], float]
    samples: int
    runs: float = 0.0
    evaluations: float = 0.0

    def of(self, layer: str, scheme: str) -> float:
        """The error of a layer under a scheme; 0 in float."""
        return 0.0 if scheme == FLOAT else self.errors[layer, scheme]

    def ranked(self, scheme: str) -> list[tuple[str, float]]:
        """Layers by their error, the worst first."""
        found = [(layer, error) for (layer, name), error in self.errors.items() if name == scheme]
        return sorted(found, key=lambda pair: -pair[1])


def measure(
    module: Module,
    layers: Sequence[Layer | Store],
    schemes: Collection[str],
    samples: Mapping[str, Array],
    calibration: Calibration | None,
    *,
    evaluation: Evaluation | None = None,
    threads: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Sensitivity:
    """Quantize one layer at a time and run the whole model.

    Args:
        module: The module in float; it is left as it is.
        layers: Layers to measure.
        schemes: Schemes to measure each under, where they are worth considering.
        samples: Arrays by input name with a leading axis of samples. Each layer is measured on so many of them that a
            hundred layers cost about :data:`EVALUATIONS` runs over all.
        calibration: Statistics of the module.
        evaluation: Judges each by the task too, on the same part of its data where the evaluator takes a share, on all
            where it does not.
        threads: Threads of the reference runtime.
        progress: Told runs done and all of them.

    Raises:
        BackendError: The model does not run on the samples.
    """
    batches = Batches(module, samples)
    pairs = [(layer, name) for layer in layers for name in offered(layer, schemes) if name != FLOAT]
    schemes_each = max(1, len({name for _, name in pairs}))
    count = max(1, math.ceil(len(batches) * EVALUATIONS / 100 / schemes_each))
    # Spread over the samples, so that no layer is judged by the first few alone.
    places = [number * len(batches) // count for number in range(count)]
    chosen = [batches[place] for place in places]
    errors: dict[tuple[str, str], float] = {}
    share = min(1.0, EVALUATIONS / 100 / schemes_each) if evaluation is not None and evaluation.partial else 1.0
    with ReferenceRunner(threads=threads) as runner:
        reference: list[Any] = list(runner.stream(module, chosen))
        original = None if evaluation is None else evaluation.measure(runner.prepare(module), share=share)
        for number, (layer, name) in enumerate(pairs):
            changed = module.clone()
            assign(changed, {layer.name: name}, calibration)
            outputs = runner.stream(changed, chosen)
            found = [relative_error(got, want) for got, want in zip(outputs, reference, strict=True)]
            errors[layer.name, name] = sum(found) / len(found)
            if evaluation is not None:
                damage = evaluation.damage(evaluation.measure(runner.prepare(changed), share=share), original)
                errors[layer.name, name] += max(damage, 0.0)
            progress(number + 1, len(pairs))
    judged = 0.0 if evaluation is None else share * (len(pairs) + 1)
    return Sensitivity(errors, count, count * (len(pairs) + 1) / len(batches), judged)
