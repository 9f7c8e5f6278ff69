"""Canonical form: passes that make a graph smaller and regular without changing one bit of its outputs."""

from __future__ import annotations

from mmopt.transforms.canonicalize.canonicalize import Canonicalize
from mmopt.transforms.canonicalize.compose_transposes import ComposeTransposes
from mmopt.transforms.canonicalize.constant_targets import ConstantTargets
from mmopt.transforms.canonicalize.deduplicate_initializers import DeduplicateInitializers
from mmopt.transforms.canonicalize.eliminate_common_subexpressions import EliminateCommonSubexpressions
from mmopt.transforms.canonicalize.eliminate_dead_code import EliminateDeadCode
from mmopt.transforms.canonicalize.fold_constants import FoldConstants
from mmopt.transforms.canonicalize.infer_shapes import InferShapes
from mmopt.transforms.canonicalize.inline_functions import InlineFunctions
from mmopt.transforms.canonicalize.lift_constants import LiftConstants
from mmopt.transforms.canonicalize.merge_casts import MergeCasts
from mmopt.transforms.canonicalize.merge_reshapes import MergeReshapes
from mmopt.transforms.canonicalize.remove_no_ops import RemoveNoOps
from mmopt.transforms.canonicalize.remove_training_leftovers import RemoveTrainingLeftovers
from mmopt.transforms.canonicalize.share_sizes import ShareSizes
from mmopt.transforms.canonicalize.simplify_arithmetic import SimplifyArithmetic
from mmopt.transforms.canonicalize.simplify_control_flow import SimplifyControlFlow
from mmopt.transforms.canonicalize.stabilize_names import StabilizeNames

__all__ = [
    "Canonicalize",
    "ComposeTransposes",
    "ConstantTargets",
    "DeduplicateInitializers",
    "EliminateCommonSubexpressions",
    "EliminateDeadCode",
    "FoldConstants",
    "InferShapes",
    "InlineFunctions",
    "LiftConstants",
    "MergeCasts",
    "MergeReshapes",
    "RemoveNoOps",
    "RemoveTrainingLeftovers",
    "ShareSizes",
    "SimplifyArithmetic",
    "SimplifyControlFlow",
    "StabilizeNames",
]
