"""Rules that state what they recognise, and passes made of them."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence

from mmopt.ir.module import Module
from mmopt.pipeline.base import Fidelity, Pass, PassContext
from mmopt.transforms.canonicalize.eliminate_dead_code import EliminateDeadCode
from mmopt.transforms.canonicalize.rewriting import Rewriter, Rule, RulePass, report

OPSET = 23
"""The opset modules work in, and the first with attention, RMS normalization and rotary embedding."""


@dataclasses.dataclass(frozen=True)
class RaisingRule(Rule):
    """A rule with the equation it recognises, for people.

    Attributes:
        equation: What is computed.
        result: The operator it becomes.
    """

    equation: str = ""
    result: str = ""


@dataclasses.dataclass(frozen=True)
class RaisingPass(RulePass):
    """A pass that lifts what exporters spelled out, and drops what nobody needs afterwards."""

    fidelity = Fidelity.ROUNDING

    @abc.abstractmethod
    def raising_rules(self) -> tuple[RaisingRule, ...]:
        """The rules that say what the pass recognises."""

    def rules(self) -> tuple[Rule, ...]:
        """The rules; a pass may add some that tidy up."""
        return self.raising_rules()

    def run(self, module: Module, context: PassContext) -> bool:
        """Apply the rules until none fires, and drop what is dead then."""
        return module.opset >= OPSET and apply_rules(self, self.rules(), module, context)


_MAX_ROUNDS = 8


def apply_rules(pass_: Pass, rules: Sequence[Rule], module: Module, context: PassContext) -> bool:
    """Apply ``rules`` and drop what is dead until neither changes anything; report misses of nodes still there.

    A dead node counts as a use, so dropping it may let a rule fire that could not before.
    """
    rewriter = Rewriter(module, rules)
    fired = rewriter.fired
    changed = rewriter.run()
    for _ in range(_MAX_ROUNDS):
        if not rewriter.fired:
            break
        EliminateDeadCode().run(module, context)
        rewriter = Rewriter(module, rules)
        rewriter.run()
        fired.update(rewriter.fired)
    rewriter.fired = fired
    report(pass_, rewriter, context)
    return changed
