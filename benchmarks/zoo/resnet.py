"""ResNet-50 (He et al., 2015, "Deep Residual Learning for Image Recognition"), stride in the 3×3 convolution."""

from __future__ import annotations

from torch import Tensor, nn

from benchmarks.zoo.encoders import Encoder


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions beside a shortcut: ``[B, before, H, W]`` to ``[B, 4·inner, H', W']``."""

    def __init__(self, before: int, inner: int, stride: int):
        super().__init__()
        after = 4 * inner
        self.branch = nn.Sequential(
            *_conv_norm(before, inner, 1),
            nn.ReLU(inplace=True),
            *_conv_norm(inner, inner, 3, stride),
            nn.ReLU(inplace=True),
            *_conv_norm(inner, after, 1),
        )
        same = before == after and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(*_conv_norm(before, after, 1, stride))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Branch plus shortcut, rectified."""
        return self.relu(self.branch(x) + self.shortcut(x))


class ResNet50Encoder(Encoder):
    """Images ``[B, 3, 224, 224]`` to 2048 features: ResNet-50 without its classifier."""

    width = 2048
    shallow_width = 512

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_conv_norm(3, 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, padding=1))
        self.lower = nn.Sequential(_stage(64, 64, 3, 1), _stage(256, 128, 4, 2))
        self.upper = nn.Sequential(_stage(512, 256, 6, 2), _stage(1024, 512, 3, 2))
        self.pool = nn.AdaptiveAvgPool2d(1)

    def early(self, *inputs: Tensor) -> Tensor:
        return self.lower(self.stem(inputs[0]))

    def late(self, hidden: Tensor, *inputs: Tensor) -> Tensor:
        return self.pool(self.upper(hidden)).flatten(1)

    def summary(self, hidden: Tensor) -> Tensor:
        return self.pool(hidden).flatten(1)


class ResNet50(nn.Module):
    """The classifier: ``pixel_values [B, 3, 224, 224]`` to logits ``[B, classes]``."""

    def __init__(self, classes: int = 1000):
        super().__init__()
        self.encoder = ResNet50Encoder()
        self.head = nn.Linear(self.encoder.width, classes)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits ``[B, classes]``."""
        return self.head(self.encoder(pixel_values))


def _stage(before: int, inner: int, blocks: int, stride: int) -> nn.Sequential:
    first = Bottleneck(before, inner, stride)
    return nn.Sequential(first, *(Bottleneck(4 * inner, inner, 1) for _ in range(blocks - 1)))


def _conv_norm(before: int, after: int, kernel: int, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    conv = nn.Conv2d(before, after, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv, nn.BatchNorm2d(after)
