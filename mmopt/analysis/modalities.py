"""What the inputs of a model are, told from what the model does with them; never from their names.

Each input gets a role (ids, mask, image, waveform, …) and a modality, and inputs that belong together form a group: the
ids, the attention mask and the positions of one text are one group. What the dataflow does not settle stays unknown
("modality 1"): a convolution over one channel of a rectangle may see a picture or a spectrogram.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from mmopt.analysis import input_groups, input_roles
from mmopt.analysis.dataflow import FlatGraph, flatten
from mmopt.analysis.input_roles import Finding
from mmopt.analysis.input_uses import uses_of
from mmopt.analysis.streams import follow
from mmopt.errors import UserError, did_you_mean
from mmopt.ir.modality import Modality
from mmopt.ir.module import Module

COMMON = "common"
"""Group of inputs that steer several modalities at once, such as a temperature."""

UNUSED = "unused"
"""Group of inputs that nothing depends on."""


@dataclasses.dataclass(frozen=True)
class InputRole:
    """What one input of a model is.

    Attributes:
        modality: Kind of data; for a mask, positions and the like the kind they belong to. States and scalars carry no
            modality of their own and have ``UNKNOWN``.
        role: ``ids``, ``mask``, ``positions``, ``token-types``, ``image``, ``frames``, ``waveform``, ``spectrogram``,
            ``lengths``, ``state``, ``features`` or ``scalar``.
        group: Label of the group of inputs it belongs to: "text", "image 2", "modality 1", "common", "unused".
        bound: Exclusive upper bound of ids, positions or token types, where a table bounds them.
        reason: Why, in a sentence.
    """

    modality: Modality
    role: str
    group: str
    bound: int | None = None
    reason: str = ""


def classify_inputs(module: Module) -> dict[str, InputRole]:
    """Find role, modality and group of every input.

    Args:
        module: The module; its ``modalities`` override what is found.

    Returns:
        The role of each input by name, in the order of the graph's inputs.

    Raises:
        UserError: ``module.modalities`` names an input that does not exist.
    """
    return classify(flatten(module), module.modalities)


def classify(graph: FlatGraph, overrides: Mapping[str, Modality]) -> dict[str, InputRole]:
    """:func:`classify_inputs` on a flat graph."""
    names = [graph.name(v) for v in graph.inputs]
    for name in overrides:
        if name not in names:
            raise UserError(f"the model has no input {name!r}", where="--modality", hint=did_you_mean(name, names))
    bits = {value: 1 << k for k, value in enumerate(graph.inputs)}
    streams = follow(graph, bits, {})
    uses = [uses_of(graph, streams, value) for value in graph.inputs]
    findings = [
        _override(input_roles.find_role(graph, streams, value, found), graph, value, overrides.get(name))
        for name, value, found in zip(names, graph.inputs, uses, strict=True)
    ]
    findings, groups = input_groups.group_inputs(graph, streams, findings, uses)
    labels = _label(findings, groups)
    return {name: _role(k, findings, groups, labels) for k, name in enumerate(names)}


_OVERRIDE_ROLES = {Modality.IMAGE: "image", Modality.VIDEO: "frames", Modality.TABULAR: "features"}


def _override(finding: Finding, graph: FlatGraph, value: int, modality: Modality | None) -> Finding:
    """Give an input the modality that the user says it has; a mask keeps being one."""
    if modality is None:
        return finding
    role = finding.role
    if finding.primary and modality != finding.modality and role != "ids":
        rank = graph.rank(value)
        audio = "spectrogram" if rank is None or rank > 2 else "waveform"
        role = _OVERRIDE_ROLES.get(modality, audio if modality == Modality.AUDIO else "features")
    return dataclasses.replace(finding, modality=modality, role=role, fixed=True, reason="the user says so")


def _label(findings: list[Finding], groups: list[int | None]) -> dict[int, tuple[str, Modality]]:
    """Label and modality of each group, numbered where there are several of a kind, in the order of the inputs."""
    labels: dict[int, tuple[str, Modality]] = {}
    counts: dict[Modality, int] = {}
    for group in dict.fromkeys(g for g in groups if g is not None):
        modality = _modality(findings[k] for k, g in enumerate(groups) if g == group)
        count = counts[modality] = counts.get(modality, 0) + 1
        if modality == Modality.UNKNOWN:
            labels[group] = (f"modality {count}", modality)
        else:
            labels[group] = (modality.value if count == 1 else f"{modality.value} {count}", modality)
    return labels


def _modality(members: Iterable[Finding]) -> Modality:
    """The modality of a group: what the user said of any member, else that of its first carrier of data."""
    ordered = sorted(members, key=lambda f: (not f.fixed, not f.primary, f.modality == Modality.UNKNOWN))
    return ordered[0].modality


def _role(
    k: int, findings: list[Finding], groups: list[int | None], labels: Mapping[int, tuple[str, Modality]]
) -> InputRole:
    finding, group = findings[k], groups[k]
    if group is None:
        label = COMMON if finding.used else UNUSED
        return InputRole(finding.modality, finding.role, label, finding.bound, finding.reason)
    label, modality = labels[group]
    if finding.role in ("state", "scalar"):
        modality = finding.modality
    return InputRole(modality, finding.role, label, finding.bound, finding.reason)
