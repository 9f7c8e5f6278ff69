"""Chooses between the two forms of the standard's Attention, and writes its operands in the form chosen.

Rank 3, ``[batch, sequence, heads * size]``, needs no transposition where heads are a part of the last axis of a
projection; rank 4, ``[batch, heads, sequence, size]``, none where they have an axis of their own already.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import onnx_ir as ir

from mmopt.analysis.dims import Size
from mmopt.transforms.canonicalize.rewriting import Rewriter
from mmopt.transforms.raising.attention_match import lead_of
from mmopt.transforms.raising.building import Builder, Unbuildable
from mmopt.transforms.raising.layout import Atom, Group, Layout, Source, extent, quotient, regroup, sources


@dataclasses.dataclass(frozen=True)
class Heads:
    """How the leading axes are shared out.

    Attributes:
        batch: Their part that is batch.
        count: Heads of the queries.
        kept: Heads of keys and values.
    """

    batch: Size
    count: Size
    kept: Size


class Operand:
    """Queries, keys or values, with everything they are views of.

    Args:
        value: The factor of the product.
        layout: Its axes.
        sequence: Role of its sequence axis.
        feature: Role of its feature axis.
        rewriter: What is at work.
    """

    def __init__(self, value: ir.Value, layout: Layout, sequence: str, feature: str, rewriter: Rewriter) -> None:
        self.sequence, self.feature = sequence, feature
        self.sources = list(sources(value, layout, rewriter))
        self.root_moves = self.sources[-1].moves

    def head_counts(self) -> tuple[list[Size], list[Size]]:
        """What its sources say of the number of heads: those of rank 3, and those of rank 4."""
        flat, axes = [], []
        for source in self.sources:
            groups = source.layout.groups
            if len(groups) == 3 and (part := self._total(groups[2], source)) != 1:
                flat.append(part)
            elif len(groups) == 4:
                axes.append(
                    self._total(groups[2], source)
                    if self._total(groups[2], source) != 1
                    else self._total(groups[1], source)
                )
        return flat, axes

    def _total(self, group: Group, source: Source) -> Size:
        """Heads in an axis, counting those that are repeated below them."""
        lead = [atom for atom in group if atom.role == "lead"]
        if not lead:
            return 1
        below = [a for a in source.layout.repeated if a.role == "lead" and a.path > lead[0].path]
        return extent([*lead, *below])

    def kept_heads(self, heads: Heads) -> list[Size]:
        """Numbers of heads that its sources have, the smallest choice last."""
        found = [view.kept for source in self.sources if (view := self.view(source, heads)) is not None]
        return list(dict.fromkeys(found))

    def view(self, source: Source, heads: Heads) -> View | None:
        """``source`` with its leading atoms cut into batch and heads; ``None`` where that is impossible."""
        cut = regroup(lead_of(source.layout), [heads.batch, heads.count])
        if cut is None:
            return None
        layout = refined(source.layout, [atom for group in cut for atom in group])
        batch, head = cut
        repeated = {atom for atom in layout.repeated if atom.size != 1}
        stay = tuple(atom for atom in head if atom not in repeated)
        if set(head[len(stay) :]) != repeated or head[: len(stay)] != stay:
            return None
        sequence = tuple(atom for atom in layout.order if atom.role == self.sequence)
        feature = tuple(atom for atom in layout.order if atom.role == self.feature)
        ordered = all(list(part) == sorted(part, key=lambda a: a.path) for part in (sequence, feature))
        return View(source, layout, batch, stay, sequence, feature) if ordered else None

    def best(self, heads: Heads, rank: int) -> tuple[float, View | None]:
        """The view that costs least to write with ``rank`` axes, and its cost in transpositions."""
        choices = []
        for number, source in enumerate(self.sources):
            view = self.view(source, heads)
            if view is None or view.kept != (heads.count if self.sequence == "row" else heads.kept):
                continue
            behind = self.root_moves - source.moves
            cost = view.cost(rank)
            if cost is not None:
                # Among equals one from before a factor, which then becomes part of the scale.
                choices.append((cost + behind, not view.is_written(rank), source.factor == 1, number, view))
        if not choices:
            return 0.0, None
        best = min(choices, key=lambda choice: choice[:4])
        return best[0], best[4]


def unscaled(operand: Operand) -> Operand:
    """``operand`` without the sources that stand before a factor: that of values cannot become part of the scale."""
    operand.sources = list(itertools.takewhile(lambda source: source.factor == 1, operand.sources))
    operand.root_moves = operand.sources[-1].moves
    return operand


@dataclasses.dataclass(frozen=True)
class View:
    """A source whose atoms are known by their parts."""

    source: Source
    layout: Layout
    batch: Group
    heads: Group
    sequence: Group
    feature: Group

    @property
    def kept(self) -> Size:
        """Heads it has."""
        return extent(self.heads)

    def axes(self, rank: int) -> tuple[Group, ...]:
        """Atoms of each axis in the form of ``rank``."""
        if rank == 3:
            return self.batch, self.sequence, (*self.heads, *self.feature)
        return self.batch, self.heads, self.sequence, self.feature

    def is_written(self, rank: int) -> bool:
        """Whether the source, or the part of it that is picked, has that form as it is."""
        return tuple(tuple(a for a in g if a.role != "pick") for g in self.layout.groups) == self.axes(rank)

    def cost(self, rank: int) -> float | None:
        """Transpositions that writing it takes: a part of something larger is a copy, at half the price."""
        picks = [atom for atom in self.layout.order if atom.role == "pick"]
        if any(len(atom.path) > 1 for atom in picks) or len(picks) > 1:
            return None
        rest = [atom for atom in self.layout.order if atom.role != "pick"]
        wanted = [atom for group in self.axes(rank) for atom in group]
        if picks and rest != wanted:
            return None
        return (0.0 if rest == wanted else 1.0) + 0.5 * len(picks)

    def write(self, builder: Builder, rank: int) -> ir.Value:
        """The source in the form of ``rank``.

        Raises:
            Unbuildable: A shape cannot be written down.
        """
        axes = self.axes(rank)
        value, layout = self.source.value, self.layout
        if any(atom.role == "pick" for atom in layout.order):
            value, layout = _taken(builder, value, layout)
        return rearranged(builder, value, layout, axes)


def _taken(builder: Builder, value: ir.Value, layout: Layout) -> tuple[ir.Value, Layout]:
    """The part of ``value`` that its pick chooses, by a Slice of one axis."""
    order = list(layout.order)
    place = next(n for n, atom in enumerate(order) if atom.role == "pick")
    axis = next(n for n, group in enumerate(layout.groups) if order[place] in group)
    if layout.groups[axis][0] is not order[place] and layout.groups[axis][0] != order[place]:
        groups = _parted(layout.groups, axis, order[place])
        value = builder.reshape(value, [extent(group) for group in groups])
        layout = dataclasses.replace(layout, groups=groups)
        axis += 1
    rest = layout.groups[axis][1:]
    part = extent(rest)
    if not isinstance(part, int):
        raise Unbuildable(f"the size of a part of {value.name} is not a number")
    index = layout.picked[0]
    shape = list(builder.shape(value))
    shape[axis] = part
    bounds = [builder.ints([n], "bound") for n in (index * part, (index + 1) * part, axis)]
    taken = builder.node("Slice", [value, *bounds], shape, builder.rewriter.dtype(value))
    groups = (*layout.groups[:axis], rest, *layout.groups[axis + 1 :])
    return taken, dataclasses.replace(layout, groups=groups)


def _parted(groups: tuple[Group, ...], axis: int, atom: Atom) -> tuple[Group, ...]:
    """``groups`` with one axis cut before ``atom``."""
    at = groups[axis].index(atom)
    return (*groups[:axis], groups[axis][:at], groups[axis][at:], *groups[axis + 1 :])


def rearranged(builder: Builder, value: ir.Value, layout: Layout, axes: Sequence[Group]) -> ir.Value:
    """``value`` with exactly ``axes``, by a Reshape where the order of its atoms is theirs, else by a Transpose too."""
    wanted = [atom for group in axes for atom in group]
    sizes = [extent(group) for group in axes]
    if list(layout.order) == wanted:
        return builder.reshape(value, sizes)
    runs = _runs(layout.order, wanted)
    fine = builder.reshape(value, [extent(run) for run in runs])
    starts = {run[0]: n for n, run in enumerate(runs)}
    moved = builder.transpose(fine, [starts[atom] for atom in wanted if atom in starts])
    return builder.reshape(moved, sizes)


def _runs(order: Sequence[Atom], wanted: Sequence[Atom]) -> list[Group]:
    """``order`` cut into runs that stay together in ``wanted``."""
    after = dict(zip(wanted, [*wanted[1:], None], strict=True))
    runs: list[list[Atom]] = []
    for atom in order:
        if runs and after[runs[-1][-1]] == atom:
            runs[-1].append(atom)
        else:
            runs.append([atom])
    return [tuple(run) for run in runs]


def refined(layout: Layout, parts: Sequence[Atom]) -> Layout:
    """``layout`` with atoms replaced by those of ``parts`` that they consist of."""

    def split(group: Group) -> Group:
        out: list[Atom] = []
        for atom in group:
            inside = [p for p in parts if p.role == atom.role and p.path[: len(atom.path)] == atom.path]
            out += inside or [atom]
        return tuple(out)

    return dataclasses.replace(
        layout, groups=tuple(split(group) for group in layout.groups), repeated=split(layout.repeated)
    )


def choose_heads(operands: Sequence[Operand], lead: Sequence[Size]) -> Heads | None:
    """Batch and heads: what the projections say, then what the tensors of rank 4 say, then the last leading axis."""
    total = extent([Atom("lead", (n,), size) for n, size in enumerate(lead)])
    counts = [operand.head_counts() for operand in operands]
    candidates = [count for flat, _ in counts for count in flat] + [count for _, axes in counts for count in axes]
    candidates.append(lead[-1] if len(lead) >= 2 else 1)
    for count in candidates:
        batch = quotient(total, count)
        if batch is None:
            continue
        heads = Heads(batch, count, count)
        kept = [set(map(str, operand.kept_heads(heads))) for operand in operands[1:]]
        if all(operand.kept_heads(heads) for operand in operands):
            common = [k for k in operands[1].kept_heads(heads) if str(k) in kept[1]]
            if common:
                return dataclasses.replace(heads, kept=common[-1])
    return None
