"""Which inputs belong together: ids whose embeddings are added, a mask and what it masks, a state and its sequence."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from mmopt.analysis import operators as ops
from mmopt.analysis.dataflow import FlatGraph, FlatNode
from mmopt.analysis.input_roles import ORDINARY, SCORE_OPERATORS, Finding
from mmopt.analysis.input_uses import Use
from mmopt.analysis.streams import Streams, follow
from mmopt.ir.modality import Modality

_EMBEDDING_OPERATORS = ops.LAYOUT | {"Slice", "Split"}


class _Groups:
    """Disjoint sets of input positions."""

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))

    def find(self, k: int) -> int:
        while self._parent[k] != k:
            k = self._parent[k] = self._parent[self._parent[k]]
        return k

    def join(self, members: Sequence[int]) -> None:
        """Put all in the set of the first in order."""
        roots = sorted({self.find(k) for k in members})
        for root in roots[1:]:
            self._parent[root] = roots[0]


def group_inputs(
    graph: FlatGraph, streams: Streams, findings: list[Finding], uses: list[list[Use]]
) -> tuple[list[Finding], list[int | None]]:
    """Group the inputs and settle the roles that only the group tells: positions and token types among ids.

    Args:
        graph: The flat graph.
        streams: Labels in which the input at position k has bit k.
        findings: What each input is by itself.
        uses: The uses of each input.

    Returns:
        The findings, and for each input the first input of its group; ``None`` for inputs that no group owns.
    """
    sums = _embedding_sums(graph, streams, findings, uses)
    findings = _settle_sums(findings, sums)
    findings = _settle_positions(graph, streams, findings, uses, sums)
    groups = _Groups(len(findings))
    for members in sums.added + sums.joined:
        parts = [k for k in members if findings[k].role != "ids"]
        if len({findings[k].modality for k in members if k not in parts}) <= 1:
            groups.join(members)
    _join_tables(graph, streams, findings, groups)
    owner: list[int | None] = [groups.find(k) if f.primary else None for k, f in enumerate(findings)]
    content = {v: 1 << k for k, v in enumerate(graph.inputs) if findings[k].primary}
    control = {v: 1 << k for k, v in enumerate(graph.inputs) if not findings[k].primary}
    labels = follow(graph, content, control)
    for k, finding in enumerate(findings):
        if not finding.primary and finding.used:
            owner[k] = _owner(graph, labels, owner, finding, uses[k], k)
    return findings, owner


@dataclasses.dataclass
class _Sums:
    """How embeddings of several inputs come together, each as positions of inputs.

    Attributes:
        added: Sets whose embeddings are added.
        joined: Sets whose embeddings are concatenated feature by feature.
        mixed: Inputs whose embedding is added to data of another input that is no embedding.
    """

    added: list[list[int]] = dataclasses.field(default_factory=list)
    joined: list[list[int]] = dataclasses.field(default_factory=list)
    mixed: set[int] = dataclasses.field(default_factory=set)


def bits(mask: int) -> list[int]:
    """Positions of the bits of a mask, lowest first."""
    return [k for k in range(mask.bit_length()) if mask >> k & 1]


def _embedding_sums(graph: FlatGraph, streams: Streams, findings: list[Finding], uses: list[list[Use]]) -> _Sums:
    """Follow embeddings forward through sums until they are processed."""
    embedded = [0] * len(graph.values)
    for k, found in enumerate(uses):
        for use in found:
            if use.kind == "lookup" and findings[k].role == "ids" and use.node is not None:
                for value in use.node.outputs:
                    embedded[value] |= 1 << k
    sums = _Sums()
    for node in graph.nodes:
        carried = [v for v in node.inputs if v >= 0 and streams.reach(v)]
        marks = [embedded[v] for v in carried]
        if any(marks):
            for value in node.outputs:
                embedded[value] |= _combine(graph, node, carried, marks, streams, sums)
    for node in graph.nodes:
        if node.op == "com.microsoft.EmbedLayerNormalization":
            mask = streams.reach(node.inputs[0]) | (streams.reach(node.inputs[1]) if node.inputs[1] >= 0 else 0)
            sums.added.append(bits(mask))
    return sums


def _combine(
    graph: FlatGraph, node: FlatNode, carried: list[int], marks: list[int], streams: Streams, sums: _Sums
) -> int:
    """The embeddings that a node's output is a sum of; what is brought together is noted in ``sums``."""
    union = 0
    for mark in marks:
        union |= mark
    if node.op in _EMBEDDING_OPERATORS or (node.op in ops.MULTIPLICATIVE and len(carried) == 1):
        return union
    if node.op in ops.ADDITIVE:
        rest = [v for v, mark in zip(carried, marks, strict=True) if not mark and streams.content[v] & ~union]
        if rest:
            # What shares an origin with the embedding is a residual, which says nothing about positions.
            foreign = [v for v in rest if not streams.content[v] & union]
            sums.mixed |= set(bits(union)) if foreign else set()
            return 0
        if len(bits(union)) > 1:
            sums.added.append(bits(union))
        return union
    if node.op == "Concat" and all(marks) and _joins_features(graph, node):
        sums.joined.append(bits(union))
        return union
    return 0


