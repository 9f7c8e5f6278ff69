"""Products of matrices, einsum, convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mmopt.training.lazy import functional, torch
from mmopt.training.registry import rule

if TYPE_CHECKING:
    from torch import Tensor


@rule("MatMul")
def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Product over the last axis of ``a`` and the last but one of ``b``."""
    return torch.matmul(a, b)


@rule("Gemm")
def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    """``alpha · A B + beta · C``."""
    made = torch.matmul(a.t() if transA else a, b.t() if transB else b)
    made = made if alpha == 1 else (made * alpha).to(made.dtype)
    if c is None:
        return made
    return made + (c if beta == 1 else (c * beta).to(c.dtype))


@rule("Einsum")
def einsum(*operands: Tensor, equation: str) -> Tensor:
    """Einstein's summation."""
    return torch.einsum(equation.replace(" ", ""), *operands)


@rule("Det")
def determinant(x: Tensor) -> Tensor:
    """Of square matrices."""
    return torch.linalg.det(x)


def padding(
    sizes: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Sequence[int] | None,
    auto_pad: str,
) -> list[tuple[int, int]]:
    """Elements before and behind every spatial axis."""
    rank = len(sizes)
    if auto_pad == "NOTSET":
        given = list(pads) if pads is not None else [0] * (2 * rank)
        return [(given[n], given[n + rank]) for n in range(rank)]
    if auto_pad == "VALID":
        return [(0, 0)] * rank
    result = []
    for n in range(rank):
        outputs = -(-sizes[n] // strides[n])
        whole = max(0, (outputs - 1) * strides[n] + (kernel[n] - 1) * dilations[n] + 1 - sizes[n])
        less, more = whole // 2, whole - whole // 2
        result.append((less, more) if auto_pad == "SAME_UPPER" else (more, less))
    return result


def for_torch(pairs: Sequence[tuple[int, int]]) -> list[int]:
    """As ``torch.nn.functional.pad`` takes them: the last axis first."""
    return [amount for pair in reversed(pairs) for amount in pair]


@rule("Conv")
def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    kernel_shape: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    auto_pad: str = "NOTSET",
    group: int = 1,
) -> Tensor:
    """Convolution over one to three spatial axes."""
    rank = x.ndim - 2
    steps, spread = list(strides or [1] * rank), list(dilations or [1] * rank)
    pairs = padding(x.shape[2:], weight.shape[2:], steps, spread, pads, auto_pad)
    if all(before == behind for before, behind in pairs):
        ahead = [before for before, _ in pairs]
    else:
        x, ahead = functional.pad(x, for_torch(pairs)), [0] * rank
    return getattr(functional, f"conv{rank}d")(x, weight, bias, steps, ahead, spread, group)


@rule("ConvTranspose")
def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    kernel_shape: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    output_padding: Sequence[int] | None = None,
    output_shape: Sequence[int] | None = None,
    auto_pad: str = "NOTSET",
    group: int = 1,
) -> Tensor:
    """Transposed convolution: the whole of it, cut by the padding."""
    rank = x.ndim - 2
    steps, spread = list(strides or [1] * rank), list(dilations or [1] * rank)
    extra = list(output_padding or [0] * rank)
    whole = getattr(functional, f"conv_transpose{rank}d")(x, weight, None, steps, 0, 0, group, spread)
    for n in range(rank):
        length = whole.shape[2 + n] + extra[n]
        before, behind = _cut(n, length, x.shape[2 + n] * steps[n], pads, output_shape, auto_pad, rank)
        amount = extra[n] - behind
        whole = functional.pad(whole, [0, 0] * (rank - 1 - n) + [-before, amount])
    return whole if bias is None else whole + bias.reshape(-1, *[1] * rank)


