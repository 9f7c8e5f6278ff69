"""The textbook fusion networks and the small variants, as functions that return torch modules with fresh weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.zoo.encoders import (
    Attention,
    ImageCnn,
    SequenceRnn,
    TextCnn,
    TextRnn,
    TextTransformer,
    TransformerLayer,
    VideoRnn,
)
from benchmarks.zoo.fusion import FusionNet, TrimodalNet
from benchmarks.zoo.resnet import ResNet50Encoder


class CnnRnn(nn.Module):
    """A CNN on every frame and an RNN over the frames, for classes of action."""

    def __init__(self, classes: int):
        super().__init__()
        self.encoder = VideoRnn(ImageCnn((32, 64, 128, 256, 512)), 512, nn.GRU)
        self.head = nn.Linear(self.encoder.width, classes)

    def forward(self, video_frames: Tensor) -> Tensor:
        """Clips ``[B, T, 3, H, W]`` to logits ``[B, classes]``."""
        return self.head(self.encoder(video_frames))


class FourModalNet(FusionNet):
    """A fusion network of text with a mask, an image, a sound and a clip."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor,
        audio_features: Tensor,
        video_frames: Tensor,
    ) -> Tensor | tuple[Tensor, ...]:
        """The inputs of the four encoders to the outputs of the tasks."""
        return self.fuse((input_ids, attention_mask), (pixel_values,), (audio_features,), (video_frames,))


class ImageTextAttention(nn.Module):
    """Words look at the places of an image by cross attention; what they saw is averaged and classified."""

    def __init__(self, text: TextTransformer, image: ImageCnn, heads: int, classes: int):
        super().__init__()
        self.text, self.image = text, image
        self.places = nn.Linear(image.width, text.width)
        self.attention = Attention(text.width, heads)
        self.norm = nn.LayerNorm(text.width)
        self.head = nn.Linear(text.width, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> Tensor:
        """Ids and mask ``[B, T]`` and images ``[B, 3, H, W]`` to logits ``[B, classes]``."""
        words = self.text.tokens(self.text.early(input_ids, attention_mask), attention_mask)
        places = self.places(self.image.grid(self.image.early(pixel_values)))
        seen = self.norm(words + self.attention(words, places))
        valid = attention_mask[..., None].to(seen.dtype)
        return self.head((seen * valid).sum(1) / valid.sum(1))


class ImageInText(nn.Module):
    """Places of an image take the positions of placeholder tokens in a text, and one transformer reads both.

    Args:
        image: Encoder whose last map has as many places as a text has placeholders.
        vocab: Size of the vocabulary.
        width: Width of the transformer.
        placeholder: Id of the token that stands for a place.
        classes: Number of answers.
    """

    def __init__(self, image: ImageCnn, vocab: int, width: int, placeholder: int, classes: int):
        super().__init__()
        self.image, self.placeholder = image, placeholder
        self.projector = nn.Linear(image.width, width)
        self.embedding = nn.Embedding(vocab, width)
        self.layers = nn.Sequential(TransformerLayer(width, 2), TransformerLayer(width, 2))
        self.head = nn.Linear(width, classes)

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        """Ids ``[B, T]`` and images ``[B, 3, H, W]`` to logits ``[B, classes]``."""
        words = self.embedding(input_ids)
        places = self.projector(self.image.grid(self.image.early(pixel_values)))
        steps = input_ids.shape[1]
        first_highest = steps - torch.arange(steps, device=input_ids.device)
        rank = (input_ids == self.placeholder) * first_highest
        positions = rank.topk(places.shape[1]).indices
        mixed = words.scatter(1, positions[..., None].expand_as(places), places)
        return self.head(self.layers(mixed).mean(1))


class Siamese(nn.Module):
    """Two images through one and the same encoder, compared by cosine similarity."""

    def __init__(self, encoder: ImageCnn, width: int):
        super().__init__()
        self.encoder = encoder
        self.projection = nn.Linear(encoder.width, width)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Two batches of images ``[B, 3, H, W]`` to similarities ``[B]`` in -1 to 1."""
        return (self._embed(first) * self._embed(second)).sum(-1)

    def _embed(self, pixels: Tensor) -> Tensor:
        return functional.normalize(self.projection(self.encoder(pixels)), dim=-1)


def sentiment() -> nn.Module:
    """Text LSTM, image CNN and audio LSTM, concatenated; three moods."""
    encoders = {
        "text": TextRnn(30_000, 256, 256, bidirectional=True),
        "image": ImageCnn((32, 64, 128, 256, 512), depth=2),
        "audio": SequenceRnn(64, 256, bidirectional=True),
    }
    return TrimodalNet(encoders, "concat", {"sentiment": 3}, width=512)


def recommendation() -> nn.Module:
    """Text CNN, image CNN and audio LSTM, concatenated; probabilities over 5,000 items."""
    encoders = {
        "text": TextCnn(30_000, 200, 128),
        "image": ImageCnn((32, 64, 128, 256, 512)),
        "audio": SequenceRnn(64, 192),
    }
    return TrimodalNet(encoders, "concat", {"items": 5_000}, width=512, probabilities=True)


def hci() -> nn.Module:
    """Text LSTM (command), image CNN (gesture) and voice LSTM, joined by an attention gate; twenty intentions."""
    encoders = {
        "text": TextRnn(10_000, 128, 192),
        "image": ImageCnn((32, 64, 128, 256)),
        "voice": SequenceRnn(40, 192),
    }
    return TrimodalNet(encoders, "attention", {"intention": 20}, width=256)


def four_modal() -> nn.Module:
    """BERT-style text, image CNN, audio RNN and video CNN-LSTM, concatenated; ten classes."""
    encoders = {
        "text": TextTransformer(20_000, 256, layers=4, heads=4, positions=256),
        "image": ImageCnn((32, 64, 128, 256, 512)),
        "audio": SequenceRnn(64, 256, nn.RNN),
        "video": VideoRnn(ImageCnn((24, 48, 96, 192)), 256),
    }
    return FourModalNet(encoders, "concat", {"class": 10}, width=512)


def cnn_rnn() -> nn.Module:
    """CNN on each of sixteen frames and a GRU over them; 101 actions."""
    return CnnRnn(101)


def image_text_attention() -> nn.Module:
    """Text transformer and image CNN joined by cross attention; answers among 1,000."""
    text = TextTransformer(20_000, 384, layers=4, heads=6, positions=256)
    return ImageTextAttention(text, ImageCnn((32, 64, 128, 256, 512)), 6, 1_000)


def resnet50_embedlstm_audiolstm() -> nn.Module:
    """ResNet-50, embedding with LSTM, and audio LSTM, concatenated; seven emotions."""
    encoders = {
        "text": TextRnn(20_000, 200, 256),
        "image": ResNet50Encoder(),
        "audio": SequenceRnn(64, 256),
    }
    return TrimodalNet(encoders, "concat", {"emotion": 7}, width=512)


def small(fusion: str, tasks: Mapping[str, int]) -> nn.Module:
    """The three modalities in miniature, joined in the given way."""
    encoders = {
        "text": TextRnn(100, 16, 24),
        "image": ImageCnn((8, 16, 24)),
        "audio": SequenceRnn(16, 20, bidirectional=True),
    }
    return TrimodalNet(encoders, fusion, tasks, width=32)


def small_siamese() -> nn.Module:
    """Two small images through one encoder."""
    return Siamese(ImageCnn((8, 16, 24)), 32)


def small_image_in_text() -> nn.Module:
    """A small image of sixteen places inside a text."""
    return ImageInText(ImageCnn((8, 16, 24)), 100, 32, placeholder=99, classes=4)
