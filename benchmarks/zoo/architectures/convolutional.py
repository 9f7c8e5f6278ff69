"""Small convolutional networks. Images are ``[B, 3, 32, 32]``, answers ``[B, 10]`` unless a class says otherwise."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

CLASSES = 10


def _block(inputs: int, outputs: int, window: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, window, stride, window // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class Vgg(nn.Module):
    """Convolutions and pooling, flattened into three linear layers (Simonyan, 2014)."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 12, 16, 24)
        layers = [
            layer
            for a, b in itertools.pairwise(widths)
            for layer in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        ]
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(
            nn.Flatten(),
            nn.Linear(24 * 16, 40),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(40, 30),
            nn.ReLU(),
            nn.Linear(30, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Image to logits."""
        return self.head(self.features(x))


class _Branches(nn.Module):
    def __init__(self, inputs: int, widths: Sequence[int]) -> None:
        super().__init__()
        a, b, c, d = widths
        self.one = _block(inputs, a, 1)
        self.three = nn.Sequential(_block(inputs, b, 1), _block(b, b, 3))
        self.five = nn.Sequential(_block(inputs, c, 1), _block(c, c, 5))
        self.pooled = nn.Sequential(nn.MaxPool2d(3, 1, 1), _block(inputs, d, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pooled(x)], 1)


class Inception(nn.Module):
    """Two modules of four branches (Szegedy, 2014)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _block(3, 16, 3, 2)
        self.modules_ = nn.Sequential(_Branches(16, (8, 12, 6, 6)), nn.MaxPool2d(2), _Branches(32, (10, 14, 8, 8)))
        self.head = nn.Linear(40, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Image to logits."""
        return self.head(self.modules_(self.stem(x)).mean((2, 3)))


class _Squeeze(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, inner, 1), nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = functional.adaptive_avg_pool2d(x, 1)
        return x * torch.sigmoid(self.up(functional.silu(self.down(pooled))))


class _InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, squeeze: bool) -> None:
        super().__init__()
        inner = inputs * 4
        self.same = stride == 1 and inputs == outputs
        self.body = nn.Sequential(
            _block(inputs, inner, 1),
            _block(inner, inner, 3, stride, groups=inner),
            _Squeeze(inner, inputs // 2) if squeeze else nn.Identity(),
            nn.Conv2d(inner, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.same else self.body(x)


class MobileNetV2(nn.Module):
    """Inverted residuals (Sandler, 2018)."""

    squeeze = False

    def __init__(self) -> None:
        super().__init__()
        plan = ((8, 8, 1), (8, 12, 2), (12, 12, 1), (12, 16, 2), (16, 16, 1), (16, 16, 1))
        self.stem = _block(3, 8, 3, 2)
        self.body = nn.Sequential(*(_InvertedResidual(a, b, s, self.squeeze) for a, b, s in plan))
        self.head = nn.Sequential(_block(16, 64, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        """Image to logits."""
        return self.head(self.body(self.stem(x)))


class EfficientNet(MobileNetV2):
    """The same with squeeze and excitation (Tan, 2019)."""

    squeeze = True


class _DenseLayer(nn.Module):
    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(functional.relu(self.norm(x)))], 1)


class DenseNet(nn.Module):
    """Two dense blocks with a transition between them (Huang, 2016)."""

    def __init__(self) -> None:
        super().__init__()
        growth = 6
        self.stem = nn.Conv2d(3, 12, 3, 2, 1, bias=False)
        self.lower = nn.Sequential(*(_DenseLayer(12 + k * growth, growth) for k in range(3)))
        self.transition = nn.Sequential(nn.BatchNorm2d(30), nn.ReLU(), nn.Conv2d(30, 15, 1), nn.AvgPool2d(2))
        self.upper = nn.Sequential(*(_DenseLayer(15 + k * growth, growth) for k in range(3)))
        self.norm, self.head = nn.BatchNorm2d(33), nn.Linear(33, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Image to logits."""
        x = self.upper(self.transition(self.lower(self.stem(x))))
        return self.head(functional.relu(self.norm(x)).mean((2, 3)))


class _ConvNeXtBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.window = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.window(x).permute(0, 2, 3, 1))
        return x + (self.scale * self.down(functional.gelu(self.up(y)))).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """Two stages (Liu, 2022)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 4, 4)
        self.lower = nn.Sequential(_ConvNeXtBlock(12), _ConvNeXtBlock(12))
        self.norm, self.down = nn.LayerNorm(12), nn.Conv2d(12, 20, 2, 2)
        self.upper, self.last, self.head = _ConvNeXtBlock(20), nn.LayerNorm(20), nn.Linear(20, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Image to logits."""
        x = self.norm(self.lower(self.stem(x)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.head(self.last(self.upper(self.down(x)).mean((2, 3))))


def _shuffle(x: Tensor, groups: int) -> Tensor:
    batch, channels, height, width = x.shape
    return x.view(batch, groups, channels // groups, height, width).transpose(1, 2).reshape(x.shape)


class _ShuffleV1Block(nn.Module):
    def __init__(self, width: int, inner: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.down = _block(width, inner, 1, groups=groups)
        self.window = nn.Sequential(nn.Conv2d(inner, inner, 3, 1, 1, groups=inner, bias=False), nn.BatchNorm2d(inner))
        self.up = nn.Sequential(nn.Conv2d(inner, width, 1, groups=groups, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(x + self.up(self.window(_shuffle(self.down(x), self.groups))))


class ShuffleNetV1(nn.Module):
    """Grouped convolutions with shuffles between them (Zhang, 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _block(3, 36, 3, 2)
        self.body = nn.Sequential(_ShuffleV1Block(36, 18, 3), _ShuffleV1Block(36, 18, 3))
        self.head = nn.Linear(36, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Image to logits."""
        return self.head(self.body(self.stem(x)).mean((2, 3)))


class _ShuffleV2Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.branch = nn.Sequential(
            _block(half, half, 1),
            nn.Conv2d(half, half, 3, 1, 1, groups=half, bias=False),
            nn.BatchNorm2d(half),
            _block(half, half, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = x.chunk(2, 1)
        return _shuffle(torch.cat([kept, self.branch(changed)], 1), 2)


class ShuffleNetV2(nn.Module):
    """Half of the channels pass unchanged, then all are shuffled (Ma, 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _block(3, 24, 3, 2)
        self.body = nn.Sequential(_ShuffleV2Block(24), _ShuffleV2Block(24))
        self.head = nn.Sequential(_block(24, 40, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        """Image to logits."""
        return self.head(self.body(self.stem(x)))


class _GroupedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _block(inputs, 16, 1),
            _block(16, 16, 3, stride, groups=4),
            nn.Conv2d(16, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.shortcut(x) + self.body(x))


class ResNeXt(nn.Module):
    """Residual blocks with four groups (Xie, 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _block(3, 20, 3, 2)
        plan = ((20, 20, 1), (20, 28, 2), (28, 28, 1))
        self.body = nn.Sequential(*(_GroupedResidual(*sizes) for sizes in plan))
        self.head = nn.Linear(28, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Image to logits."""
        return self.head(self.body(self.stem(x)).mean((2, 3)))


class _Double(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(4, outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.second(functional.silu(self.norm(self.conv(x)))))


class UNet(nn.Module):
    """Down, up and across (Ronneberger, 2015); a picture of two channels comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.bottom = _Double(3, 8), _Double(8, 16), _Double(16, 24)
        self.raise_second, self.raise_first = nn.ConvTranspose2d(24, 16, 2, 2), nn.ConvTranspose2d(16, 8, 2, 2)
        self.join_second, self.join_first = _Double(32, 16), _Double(16, 8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Image to a map of two channels in its size."""
        first = self.first(x)
        second = self.second(functional.max_pool2d(first, 2))
        bottom = self.bottom(functional.max_pool2d(second, 2))
        second = self.join_second(torch.cat([self.raise_second(bottom), second], 1))
        return self.head(self.join_first(torch.cat([self.raise_first(second), first], 1)))


class SuperResolution(nn.Module):
    """Pixel shuffle after residuals whose shortcut is padded with zeros; an image of twice the size comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3, padding=1), nn.InstanceNorm2d(12, affine=True)
        self.wide = nn.Conv2d(12, 20, 3, padding=1)
        self.up, self.head = nn.Conv2d(20, 32, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Image to an image of twice the height and width."""
        x = functional.relu(self.norm(self.stem(x)))
        x = functional.relu(self.wide(x) + functional.pad(x, (0, 0, 0, 0, 4, 4)))
        return self.head(functional.leaky_relu(functional.pixel_shuffle(self.up(x), 2), 0.1))


class Cbam(nn.Module):
    """Gates for channels and for places, from means and maxima (Woo, 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.next = _block(3, 16), _block(16, 20)
        self.gate = nn.Sequential(nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 16))
        self.place, self.head = nn.Conv2d(2, 1, 5, padding=2), nn.Linear(20, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Image to logits."""
        x = self.stem(x)
        shares = torch.sigmoid(self.gate(x.mean((2, 3))) + self.gate(x.amax((2, 3))))
        x = x * shares[:, :, None, None]
        where = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return self.head(self.next(x * torch.sigmoid(self.place(where))).mean((2, 3)))
