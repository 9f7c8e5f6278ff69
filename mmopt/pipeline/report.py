"""What a pipeline run leaves behind: one record a pass, ready for ``report.json``."""

from __future__ import annotations

import dataclasses
from typing import Any

from mmopt.ir.module import Module, Remark
from mmopt.pipeline.validation import OutputComparison

SCHEMA_VERSION = 1

APPLIED = "applied"
UNCHANGED = "unchanged"
FAILED = "failed"


@dataclasses.dataclass
class PassRecord:
    """What happened in one run of one pass.

    Attributes:
        name: The pass, by its kebab-case name.
        spec: The pass with its options, as ``--pass`` takes it.
        fidelity: ``exact``, ``rounding`` or ``lossy``.
        phase: Name of the phase it ran in, or "".
        round: Number of the round within its phase, from 1.
        status: ``applied``, ``unchanged``, or ``failed``: rolled back.
        reason: Why it failed, or "".
        seconds: Time in the pass itself.
        validation_seconds: Time spent checking it.
        nodes_before: Nodes before it ran, those in subgraphs and functions included.
        nodes_after: The same afterwards (as the pass left them, even when rolled back).
        remarks: What the pass reported.
        comparisons: Its outputs against those before it; empty when it was not run.
    """

    name: str
    spec: str
    fidelity: str
    phase: str = ""
    round: int = 1
    status: str = UNCHANGED
    reason: str = ""
    seconds: float = 0.0
    validation_seconds: float = 0.0
    nodes_before: int = 0
    nodes_after: int = 0
    remarks: list[Remark] = dataclasses.field(default_factory=list)
    comparisons: list[OutputComparison] = dataclasses.field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON-ready values."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            **fields,
            "remarks": [dataclasses.asdict(remark) for remark in self.remarks],
            "comparisons": [comparison.to_dict() for comparison in self.comparisons],
        }


@dataclasses.dataclass
class PipelineReport:
    """What a pipeline did to a module.

    Attributes:
        validate: ``each``, ``end`` or ``off``.
        seed: Seed of the run.
        target: Name of the target, or "".
        inputs: Where the inputs of validation came from: ``given``, ``probes`` or ``none``.
        engine: What ran the model for validation, or "".
        notes: What a reader must know about the run itself, for example why outputs could not be compared.
        passes: One record a run of a pass, in order.
        outputs: The final module's outputs against those of the module that came in; empty when neither was run.
        seconds: Time of the whole run.
        nodes_before: Nodes of the module that came in.
        nodes_after: Nodes of the module at the end.
    """

    validate: str
    seed: int = 0
    target: str = ""
    inputs: str = "none"
    engine: str = ""
    notes: list[str] = dataclasses.field(default_factory=list)
    passes: list[PassRecord] = dataclasses.field(default_factory=list)
    outputs: list[OutputComparison] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    nodes_before: int = 0
    nodes_after: int = 0

    @property
    def failed(self) -> list[PassRecord]:
        """The passes that were rolled back."""
        return [record for record in self.passes if record.status == FAILED]

    @property
    def applied(self) -> list[PassRecord]:
        """The passes that changed the module for good."""
        return [record for record in self.passes if record.status == APPLIED]

    @property
    def ok(self) -> bool:
        """Whether no pass was rolled back."""
        return not self.failed

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values, with ``schema_version``."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            "schema_version": SCHEMA_VERSION,
            **fields,
            "ok": self.ok,
            "passes": [record.to_dict() for record in self.passes],
            "outputs": [comparison.to_dict() for comparison in self.outputs],
        }


def node_count(module: Module) -> int:
    """Nodes of the graph, its subgraphs and the functions."""
    functions = module.model.functions.values()
    return sum(1 for _ in module.graph.all_nodes()) + sum(1 for function in functions for _ in function.all_nodes())
