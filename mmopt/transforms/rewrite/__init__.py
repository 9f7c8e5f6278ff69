"""Rewrites that make a graph cheaper: fewer nodes, less data moved, arithmetic done once, ahead of time."""

from __future__ import annotations

from mmopt.transforms.rewrite.absorb_pads import AbsorbPads
from mmopt.transforms.rewrite.drop_expands import DropExpands
from mmopt.transforms.rewrite.fold_affine import FoldAffine
from mmopt.transforms.rewrite.hoist_invariants import HoistInvariants
from mmopt.transforms.rewrite.last_states import LastStates
from mmopt.transforms.rewrite.merge_projections import MergeProjections
from mmopt.transforms.rewrite.merge_slices import MergeSlices
from mmopt.transforms.rewrite.reassociate_constants import ReassociateConstants
from mmopt.transforms.rewrite.sink_transposes import SinkTransposes
from mmopt.transforms.rewrite.stack_sequences import StackSequences
from mmopt.transforms.rewrite.unit_transposes import UnitTransposes
from mmopt.transforms.rewrite.unroll_loops import UnrollLoops

__all__ = [
    "AbsorbPads",
    "DropExpands",
    "FoldAffine",
    "HoistInvariants",
    "LastStates",
    "MergeProjections",
    "MergeSlices",
    "ReassociateConstants",
    "SinkTransposes",
    "StackSequences",
    "UnitTransposes",
    "UnrollLoops",
]
