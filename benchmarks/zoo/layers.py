"""Layers of reference models as data: what each multiplies, and how often a run of the model does it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Product:
    """``[m, k] @ [k, n]`` with a constant right operand and a bias."""

    calls: int
    m: int
    k: int
    n: int

    @property
    def label(self) -> str:
        return f"{self.m}x{self.k}x{self.n}"

    @property
    def operations(self) -> float:
        return 2.0 * self.m * self.k * self.n

    @property
    def weights(self) -> int:
        """Elements of the weight."""
        return self.k * self.n


@dataclasses.dataclass(frozen=True)
class Convolution:
    """One image, square windows and strides, padding that keeps the size, a bias. ``space`` has the image's extents."""

    calls: int
    channels: int
    filters: int
    window: int
    stride: int
    space: tuple[int, ...]
    groups: int = 1
    padding: int | None = None

    @property
    def label(self) -> str:
        space = "x".join(map(str, self.space))
        kind = "depthwise " if self.groups > 1 else ""
        stride = f"/{self.stride}" if self.stride > 1 else ""
        return f"{kind}{self.channels}->{self.filters} {self.window}{stride} @{space}"

    @property
    def pads(self) -> int:
        return self.window // 2 if self.padding is None else self.padding

    @property
    def outputs(self) -> tuple[int, ...]:
        """Extents of the result."""
        return tuple((extent + 2 * self.pads - self.window) // self.stride + 1 for extent in self.space)

    @property
    def operations(self) -> float:
        positions = 1
        for extent in self.outputs:
            positions *= extent
        return 2.0 * positions * self.weights

    @property
    def weights(self) -> int:
        """Elements of the filters."""
        return self.filters * (self.channels // self.groups) * int(self.window ** len(self.space))


Layer = Product | Convolution


def _square(calls: int, channels: int, filters: int, window: int, stride: int, size: int, groups: int = 1) -> Layer:
    return Convolution(calls, channels, filters, window, stride, (size, size), groups)


def _depthwise(calls: int, channels: int, stride: int, size: int) -> Layer:
    return _square(calls, channels, channels, 3, stride, size, groups=channels)


MODELS: dict[str, tuple[Layer, ...]] = {
    "bert-base": (
        Product(48, 128, 768, 768),
        Product(12, 128, 768, 3072),
        Product(12, 128, 3072, 768),
    ),
    "vit-b-32": (
        Convolution(1, 3, 768, 32, 32, (224, 224), padding=0),
        Product(48, 50, 768, 768),
        Product(12, 50, 768, 3072),
        Product(12, 50, 3072, 768),
        Product(1, 1, 768, 1000),
    ),
    "whisper-tiny": (
        Convolution(1, 80, 384, 3, 1, (3000,)),
        Convolution(1, 384, 384, 3, 2, (3000,)),
        Product(16, 1500, 384, 384),
        Product(4, 1500, 384, 1536),
        Product(4, 1500, 1536, 384),
    ),
    "resnet-50": (
        _square(1, 3, 64, 7, 2, 224),
        _square(1, 64, 64, 1, 1, 56),
        _square(2, 256, 64, 1, 1, 56),
        _square(3, 64, 64, 3, 1, 56),
        _square(4, 64, 256, 1, 1, 56),
        _square(1, 256, 128, 1, 1, 56),
        _square(1, 128, 128, 3, 2, 56),
        _square(1, 256, 512, 1, 2, 56),
        _square(4, 128, 512, 1, 1, 28),
        _square(3, 512, 128, 1, 1, 28),
        _square(3, 128, 128, 3, 1, 28),
        _square(1, 512, 256, 1, 1, 28),
        _square(1, 256, 256, 3, 2, 28),
        _square(1, 512, 1024, 1, 2, 28),
        _square(6, 256, 1024, 1, 1, 14),
        _square(5, 1024, 256, 1, 1, 14),
        _square(5, 256, 256, 3, 1, 14),
        _square(1, 1024, 512, 1, 1, 14),
        _square(1, 512, 512, 3, 2, 14),
        _square(1, 1024, 2048, 1, 2, 14),
        _square(3, 512, 2048, 1, 1, 7),
        _square(2, 2048, 512, 1, 1, 7),
        _square(2, 512, 512, 3, 1, 7),
        Product(1, 1, 2048, 1000),
    ),
    "mobilenet-v2": (
        _square(1, 3, 32, 3, 2, 224),
        _depthwise(1, 32, 1, 112),
        _square(1, 32, 16, 1, 1, 112),
        _square(1, 16, 96, 1, 1, 112),
        _depthwise(1, 96, 2, 112),
        _square(1, 96, 24, 1, 1, 56),
        _square(2, 24, 144, 1, 1, 56),
        _depthwise(1, 144, 1, 56),
        _square(1, 144, 24, 1, 1, 56),
        _depthwise(1, 144, 2, 56),
        _square(1, 144, 32, 1, 1, 28),
        _square(3, 32, 192, 1, 1, 28),
        _depthwise(2, 192, 1, 28),
        _square(2, 192, 32, 1, 1, 28),
        _depthwise(1, 192, 2, 28),
        _square(1, 192, 64, 1, 1, 14),
        _square(4, 64, 384, 1, 1, 14),
        _depthwise(4, 384, 1, 14),
        _square(3, 384, 64, 1, 1, 14),
        _square(1, 384, 96, 1, 1, 14),
        _square(3, 96, 576, 1, 1, 14),
        _depthwise(2, 576, 1, 14),
        _square(2, 576, 96, 1, 1, 14),
        _depthwise(1, 576, 2, 14),
        _square(1, 576, 160, 1, 1, 7),
        _square(3, 160, 960, 1, 1, 7),
        _depthwise(3, 960, 1, 7),
        _square(2, 960, 160, 1, 1, 7),
        _square(1, 960, 320, 1, 1, 7),
        _square(1, 320, 1280, 1, 1, 7),
        Product(1, 1, 1280, 1000),
    ),
}
"""Layers by model. ResNet-50 strides in its 3x3 convolutions; images are 224x224, text has 128 tokens, audio 30 s."""
