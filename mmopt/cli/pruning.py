"""What ``--prune`` and ``--prune-to`` of ``mmopt optimize`` stand for."""

from __future__ import annotations

import re

from mmopt.errors import UserError
from mmopt.transforms.prune import PruneBlocks, PruneStructured, PruneWeights, RepairLeastSquares
from mmopt.transforms.prune.budgets import parse

NAMES = (PruneStructured.name, PruneBlocks.name, PruneWeights.name, RepairLeastSquares.name)


def pruning(share: str | None, *, repair: bool, measure: str = "macs") -> list[str]:
    """The passes that ``--prune`` stands for.

    Args:
        share: What was given; None for nothing.
        repair: Whether there are samples to repair on.
        measure: What the share is of.

    Raises:
        UserError: It is no share, or no list of shares by tower.
    """
    if share is None:
        return []
    parse(share, "--prune")
    passes = [f'{PruneStructured.name}{{share="{share}",measure={measure}}}']
    return [*passes, RepairLeastSquares.name] if repair else passes


def speedup(text: str) -> float:
    """``1.6x`` or ``1.6`` as 1.6.

    Raises:
        UserError: It is neither.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)[x×]?", text.strip())
    if not found or float(found[1]) <= 1:
        raise UserError(f"{text!r} is no speed-up", where="--prune-to", hint="for example 1.6x")
    return float(found[1])