def _joins_features(graph: FlatGraph, node: FlatNode) -> bool:
    axis, rank = node.node.attributes.get_int("axis", 1), graph.rank(node.inputs[0])
    return axis == -1 or (rank is not None and axis == rank - 1)


def _settle_sums(findings: list[Finding], sums: _Sums) -> list[Finding]:
    """Among ids whose embeddings are added the largest table holds the vocabulary, tiny ones types of tokens."""
    findings = list(findings)
    for members in sums.added:
        ids = [k for k in members if findings[k].role == "ids" and findings[k].modality != Modality.TABULAR]
        largest = max((findings[k].bound or 0 for k in ids), default=0)
        for k in ids:
            bound = findings[k].bound
            if bound is None or bound == largest:
                continue
            role = "positions" if bound in ORDINARY else "token-types"
            reason = f"its embedding ({bound} rows) is added to that of a vocabulary of {largest}"
            findings[k] = dataclasses.replace(findings[k], role=role, reason=reason)
    return findings


def _settle_positions(
    graph: FlatGraph, streams: Streams, findings: list[Finding], uses: list[list[Use]], sums: _Sums
) -> list[Finding]:
    """Ids that only add a table to, or rotate, data of another input are that data's positions."""
    findings = list(findings)
    summed = {k for members in sums.added + sums.joined for k in members}
    for k, finding in enumerate(findings):
        if finding.role != "ids" or k in summed or finding.fixed or (graph.rank(graph.inputs[k]) or 0) < 2:
            continue
        added = k in sums.mixed and (finding.bound or ORDINARY.stop) in ORDINARY
        if added or _rotates(graph, streams, uses[k], 1 << k):
            how = "added to" if added else "multiplied with"
            reason = f"the table it picks from is {how} other data"
            findings[k] = Finding(Modality.UNKNOWN, "positions", reason, finding.bound, primary=False)
    return findings


def _rotates(graph: FlatGraph, streams: Streams, uses: Iterable[Use], own: int) -> bool:
    """Whether looked-up rows are only multiplied with other data, as rotary embeddings are."""
    lookups = [u.node for u in uses if u.kind == "lookup" and u.node is not None]
    for node in lookups:
        values = _layout_closure(graph, node.outputs)
        users = [(n, v) for v in values for n in graph.users(v) if n.op not in ops.LAYOUT]
        if not users or not all(n.op == "Mul" and _others_reach(streams, n, v) & ~own for n, v in users):
            return False
        if any(_is_lookup(graph, streams, n, v) for n, v in users):
            return False
    return bool(lookups)


def _layout_closure(graph: FlatGraph, values: Iterable[int]) -> list[int]:
    found = list(values)
    for value in found:
        for user in graph.users(value):
            if user.op in ops.LAYOUT and user.inputs[0] == value:
                found.extend(v for v in user.outputs if v not in found)
    return found


def _others_reach(streams: Streams, node: FlatNode, value: int) -> int:
    mask = 0
    for other in node.inputs:
        if other != value:
            mask |= streams.reach(other)
    return mask


def _is_lookup(graph: FlatGraph, streams: Streams, node: FlatNode, value: int) -> bool:
    """Whether the other factor is an embedding too: then two ids are matched and nothing is rotated."""
    for other in node.inputs:
        maker = graph.made_by(graph.back_through(other, ops.LAYOUT))
        if other != value and maker is not None and maker.op in ops.GATHERS and not streams.reach(maker.inputs[0]):
            return True
    return False


