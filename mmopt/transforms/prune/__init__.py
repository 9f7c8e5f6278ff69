"""Taking weights away: whole units, or single ones, and repairing what is left without labels."""

from __future__ import annotations

from mmopt.transforms.prune.prune_blocks import PruneBlocks
from mmopt.transforms.prune.prune_structured import PruneStructured
from mmopt.transforms.prune.prune_weights import PruneWeights
from mmopt.transforms.prune.repair_least_squares import RepairLeastSquares

__all__ = ["PruneBlocks", "PruneStructured", "PruneWeights", "RepairLeastSquares"]
