"""One builder for every way of joining modalities: how they are joined is an option, what is joined is not.

The kinds follow the usual taxonomy of multimodal networks:

========== ==========================================================================================
sum        features are projected to one width and added
weighted   the same, each modality scaled by a learned share (softmax over one number per modality)
attention  the same, but the shares are computed from the features (an attention gate)
alignment  projected features are multiplied element by element
concat     features are concatenated
decision   every modality has its own heads; their probabilities are averaged
deep       modalities are joined at half depth and again, with that result, at full depth
========== ==========================================================================================

Several tasks give several heads on the joined features, hence several outputs, with any of the kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.zoo.encoders import Encoder
from mmopt.errors import UserError, did_you_mean


class Sum(nn.Module):
    """``Σ x_i``."""

    def __init__(self, width: int, count: int):
        super().__init__()
        self.width = width

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Join ``count`` tensors ``[B, width]``."""
        total = features[0]
        for feature in features[1:]:
            total = total + feature
        return total


class Weighted(nn.Module):
    """``Σ softmax(w)_i · x_i`` with learned ``w``."""

    def __init__(self, width: int, count: int):
        super().__init__()
        self.width = width
        self.weights = nn.Parameter(torch.randn(count))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Join ``count`` tensors ``[B, width]``."""
        shares = self.weights.softmax(0)
        total = features[0] * shares[0]
        for i, feature in enumerate(features[1:], 1):
            total = total + feature * shares[i]
        return total


class AttentionGate(nn.Module):
    """``Σ a_i · x_i`` with ``a = softmax_i(v · tanh(W x_i))``, computed for every sample."""

    def __init__(self, width: int, count: int):
        super().__init__()
        self.width = width
        self.score = nn.Sequential(nn.Linear(width, width // 2), nn.Tanh(), nn.Linear(width // 2, 1))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Join ``count`` tensors ``[B, width]``."""
        stacked = torch.stack(list(features), 1)
        return (self.score(stacked).softmax(1) * stacked).sum(1)


class Alignment(nn.Module):
    """``Π tanh(x_i)``, element by element."""

    def __init__(self, width: int, count: int):
        super().__init__()
        self.width = width

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Join ``count`` tensors ``[B, width]``."""
        product = features[0].tanh()
        for feature in features[1:]:
            product = product * feature.tanh()
        return product


JOINS: dict[str, Callable[[int, int], nn.Module]] = {
    "sum": Sum,
    "weighted": Weighted,
    "attention": AttentionGate,
    "alignment": Alignment,
}
"""Kinds that join vectors of one width into one vector of that width."""

FUSIONS = (*JOINS, "concat", "decision", "deep")


class FusionNet(nn.Module):
    """Encoders, a way of joining them, and one head per task.

    Subclasses only name the inputs: their ``forward`` hands each encoder's inputs to :meth:`fuse`.

    Args:
        encoders: Towers by modality, in the order they are joined.
        fusion: One of :data:`FUSIONS`.
        tasks: Number of classes by task, in the order of the outputs.
        width: Width of joined features and of the hidden layer of the heads.
        probabilities: Return softmax probabilities instead of logits (``decision`` always does).

    Raises:
        UserError: ``fusion`` is not known.
    """

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        fusion: str,
        tasks: Mapping[str, int],
        *,
        width: int = 256,
        probabilities: bool = False,
    ):
        super().__init__()
        if fusion not in FUSIONS:
            raise UserError(f"unknown fusion {fusion!r}", hint=did_you_mean(fusion, FUSIONS))
        self.fusion, self.probabilities = fusion, probabilities
        self.encoders = nn.ModuleDict(encoders)
        widths = [encoder.width for encoder in encoders.values()]
        if fusion == "decision":
            self.heads = nn.ModuleList(nn.ModuleList(_head(w, width, n) for w in widths) for n in tasks.values())
            return
        joined = width
        if fusion == "deep":
            self.shallow_join = nn.Linear(sum(encoder.shallow_width for encoder in encoders.values()), width)
            self.deep_join = nn.Linear(width + sum(widths), width)
        elif fusion == "concat":
            joined = sum(widths)
        else:
            self.projections = nn.ModuleList(nn.Linear(w, width) for w in widths)
            self.join = JOINS[fusion](width, len(widths))
        self.heads = nn.ModuleList(_head(joined, width, n) for n in tasks.values())

    def fuse(self, *inputs: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        """Run the encoders on their inputs, join, and apply the heads.

        Args:
            inputs: The inputs of each encoder, in the encoders' order.

        Returns:
            ``[B, classes]`` of the one task, or a tuple of them in the order of the tasks.
        """
        if self.fusion == "decision":
            features = self._features(inputs)
            outputs = [_mean_probability(heads, features) for heads in self.heads]
        else:
            joined = self._join_deep(inputs) if self.fusion == "deep" else self._join(self._features(inputs))
            outputs = [self._finish(head(joined)) for head in self.heads]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _features(self, inputs: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
        return [encoder(*args) for encoder, args in zip(self.encoders.values(), inputs, strict=True)]

    def _join(self, features: Sequence[Tensor]) -> Tensor:
        if self.fusion == "concat":
            return torch.cat(list(features), -1)
        projected = [project(x) for project, x in zip(self.projections, features, strict=True)]
        return self.join(projected)

    def _join_deep(self, inputs: Sequence[tuple[Tensor, ...]]) -> Tensor:
        stages = [encoder.stages(*args) for encoder, args in zip(self.encoders.values(), inputs, strict=True)]
        shallow, final = zip(*stages, strict=True)
        half = functional.relu(self.shallow_join(torch.cat(shallow, -1)))
        return functional.relu(self.deep_join(torch.cat((half, *final), -1)))

    def _finish(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1) if self.probabilities else logits


class TrimodalNet(FusionNet):
    """A fusion network of one text, one image and one sound."""

    def forward(self, input_ids: Tensor, pixel_values: Tensor, audio_features: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Ids ``[B, T]``, images ``[B, 3, H, W]``, sound ``[B, frames, bins]`` to the outputs of the tasks."""
        return self.fuse((input_ids,), (pixel_values,), (audio_features,))


def _head(before: int, width: int, classes: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(before, width), nn.ReLU(), nn.Linear(width, classes))


def _mean_probability(heads: nn.ModuleList, features: Sequence[Tensor]) -> Tensor:
    votes = [head(x).softmax(-1) for head, x in zip(heads, features, strict=True)]
    return torch.stack(votes).mean(0)