def _join_tables(graph: FlatGraph, streams: Streams, findings: list[Finding], groups: _Groups) -> None:
    """Columns of one table arrive as several inputs: those put side by side before anything is learned from them."""
    raw = [0] * len(graph.values)
    for k, value in enumerate(graph.inputs):
        if findings[k].primary and findings[k].modality == Modality.TABULAR:
            raw[value] = 1 << k
    if len([v for v in graph.inputs if raw[v]]) < 2:
        return
    for node in graph.nodes:
        marks = [raw[v] for v in node.inputs if v >= 0 and streams.reach(v)]
        if not marks or not all(marks) or not _is_raw(graph, node, streams):
            continue
        union = 0
        for mark in marks:
            union |= mark
        if len(marks) > 1 and node.op == "Concat":
            groups.join(bits(union))
        for value in node.outputs:
            raw[value] |= union


def _is_raw(graph: FlatGraph, node: FlatNode, streams: Streams) -> bool:
    """Whether nothing is learned here: layout, selection, scaling, normalization, looking up an embedding."""
    if node.op in ops.GATHERS:
        return True
    if node.op in ops.ARITHMETIC:
        return sum(1 for v in node.inputs if v >= 0 and streams.reach(v)) == 1
    return (
        node.op in ops.LAYOUT or node.op in ops.SELECTION or node.op in ops.NORMS or node.op.startswith(ops.TRADITIONAL)
    )


def _owner(
    graph: FlatGraph, labels: Streams, owner: list[int | None], finding: Finding, uses: list[Use], own: int
) -> int | None:
    """The group that a mask, a state or the like belongs to.

    Where it meets data of one group, that group. Where it only meets data that is mixed already, the group of the
    input whose shape it repeats. ``None`` when it steers several.
    """
    masks = [_groups_of(labels.content[v], owner) for u in uses for v in u.others]
    masks += [_groups_of(labels.content[v], owner) for u in uses for v in _keys(graph, labels, u)]
    single = [groups for groups in masks if len(groups) == 1]
    if finding.role == "scalar":
        reached = {g for groups in masks for g in groups} or _controlled(graph, labels, owner, own)
        return reached.pop() if len(reached) == 1 else None
    if single:
        return min(single[0])
    candidates = {g for groups in masks for g in groups} or _controlled(graph, labels, owner, own)
    return _most_alike(graph, own, candidates, owner)


def _groups_of(mask: int, owner: list[int | None]) -> set[int]:
    return {group for k in bits(mask) if (group := owner[k]) is not None}


def _keys(graph: FlatGraph, labels: Streams, use: Use) -> list[int]:
    """The keys of the attention scores that a use masks: in cross attention a mask belongs to what is looked at."""
    found = []
    for value in use.others:
        node = graph.made_by(graph.back_through(value, SCORE_OPERATORS))
        if node is not None and node.op in ops.PRODUCTS and len(node.inputs) > 1:
            found.append(node.inputs[ops.PRODUCTS[node.op][1]])
    return [v for v in found if v >= 0 and labels.content[v]]


def _controlled(graph: FlatGraph, labels: Streams, owner: list[int | None], own: int) -> set[int]:
    """The groups whose data an input steers anywhere."""
    mask = 0
    for value, control in enumerate(labels.control):
        if control >> own & 1:
            mask |= labels.content[value]
    return _groups_of(mask, owner)


def _most_alike(graph: FlatGraph, own: int, candidates: set[int], owner: list[int | None]) -> int | None:
    """The candidate with an input of which ``own`` repeats the most dimensions in order; the first when equal."""
    mine = graph.dims(graph.inputs[own]) or ()
    scores = {group: 0 for group in sorted(candidates)}
    for k, group in enumerate(owner):
        if group in scores and k != own:
            scores[group] = max(scores[group], _repeated(mine, graph.dims(graph.inputs[k]) or ()))
    return max(scores, key=lambda g: scores[g]) if scores else None


def _repeated(mine: Sequence[object], theirs: Sequence[object]) -> int:
    """How many of ``mine`` appear in ``theirs`` in order; unknown dimensions equal nothing."""
    count = start = 0
    for size in mine:
        for position in range(start, len(theirs)):
            if size is not None and size == theirs[position]:
                count, start = count + 1, position + 1
                break
    return count
