"""Helpers for people who write passes: one call checks what mmopt expects of a pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mmopt.ir.fingerprint import fingerprint
from mmopt.ir.module import Module
from mmopt.pipeline.base import Pass
from mmopt.pipeline.manager import PassManager
from mmopt.pipeline.report import APPLIED, FAILED, PassRecord


@dataclasses.dataclass(frozen=True)
class Checked:
    """What :func:`check_pass` found, for further assertions.

    Attributes:
        module: The module after the pass; the one that was given is unchanged.
        record: What the manager recorded: remarks, node counts, comparisons.
    """

    module: Module
    record: PassRecord


def check_pass(
    pass_: Pass,
    module: Module,
    *,
    fires: bool = True,
    inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    seed: int = 0,
) -> Checked:
    """Run ``pass_`` on a copy of ``module`` and check its contract.

    Checked are: structure, signature, the claim to have changed something, outputs before and after within the pass's
    fidelity, that it fires (or must not), that a second run changes nothing, that the result does not depend on
    anything but the module, and that the given module stays as it is.

    Args:
        pass_: The pass.
        module: What it runs on.
        fires: Whether it must change the module; False for the cases that it must leave alone.
        inputs: Inputs to compare outputs on; made from the model's structure when None.
        seed: Seed of what is made.

    Returns:
        The rewritten module and the record of the run.

    Raises:
        AssertionError: Something is not as it must be; the message says what.
    """
    before = fingerprint(module.model)
    work, record = _run(pass_, module, inputs, seed)
    _require(fingerprint(module.model) == before, f"{pass_.name} changed a module that it was not given")
    _require(record.status != FAILED, f"{pass_.name} was rolled back: {record.reason}")
    if fires:
        _require(record.status == APPLIED, f"{pass_.name} should change this module, but left it alone{_why(record)}")
    else:
        _require(record.status != APPLIED, f"{pass_.name} must leave this module alone, but changed it{_why(record)}")
    again, repeated = _run(pass_, work, inputs, seed)
    _require(repeated.status != FAILED, f"{pass_.name}, run a second time, was rolled back: {repeated.reason}")
    _require(repeated.status != APPLIED, f"{pass_.name} is not idempotent: a second run changes {_change(work, again)}")
    twin, _ = _run(pass_, module, inputs, seed)
    _require(fingerprint(twin.model) == fingerprint(work.model), f"{pass_.name} gives another result every time")
    return Checked(work, record)


def _run(
    pass_: Pass, module: Module, inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None, seed: int
) -> tuple[Module, PassRecord]:
    work = module.clone()
    report = PassManager([pass_], inputs=inputs, seed=seed, threads=1).run(work)
    _require(report.inputs != "none", f"outputs could not be compared: {'; '.join(report.notes)}")
    return work, report.passes[0]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def _why(record: PassRecord) -> str:
    said = [f"{remark.node}: {remark.message}" for remark in record.remarks]
    return f" ({'; '.join(said)})" if said else ""


def _change(before: Module, after: Module) -> str:
    old = [node.op_type for node in before.graph.all_nodes()]
    new = [node.op_type for node in after.graph.all_nodes()]
    return f"{len(old)} nodes to {len(new)}" if old != new else "attributes, names or annotations"
