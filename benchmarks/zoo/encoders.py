"""The encoders of the fusion networks: one class per kind of tower, each in two halves so that it can be joined twice.

All tensors are float32 unless they hold token ids. ``B`` is the batch.
"""

from __future__ import annotations

import abc
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class Encoder(nn.Module, abc.ABC):
    """A tower: ``early`` and ``late`` halves, and a summary of what lies between them.

    Attributes:
        width: Length of the feature vector that ``forward`` returns.
        shallow_width: Length of the vector that ``summary`` returns.
    """

    width: int
    shallow_width: int

    @abc.abstractmethod
    def early(self, *inputs: Tensor) -> Tensor:
        """The first half: from inputs to a hidden state."""

    @abc.abstractmethod
    def late(self, hidden: Tensor, *inputs: Tensor) -> Tensor:
        """The second half: from the hidden state to ``[B, width]``; ``inputs`` are at hand for masks."""

    def summary(self, hidden: Tensor) -> Tensor:
        """What a fusion at half depth sees: ``[B, shallow_width]``. Sequences are averaged over time."""
        return hidden.mean(1)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Features of the inputs: ``[B, width]``."""
        return self.late(self.early(*inputs), *inputs)

    def stages(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Features at half and at full depth: ``[B, shallow_width]`` and ``[B, width]``."""
        hidden = self.early(*inputs)
        return self.summary(hidden), self.late(hidden, *inputs)


class SequenceRnn(Encoder):
    """Two recurrent layers over a sequence ``[B, T, features]``; the last step is the feature vector.

    Args:
        features: Length of one step.
        hidden: Units per layer and direction.
        cell: ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN``.
        bidirectional: Run the first layer in both directions.
    """

    def __init__(self, features: int, hidden: int, cell: type[nn.RNNBase] = nn.LSTM, bidirectional: bool = False):
        super().__init__()
        self.shallow_width = hidden * (2 if bidirectional else 1)
        self.width = hidden
        self.lower = cell(features, hidden, batch_first=True, bidirectional=bidirectional)
        self.upper = cell(self.shallow_width, hidden, batch_first=True)

    def early(self, *inputs: Tensor) -> Tensor:
        return self.lower(inputs[0])[0]

    def late(self, hidden: Tensor, *inputs: Tensor) -> Tensor:
        return self.upper(hidden)[0][:, -1]


class TextRnn(SequenceRnn):
    """Token ids ``[B, T]`` through an embedding and two recurrent layers."""

    def __init__(self, vocab: int, embedding: int, hidden: int, bidirectional: bool = False):
        super().__init__(embedding, hidden, nn.LSTM, bidirectional)
        self.embedding = nn.Embedding(vocab, embedding, padding_idx=0)

    def early(self, *inputs: Tensor) -> Tensor:
        return super().early(self.embedding(inputs[0]))


class TextCnn(Encoder):
    """Token ids ``[B, T]`` through parallel convolutions, each kept at its maximum over time (Kim, 2014)."""

    def __init__(self, vocab: int, embedding: int, filters: int, kernels: Sequence[int] = (3, 4, 5)):
        super().__init__()
        self.shallow_width = embedding
        self.width = filters * len(kernels)
        self.embedding = nn.Embedding(vocab, embedding, padding_idx=0)
        self.convolutions = nn.ModuleList(nn.Conv1d(embedding, filters, k, padding=k // 2) for k in kernels)

    def early(self, *inputs: Tensor) -> Tensor:
        return self.embedding(inputs[0])

    def late(self, hidden: Tensor, *inputs: Tensor) -> Tensor:
        signal = hidden.transpose(1, 2)
        return torch.cat([functional.relu(conv(signal)).amax(-1) for conv in self.convolutions], -1)


class Attention(nn.Module):
    """Multi-head attention of ``query [B, Q, width]`` over ``memory [B, K, width]``."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(self, query: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend; ``mask [B, K]`` is 1 where the memory may be looked at."""
        q, k, v = self._split(self.query(query)), self._split(self.key(memory)), self._split(self.value(memory))
        allowed = None if mask is None else mask.bool()[:, None, None, :]
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        return self.output(mixed.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class TransformerLayer(nn.Module):
    """Self-attention and a feed-forward part, each with residual and layer norm after it (as in BERT)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention = Attention(width, heads)
        self.attention_norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.output_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``[B, T, width]`` to the same shape."""
        x = self.attention_norm(x + self.attention(x, x, mask))
        return self.output_norm(x + self.feed_forward(x))


class TextTransformer(Encoder):
    """Token ids and mask ``[B, T]`` through a small BERT; the first token is the feature vector."""

    def __init__(self, vocab: int, width: int, layers: int, heads: int, positions: int):
        super().__init__()
        self.width = self.shallow_width = width
        self.embedding = nn.Embedding(vocab, width, padding_idx=0)
        self.position = nn.Embedding(positions, width)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(TransformerLayer(width, heads) for _ in range(layers))

    def early(self, *inputs: Tensor) -> Tensor:
        ids, mask = inputs
        place = torch.arange(ids.shape[1], device=ids.device)
        x = self.norm(self.embedding(ids) + self.position(place))
        for layer in self.layers[: len(self.layers) // 2]:
            x = layer(x, mask)
        return x

    def tokens(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """The second half, for all tokens: ``[B, T, width]``."""
        for layer in self.layers[len(self.layers) // 2 :]:
            hidden = layer(hidden, mask)
        return hidden

    def late(self, hidden: Tensor, *inputs: Tensor) -> Tensor:
        return self.tokens(hidden, inputs[1])[:, 0]


class ImageCnn(Encoder):
    """Images ``[B, 3, H, W]`` through convolution, batch norm, ReLU and pooling; averaged over the last map.

    Args:
        widths: Channels of the stem (stride 2) and of each block after it; a block halves height and width.
        depth: Convolutions per block.
    """

    def __init__(self, widths: Sequence[int], depth: int = 1):
        super().__init__()
        blocks = [_conv(3, widths[0], stride=2)]
        for before, after in itertools.pairwise(widths):
            convs = [_conv(before if i == 0 else after, after) for i in range(depth)]
            blocks.append(nn.Sequential(*convs, nn.MaxPool2d(2)))
        half = (len(blocks) + 1) // 2
        self.lower, self.upper = nn.Sequential(*blocks[:half]), nn.Sequential(*blocks[half:])
        self.width, self.shallow_width = widths[-1], widths[half - 1]

    def early(self, *inputs: Tensor) -> Tensor:
        return self.lower(inputs[0])

    def grid(self, hidden: Tensor) -> Tensor:
        """The last map as a sequence of its places: ``[B, H'·W', width]``."""
        return self.upper(hidden).flatten(2).transpose(1, 2)

    def late(self, hidden: Tensor, *inputs: Tensor) -> Tensor:
        return self.upper(hidden).mean((2, 3))

    def summary(self, hidden: Tensor) -> Tensor:
        return hidden.mean((2, 3))


class VideoRnn(SequenceRnn):
    """Frames ``[B, T, 3, H, W]``: an image encoder on every frame, then two recurrent layers over time."""

    def __init__(self, frame: Encoder, hidden: int, cell: type[nn.RNNBase] = nn.LSTM):
        super().__init__(frame.width, hidden, cell)
        self.frame = frame

    def early(self, *inputs: Tensor) -> Tensor:
        clips = inputs[0]
        features = self.frame(clips.flatten(0, 1))
        return super().early(features.unflatten(0, (clips.shape[0], clips.shape[1])))


def _conv(before: int, after: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)
    )
