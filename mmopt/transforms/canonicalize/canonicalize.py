"""Brings a module into canonical form: the family's passes in order, over and over, until nothing changes.

Order matters for speed only, not for the result: functions are inlined and constants lifted once; then folding exposes
branches, branches expose no-ops, no-ops expose equal nodes and equal nodes dead ones. Shapes are inferred once a round.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from mmopt.analysis.shapes import ShapeFacts, infer_shapes
from mmopt.errors import PassError
from mmopt.ir.module import Module
from mmopt.pipeline.base import Pass, PassContext
from mmopt.transforms.canonicalize import (
    compose_transposes,
    constant_targets,
    merge_casts,
    merge_reshapes,
    remove_no_ops,
    remove_training_leftovers,
    simplify_arithmetic,
)
from mmopt.transforms.canonicalize.deduplicate_initializers import DeduplicateInitializers
from mmopt.transforms.canonicalize.eliminate_common_subexpressions import EliminateCommonSubexpressions
from mmopt.transforms.canonicalize.eliminate_dead_code import EliminateDeadCode
from mmopt.transforms.canonicalize.fold_constants import FoldConstants
from mmopt.transforms.canonicalize.infer_shapes import InferShapes
from mmopt.transforms.canonicalize.inline_functions import InlineFunctions
from mmopt.transforms.canonicalize.lift_constants import LiftConstants
from mmopt.transforms.canonicalize.rewriting import Rewriter, report
from mmopt.transforms.canonicalize.share_sizes import ShareSizes
from mmopt.transforms.canonicalize.simplify_control_flow import SimplifyControlFlow
from mmopt.transforms.canonicalize.stabilize_names import StabilizeNames

RULES = (
    *remove_training_leftovers.RULES,
    *remove_no_ops.RULES,
    *simplify_arithmetic.RULES,
    *merge_casts.RULES,
    *compose_transposes.RULES,
    *merge_reshapes.RULES,
    *constant_targets.RULES,
)
"""Every local rule of the family."""

_Step = tuple[str, Callable[[ShapeFacts], bool]]


@dataclasses.dataclass(frozen=True)
class Canonicalize(Pass):
    """Brings a module into canonical form.

    Attributes:
        max_rounds: Rounds after which the pass gives up; real models take two or three.
        max_bytes: See :class:`FoldConstants`.
        max_total_bytes: See :class:`FoldConstants`.
    """

    max_rounds: int = 10
    max_bytes: int = 1 << 20
    max_total_bytes: int = 1 << 28

    def run(self, module: Module, context: PassContext) -> bool:
        """Repeat the rounds until nothing changes.

        Raises:
            PassError: It does not settle; names what still fires.
        """
        changed = InlineFunctions().run(module, context)
        changed |= LiftConstants().run(module, context)
        for _ in range(self.max_rounds):
            fired = self._round(module, context)
            changed |= bool(fired)
            if not fired:
                break
        else:
            raise PassError(
                f"canonical form is not reached in {self.max_rounds} rounds: {', '.join(fired)} still fires",
                where=self.name,
                hint="raise max_rounds, or report the model: two of these undo each other",
            )
        changed |= StabilizeNames().run(module, context)
        return InferShapes().run(module, context) or changed

    def _round(self, module: Module, context: PassContext) -> list[str]:
        """One round; the names of what changed something."""
        facts = infer_shapes(module.model)
        folding = FoldConstants(max_bytes=self.max_bytes, max_total_bytes=self.max_total_bytes)
        fired = [folding.name] if folding.fold(module, context, facts) else []
        branches = SimplifyControlFlow()
        if branches.simplify(module, context, facts):
            fired.append(branches.name)
        rewriter = Rewriter(module, RULES, facts)
        if rewriter.run():
            fired += sorted(rewriter.fired)
        report(self, rewriter, context)
        sizes = ShareSizes()
        if sizes.share(module, context, facts):
            fired.append(sizes.name)
        for step in (DeduplicateInitializers(), EliminateCommonSubexpressions(), EliminateDeadCode()):
            if step.run(module, context):
                fired.append(step.name)
        return fired
