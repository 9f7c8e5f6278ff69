"""Quantization with straight-through gradients: integers are carried in floats, rounding has the identity's gradient.

    q = clip(round(x / s) + z)      dq/dx = 1/s inside the range, 0 outside      ds by the rule of the product

so a pair of QuantizeLinear and DequantizeLinear passes gradients to its input inside the range, and to the scale what
learned step sizes get (Esser et al., 2020).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from mmopt.training.lazy import torch
from mmopt.training.ops.linear import conv
from mmopt.training.registry import Types, rule
from mmopt.training.tensors import BOUNDS, dtypes

if TYPE_CHECKING:
    from torch import Tensor


def straight_through(exact: Tensor, rounded: Tensor) -> Tensor:
    """``rounded`` forwards, the gradient of ``exact`` backwards."""
    return exact + (rounded - exact).detach()


def narrow(x: Tensor, *, dtype: str) -> Tensor:
    """Carried integers as true ones; the gradient ends here."""
    target = dtypes()[ir.DataType[dtype]]
    return x.detach().to(target)


def _spread(parameter: Tensor, x: Tensor, axis: int, block: int) -> Tensor:
    """A scale or zero point with the shape of ``x``, or one that broadcasts to it."""
    if parameter.numel() == 1 and not block:
        return parameter.reshape(())
    axis %= x.ndim
    if block:
        return parameter.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    return parameter.reshape([-1 if n == axis else 1 for n in range(x.ndim)])


def _target(node: ir.Node, types: Types) -> Mapping[str, Any]:
    """What QuantizeLinear rounds to."""
    given = node.attributes.get("output_dtype")
    if given is not None and given.as_int():
        return {"dtype": ir.DataType(given.as_int()).name}
    point = node.inputs[2] if len(node.inputs) > 2 else None
    found = types(point) if point is not None else types(node.outputs[0]) or ir.DataType.UINT8
    if found is None or (found not in BOUNDS and found not in dtypes()):
        raise ValueError(f"torch cannot round to {'an unknown type' if found is None else found.name}")
    return {"dtype": found.name}


@rule("QuantizeLinear", integers="made", static=_target)
def quantize_linear(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    dtype: str,
    axis: int = 1,
    block_size: int = 0,
    saturate: int = 1,
    output_dtype: int = 0,
    precision: int = 0,
) -> Tensor:
    """``clip(round(x / scale) + zero_point)``, carried in floats."""
    x = x if x.dtype.is_floating_point else x.float()
    scaled = x / _spread(scale.to(x.dtype), x, axis, block_size)
    target = ir.DataType[dtype]
    if target not in BOUNDS:
        largest = torch.finfo(dtypes()[target]).max
        cut = scaled.clamp(-largest, largest)
        return straight_through(cut, cut.detach().float().to(dtypes()[target]).to(x.dtype))
    zero = 0 if zero_point is None else _spread(zero_point.to(x.dtype), x, axis, block_size)
    low, high = BOUNDS[target]
    return torch.clamp(straight_through(scaled, torch.round(scaled)) + zero, low, high)


@rule("DequantizeLinear", integers="none")
def dequantize_linear(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
) -> Tensor:
    """``(q − zero_point) · scale``."""
    made = dtypes()[ir.DataType(output_dtype)] if output_dtype else scale.dtype
    wide = torch.promote_types(made, torch.float32)
    x = q.to(wide)
    if zero_point is not None:
        x = x - _spread(zero_point.to(wide), x, axis, block_size)
    return (x * _spread(scale.to(wide), x, axis, block_size)).to(made)


@rule("DynamicQuantizeLinear", several=True, integers="UINT8")
def dynamic_quantize_linear(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rounded to 8 bits over the range at hand, which the gradient takes for given: integers, scale, zero point."""
    low, high = x.detach().amin().clamp(max=0), x.detach().amax().clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = torch.clamp(torch.round(-low / scale), 0, 255)
    scaled = x / scale
    q = torch.clamp(straight_through(scaled, torch.round(scaled)) + zero, 0, 255)
    return q, scale, zero.to(torch.uint8)


def _shifted(x: Tensor, zero: Tensor | None, axis: int) -> Tensor:
    """Integers less their zero point, in doubles, which hold every sum exactly."""
    wide = x.double()
    if zero is None:
        return wide
    return wide - _spread(zero.double(), wide, axis, 0) if zero.ndim <= 1 else wide - zero.double()


@rule("MatMulInteger", integers="INT32")
def matmul_integer(a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None) -> Tensor:
    """Product of integers."""
    return torch.matmul(_shifted(a, a_zero, -2), _shifted(b, b_zero, -1)).float()


@rule("ConvInteger", integers="INT32")
def conv_integer(
    x: Tensor, w: Tensor, x_zero: Tensor | None = None, w_zero: Tensor | None = None, **attributes: Any
) -> Tensor:
    """Convolution of integers."""
    return conv(_shifted(x, x_zero, 1), _shifted(w, w_zero, 0), **attributes).float()


def _requantized(total: Tensor, factor: Tensor, zero: Tensor, dtype: str) -> Tensor:
    scaled = total * factor
    low, high = BOUNDS[ir.DataType[dtype]]
    return torch.clamp(straight_through(scaled, torch.round(scaled)) + zero.double(), low, high).float()


def _zero_dtype(node: ir.Node, types: Types) -> Mapping[str, Any]:
    found = types(node.inputs[7])
    return {"dtype": "UINT8" if found is None else found.name}


@rule("QLinearMatMul", integers="made", static=_zero_dtype)
def qlinear_matmul(
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
    *,
    dtype: str,
) -> Tensor:
    """Product of quantized matrices, quantized again."""
    total = torch.matmul(_shifted(a, a_zero, -2), _shifted(b, b_zero, -1))
    rows = _spread(a_scale.double(), total, -2, 0) if a_scale.ndim <= 1 else a_scale.double()
    columns = _spread(b_scale.double(), total, -1, 0) if b_scale.ndim <= 1 else b_scale.double()
    return _requantized(total, rows * columns / y_scale.double(), y_zero, dtype)


@rule("QLinearConv", integers="made", static=_zero_dtype)
def qlinear_conv(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    w: Tensor,
    w_scale: Tensor,
    w_zero: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
    bias: Tensor | None = None,
    *,
    dtype: str,
    **attributes: Any,
) -> Tensor:
    """Convolution of quantized tensors, quantized again."""
    whole = conv(_shifted(x, x_zero, 1), _shifted(w, w_zero, 0), None if bias is None else bias.double(), **attributes)
    factor = _spread(w_scale.double(), whole, 1, 0) * x_scale.double() / y_scale.double()
    return _requantized(whole, factor, y_zero, dtype)
