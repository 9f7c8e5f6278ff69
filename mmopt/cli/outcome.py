"""What ``mmopt optimize`` has to tell in the end."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import TYPE_CHECKING, Any

from mmopt.cli.output import size_text, time_text
from mmopt.cli.speed import Speed
from mmopt.evaluation import Judgement
from mmopt.verification import Verification

if TYPE_CHECKING:
    from mmopt.pipeline.report import PipelineReport


@dataclasses.dataclass
class Outcome:
    """What a run has to tell.

    Attributes:
        path: What was written.
        before: Bytes of the model as it was.
        after: Bytes needed to run the result.
        total: Bytes of everything written.
        check: How the result agrees with the model as it was; None when it could not be checked.
        unverified: Why not, or "".
        speed: How fast, against onnxruntime.
        fallback: What does not run natively, and why.
        tuning: What -O3 measured.
        pruned: Whether the result was compared with the pruned model in place of the model as it was.
        judgement: How the result does its task, when there is an evaluator.
    """

    path: pathlib.Path
    before: int
    after: int
    total: int
    check: Verification | None
    unverified: str
    speed: Speed
    fallback: list[str]
    tuning: dict[str, Any] | None = None
    judgement: Judgement | None = None
    pruned: bool = False


def summary(outcome: Outcome, report: PipelineReport) -> list[str]:
    """The last lines: how much smaller, how much faster, how exact, and where."""
    applied = len({record.name for record in report.applied})
    lines = [f"graph: {report.nodes_before} → {report.nodes_after} nodes, {applied} passes changed it"]
    ratio = outcome.before / outcome.after if outcome.after else 0.0
    word = f"{ratio:.2f}x smaller" if ratio >= 1 else f"{1 / ratio if ratio else 0:.2f}x larger"
    total = f"; with everything else in it {size_text(outcome.total)}" if outcome.total > outcome.after else ""
    lines.append(f"size: {size_text(outcome.before)} → {size_text(outcome.after)} needed to run, {word}{total}")
    if outcome.tuning is not None:
        from mmopt.cli.tuning import summary_line

        lines.append(f"tuning: {summary_line(outcome.tuning)}")
    lines.append(f"speed: {_speed_text(outcome.speed)}")
    lines.append(f"exactness: {_exactness_text(outcome)}")
    if outcome.judgement is not None:
        lines.append(f"task: {outcome.judgement} (of the {outcome.judgement.on})")
    if outcome.fallback:
        lines.append("not native: " + "; ".join(outcome.fallback))
    lines.append(f"written: {outcome.path}")
    return lines


def _speed_text(speed: Speed) -> str:
    if speed.reason:
        return f"not measured ({speed.reason})"
    word = f"{speed.ratio:.2f}x faster" if speed.ratio >= 1 else f"{1 / speed.ratio:.2f}x slower"
    return (
        f"{time_text(speed.artifact)} against {time_text(speed.peer)} of onnxruntime fp32 on the original model, "
        f"{word} (same inputs, turn by turn, {speed.threads} threads)"
    )


def _exactness_text(outcome: Outcome) -> str:
    check = outcome.check
    if check is None:
        return outcome.unverified
    source = "given inputs" if check.inputs_from == "given" else "inputs made from the model"
    verdict = "" if check.ok else "DISAGREES: "
    error = f"largest error {check.max_relative_error:.2g} of an output's range"
    against = " of the pruned model" if outcome.pruned else ""
    return f"{verdict}{error}{against} in {check.precision} ({check.sets} sets of {source})"