def _cut(
    n: int,
    length: int,
    same: int,
    pads: Sequence[int] | None,
    output_shape: Sequence[int] | None,
    auto_pad: str,
    rank: int,
) -> tuple[int, int]:
    if output_shape is not None or auto_pad.startswith("SAME"):
        whole = length - (output_shape[n - rank] if output_shape is not None else same)
        less, more = whole // 2, whole - whole // 2
        return (less, more) if auto_pad == "SAME_UPPER" else (more, less)
    return (pads[n], pads[n + rank]) if pads is not None and auto_pad == "NOTSET" else (0, 0)


@rule("DeformConv")
def deform_conv(
    x: Tensor,
    weight: Tensor,
    offset: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    offset_group: int = 1,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Convolution over two axes whose taps are moved by offsets and read by bilinear interpolation."""
    n, channels, height, width = x.shape
    taps = [int(size) for size in weight.shape[2:]]
    steps, spread, ahead = list(strides or [1, 1]), list(dilations or [1, 1]), list(pads or [0] * 4)
    out = offset.shape[2:]
    moved = offset.reshape(n, offset_group, taps[0], taps[1], 2, *out)
    rows = torch.arange(out[0], dtype=x.dtype) * steps[0] - ahead[0]
    columns = torch.arange(out[1], dtype=x.dtype) * steps[1] - ahead[1]
    y = rows[:, None] + (torch.arange(taps[0], dtype=x.dtype) * spread[0])[:, None, None, None] + moved[:, :, :, :, 0]
    z = columns + (torch.arange(taps[1], dtype=x.dtype) * spread[1])[:, None, None] + moved[:, :, :, :, 1]
    grid = torch.stack([2 * z / max(width - 1, 1) - 1, 2 * y / max(height - 1, 1) - 1], -1)
    source = x.reshape(n * offset_group, channels // offset_group, height, width)
    flat = grid.reshape(n * offset_group, taps[0] * taps[1] * out[0], out[1], 2)
    read = functional.grid_sample(source, flat, align_corners=True, padding_mode="zeros")
    read = read.reshape(n, offset_group, channels // offset_group, taps[0] * taps[1], *out)
    if mask is not None:
        read = read * mask.reshape(n, offset_group, 1, taps[0] * taps[1], *out)
    columns_ = read.reshape(n, group, channels // group * taps[0] * taps[1], out[0] * out[1])
    kernel = weight.reshape(group, weight.shape[0] // group, -1)
    made = torch.matmul(kernel, columns_).reshape(n, weight.shape[0], *out)
    return made if bias is None else made + bias[:, None, None]


@rule("Col2Im")
def columns_to_image(
    x: Tensor,
    image: Tensor,
    block: Tensor,
    *,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Blocks added up at their places: what is transposed to cutting an image into blocks."""
    sizes, kernel = image.tolist(), block.tolist()
    rank = len(sizes)
    steps, spread = list(strides or [1] * rank), list(dilations or [1] * rank)
    given = list(pads or [0] * (2 * rank))
    whole = [size + given[n] + given[n + rank] for n, size in enumerate(sizes)]
    places = torch.zeros([1] * (2 * rank), dtype=torch.int64)
    for n in range(rank):
        count = (whole[n] - (kernel[n] - 1) * spread[n] - 1) // steps[n] + 1
        taps = (torch.arange(kernel[n]) * spread[n]).reshape([-1 if m == n else 1 for m in range(2 * rank)])
        starts = (torch.arange(count) * steps[n]).reshape([-1 if m == n + rank else 1 for m in range(2 * rank)])
        places = places * whole[n] + taps + starts
    n, channels = x.shape[0], x.shape[1] // int(torch.tensor(kernel).prod())
    total = int(torch.tensor(whole).prod())
    flat = torch.zeros(n, channels, total, dtype=x.dtype)
    flat = flat.index_add(2, places.reshape(-1), x.reshape(n, channels, -1))
    made = flat.reshape(n, channels, *whole)
    for axis in range(rank):
        made = made.narrow(2 + axis, given[axis], sizes[axis])
    return made
