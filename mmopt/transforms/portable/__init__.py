"""Spellings that other runtimes run fastest, for the ONNX that mmopt writes for them."""

from __future__ import annotations

from mmopt.transforms.portable.batch_branches import BatchBranches
from mmopt.transforms.portable.flatten_rows import FlattenRows
from mmopt.transforms.portable.join_stacks import JoinStacks
from mmopt.transforms.portable.merge_linears import MergeLinears
from mmopt.transforms.portable.own_biases import OwnBiases
from mmopt.transforms.portable.pad_channels import PadChannels
from mmopt.transforms.portable.write_gemm import WriteGemm

__all__ = [
    "BatchBranches",
    "FlattenRows",
    "JoinStacks",
    "MergeLinears",
    "OwnBiases",
    "PadChannels",
    "WriteGemm",
]
