"""Integers in place of floats, as standard pairs of QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

from mmopt.transforms.quantize.compress_weights import CompressWeights
from mmopt.transforms.quantize.equalize_layers import EqualizeLayers
from mmopt.transforms.quantize.protect_weights import ProtectWeights
from mmopt.transforms.quantize.quantize import Quantize
from mmopt.transforms.quantize.quantize_attention import QuantizeAttention
from mmopt.transforms.quantize.quantize_dynamic import QuantizeDynamic
from mmopt.transforms.quantize.quantize_static import QuantizeStatic
from mmopt.transforms.quantize.quantize_weights import QuantizeWeights
from mmopt.transforms.quantize.separate_modalities import SeparateModalities
from mmopt.transforms.quantize.separate_projections import SeparateProjections
from mmopt.transforms.quantize.smooth_activations import SmoothActivations
from mmopt.transforms.quantize.split_channels import SplitChannels
from mmopt.transforms.quantize.split_ranges import SplitRanges

__all__ = [
    "CompressWeights",
    "EqualizeLayers",
    "ProtectWeights",
    "Quantize",
    "QuantizeAttention",
    "QuantizeDynamic",
    "QuantizeStatic",
    "QuantizeWeights",
    "SeparateModalities",
    "SeparateProjections",
    "SmoothActivations",
    "SplitChannels",
    "SplitRanges",
]
