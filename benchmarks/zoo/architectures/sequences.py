"""Small recurrent networks, and two streams joined in every way."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

CLASSES = 10
VOCABULARY = 64


class BiLstmStack(nn.Module):
    """Two bidirectional LSTMs over words ``[B, T]``; the mean over time is classified."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, 18)
        self.recurrent = nn.LSTM(18, 14, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(28, CLASSES)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Ids to logits."""
        return self.head(self.recurrent(self.words(input_ids))[0].mean(1))


class GruStack(nn.Module):
    """Three GRUs over ``[B, T, 20]``, the third with a residual around it; the last state is classified."""

    def __init__(self) -> None:
        super().__init__()
        self.lower = nn.GRU(20, 16, 2, batch_first=True)
        self.upper, self.norm = nn.GRU(16, 16, batch_first=True), nn.LayerNorm(16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Series to logits."""
        lower = self.lower(x)[0]
        return self.head(self.norm(lower + self.upper(lower)[0])[:, -1])


class Seq2Seq(nn.Module):
    """The last state of an RNN over the source is the first state of one over the target; one table of words."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, 12)
        self.encoder, self.decoder = nn.RNN(12, 16, batch_first=True), nn.RNN(12, 16, batch_first=True)
        self.back = nn.Linear(16, 12)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Ids ``[B, S]`` and ``[B, T]`` to logits over the words."""
        state = self.encoder(self.words(source))[1]
        decoded = self.decoder(self.words(target), state)[0]
        return self.back(decoded) @ self.words.weight.T


class TemporalConvolutions(nn.Module):
    """Dilated convolutions over ``[B, 12, T]`` that see the past only, gated, with skips that add up."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(12, 16, 1)
        self.both = nn.ModuleList(nn.Conv1d(16, 32, 3, dilation=2**k) for k in range(3))
        self.out = nn.ModuleList(nn.Conv1d(16, 16, 1) for _ in range(3))
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Series to logits."""
        x = self.stem(x)
        skips = torch.zeros_like(x)
        for k, (both, out) in enumerate(zip(self.both, self.out, strict=True)):
            value, gate = both(functional.pad(x, (2 * 2**k, 0))).chunk(2, 1)
            made = out(torch.tanh(value) * torch.sigmoid(gate))
            x, skips = x + made, skips + made
        return self.head(functional.relu(skips).mean(-1))


class _Joined(nn.Module):
    """A text ``[B, T]`` and an image ``[B, 3, 16, 16]``."""

    text_width = image_width = 16

    def __init__(self) -> None:
        super().__init__()
        self.words, self.recurrent = nn.Embedding(VOCABULARY, 12), nn.GRU(12, self.text_width, batch_first=True)
        self.image = nn.Sequential(
            nn.Conv2d(3, 10, 3, 2, 1), nn.ReLU(), nn.Conv2d(10, self.image_width, 3, 2, 1), nn.ReLU()
        )
        self.head = nn.Sequential(nn.Linear(self.joined_width(), 24), nn.ReLU(), nn.Linear(24, CLASSES))

    def joined_width(self) -> int:
        """Length of what :meth:`join` makes."""
        return 16

    def join(self, text: Tensor, image: Tensor) -> Tensor:
        """States ``[B, T, text]`` and places ``[B, P, image]`` to one vector each."""
        raise NotImplementedError

    def forward(self, input_ids: Tensor, x: Tensor) -> Tensor:
        """Ids and image to logits."""
        text = self.recurrent(self.words(input_ids))[0]
        return self.head(self.join(text, self.image(x).flatten(2).transpose(1, 2)))


class JoinedByConcat(_Joined):
    """Side by side, of different widths."""

    text_width, image_width = 14, 20

    def joined_width(self) -> int:
        return 34

    def join(self, text: Tensor, image: Tensor) -> Tensor:
        return torch.cat([text[:, -1], image.mean(1)], 1)


class JoinedBySum(_Joined):
    """Added."""

    def join(self, text: Tensor, image: Tensor) -> Tensor:
        return text[:, -1] + image.mean(1)


class JoinedByProduct(_Joined):
    """Multiplied element by element."""

    def join(self, text: Tensor, image: Tensor) -> Tensor:
        return text[:, -1] * image.mean(1)


class JoinedByAttention(_Joined):
    """Words attend to places with two heads."""

    image_width = 20

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, kdim=20, vdim=20, batch_first=True)

    def join(self, text: Tensor, image: Tensor) -> Tensor:
        return (text + self.attention(text, image, image, need_weights=False)[0]).mean(1)


class JoinedByBilinear(_Joined):
    """Every feature of one by every feature of the other."""

    text_width, image_width = 6, 8

    def joined_width(self) -> int:
        return 48

    def join(self, text: Tensor, image: Tensor) -> Tensor:
        return torch.einsum("bi,bj->bij", text[:, -1], image.mean(1)).flatten(1)


class JoinedByFilm(_Joined):
    """The text scales and shifts the image's channels."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation = nn.Linear(16, 32)

    def join(self, text: Tensor, image: Tensor) -> Tensor:
        scale, shift = self.modulation(text[:, -1]).chunk(2, 1)
        return (image * scale[:, None] + shift[:, None]).amax(1)
