"""Which tensors of a kernel get memory, which are inlined, and which loops they share."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

from tvm import tirx
from tvm.ir import Expr

from mmopt.backends.compute import LoopNest, LoopResult, Map, Reduction, Source, Tensor, loading_with
from mmopt.backends.cpu.loops import flat_index, product
from mmopt.backends.expressions import cost, same

CHEAP = 2
"""A rule of at most this many operations is recomputed rather than stored."""


@dataclasses.dataclass(frozen=True)
class Read:
    """One element read found while tracing: the value of ``leaf`` is ``tensor[indices]``."""

    tensor: Tensor
    indices: tuple[Expr, ...]
    leaf: Expr

    @property
    def offset(self) -> Expr:
        return flat_index(self.indices, self.tensor.shape)


@dataclasses.dataclass(frozen=True)
class Traced:
    """A rule evaluated at symbolic indices: every read replaced by a leaf variable."""

    axes: tuple[Expr, ...]
    values: tuple[Expr, ...]
    reads: tuple[Read, ...]

    @property
    def cost(self) -> int:
        return sum(cost(v) for v in self.values)


class Tracer:
    """Evaluates rules at symbolic indices. Maps outside ``stops`` are inlined when ``stops`` is given."""

    def __init__(self, stops: set[Tensor] | None = None) -> None:
        self.stops = stops
        self.reads: list[Read] = []
        self._inlined: dict[tuple[Tensor, tuple[str, ...]], Expr] = {}

    def load(self, tensor: Tensor, indices: tuple[Expr, ...]) -> Expr:
        if self.stops is not None and isinstance(tensor, Map) and tensor not in self.stops:
            key = (tensor, tuple(str(i) for i in indices))
            if key not in self._inlined:
                self._inlined[key] = tensor.body(*indices)
            return self._inlined[key]
        leaf = tirx.Var(f"read{len(self.reads)}", tensor.dtype)
        self.reads.append(Read(tensor, indices, leaf))
        return leaf

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        yield


def trace(stage: Map | Reduction, stops: set[Tensor] | None = None) -> Traced:
    """Evaluate the rule of ``stage`` at fresh index variables."""
    extra = stage.axes if isinstance(stage, Reduction) else ()
    axes = tuple(tirx.Var(f"t{n}", "int64") for n in range(len(stage.shape) + len(extra)))
    tracer = Tracer(stops)
    with loading_with(tracer):
        result = stage.body(*axes)
    values = result if isinstance(result, tuple) else (result,)
    return Traced(axes, values, tuple(tracer.reads))


def inputs_of(tensor: Tensor, traced: dict[Tensor, Traced]) -> list[Tensor]:
    """Tensors that ``tensor`` reads directly, without repeats."""
    if isinstance(tensor, LoopResult):
        return list(tensor.nest.inputs)
    if isinstance(tensor, Source):
        return []
    return list(dict.fromkeys(read.tensor for read in traced[tensor].reads))


@dataclasses.dataclass
class Plan:
    """The decisions for one kernel.

    Attributes:
        order: Every tensor the outputs need, producers first.
        sources: Kernel inputs in order of first use.
        stored: Tensors that get memory (outputs and temporaries).
        stages: What is emitted, in order: maps, reductions and loop nests.
        epilogues: For a loop result, the stored maps computed while its elements are still in registers.
        shared: How many leading axes all stages loop over together (0 when they do not).
    """

    order: list[Tensor]
    sources: list[Source]
    stored: set[Tensor]
    stages: list[Map | Reduction | LoopNest]
    epilogues: dict[LoopResult, list[Map]]
    shared: int


class Planner:
    """Builds the :class:`Plan` of one kernel."""

    def __init__(self, outputs: Sequence[Tensor]) -> None:
        self.outputs = list(outputs)
        self.traced: dict[Tensor, Traced] = {}
        self.order = self._topological()
        self.users: dict[Tensor, list[Tensor]] = {t: [] for t in self.order}
        for tensor in self.order:
            for read in inputs_of(tensor, self.traced):
                self.users[read].append(tensor)

    def plan(self) -> Plan:
        stored = self._stored()
        epilogues = self._epilogues(stored)
        done = {m for maps in epilogues.values() for m in maps}
        stages: list[Map | Reduction | LoopNest] = []
        for tensor in self.order:
            if isinstance(tensor, LoopResult):
                if tensor.nest not in stages:
                    stages.append(tensor.nest)
            elif isinstance(tensor, Map | Reduction) and tensor in stored and tensor not in done:
                stages.append(tensor)
        sources = [t for t in self.order if isinstance(t, Source)]
        return Plan(self.order, sources, stored, stages, epilogues, self._shared_axes(stages, stored))

    def _topological(self) -> list[Tensor]:
        done: dict[Tensor, None] = {}
        pending: list[tuple[Tensor, bool]] = [(t, False) for t in reversed(self.outputs)]
        while pending:
            tensor, expanded = pending.pop()
            if tensor in done:
                continue
            if expanded:
                done[tensor] = None
                continue
            if isinstance(tensor, Map | Reduction) and tensor not in self.traced:
                self.traced[tensor] = trace(tensor)
            pending.append((tensor, True))
            pending.extend((t, False) for t in reversed(inputs_of(tensor, self.traced)) if t not in done)
        return list(done)

    def _stored(self) -> set[Tensor]:
        stored: set[Tensor] = set(self.outputs)
        deep: dict[Tensor, int] = {}
        for tensor in self.order:
            if isinstance(tensor, Source):
                continue
            if isinstance(tensor, Reduction | LoopResult):
                stored.add(tensor)
                continue
            inlined = [t for t in inputs_of(tensor, self.traced) if t not in stored]
            deep[tensor] = self.traced[tensor].cost + sum(deep.get(t, 0) for t in inlined)
            if self._recomputed(tensor, deep[tensor]):
                stored.add(tensor)
        return stored - {t for t in self.order if isinstance(t, Source)}

    def _recomputed(self, tensor: Tensor, work: int) -> bool:
        """Whether inlining ``tensor`` would repeat real work."""
        users = self.users[tensor]
        if work <= CHEAP or not users:
            return False
        if len(users) > 1 and any(not isinstance(u, Map) for u in users):
            return True
        return any(self._reads_often(u, tensor) for u in users)

    def _reads_often(self, user: Tensor, tensor: Tensor) -> bool:
        if isinstance(user, LoopResult):
            return True
        points = product((*user.shape, *(user.axes if isinstance(user, Reduction) else ())))
        return not same(points, product(tensor.shape))

    def _epilogues(self, stored: set[Tensor]) -> dict[LoopResult, list[Map]]:
        """Stored maps that only need one element of a loop result, at their own index."""
        found: dict[LoopResult, list[Map]] = {}
        reach = self._loop_results_reached(stored)
        for tensor in self.order:
            if not isinstance(tensor, Map) or tensor not in stored or len(reach[tensor]) != 1:
                continue
            (result,) = reach[tensor]
            if self._identity_of(tensor, result, stored):
                found.setdefault(result, []).append(tensor)
        for result, maps in found.items():
            if result not in self.outputs and not self._needed_elsewhere(result, maps, stored):
                stored.discard(result)
        return found

    def _loop_results_reached(self, stored: set[Tensor]) -> dict[Tensor, set[LoopResult]]:
        """Loop results each tensor depends on, through anything."""
        reach: dict[Tensor, set[LoopResult]] = {}
        for tensor in self.order:
            found: set[LoopResult] = {tensor} if isinstance(tensor, LoopResult) else set()
            for read in inputs_of(tensor, self.traced):
                found |= reach[read]
            reach[tensor] = found
        return reach

    def _identity_of(self, tensor: Map, result: LoopResult, stored: set[Tensor]) -> bool:
        if len(tensor.shape) != len(result.shape) or not all(map(same, tensor.shape, result.shape)):
            return False
        inside = trace(tensor, stored)
        for read in inside.reads:
            if read.tensor is result:
                if not all(map(same, read.indices, inside.axes)):
                    return False
            elif not isinstance(read.tensor, Source):
                return False
        return True

    def _needed_elsewhere(self, result: LoopResult, maps: list[Map], stored: set[Tensor]) -> bool:
        """Whether a stage other than the epilogues reads ``result``, directly or through inlined maps."""
        pending: list[Tensor] = list(self.users[result])
        seen: set[Tensor] = set()
        while pending:
            user = pending.pop()
            if user in seen or user in maps:
                continue
            seen.add(user)
            if user in stored or not isinstance(user, Map):
                return True
            pending.extend(self.users[user])
        return False

    def _shared_axes(self, stages: Sequence[Map | Reduction | LoopNest], stored: set[Tensor]) -> int:
        if len(stages) < 2 or any(isinstance(s, LoopNest) for s in stages):
            return 0
        tensors = [s for s in stages if isinstance(s, Map | Reduction)]
        depth = min(len(t.shape) for t in tensors)
        if any(isinstance(t, Reduction) for t in tensors):
            depth = min(depth, max(0, max(len(t.shape) for t in tensors)))
        first = tensors[0].shape
        while depth and not all(all(map(same, t.shape[:depth], first[:depth])) for t in tensors):
            depth -= 1
        local = set(tensors)
        for tensor in tensors:
            inside = trace(tensor, stored)
            for read in inside.reads:
                if read.tensor in local:
                    depth = min(depth, _equal_prefix(read.indices, inside.axes))
        return depth


def _equal_prefix(left: Sequence[Expr], right: Sequence[Expr]) -> int:
    count = 0
    for a, b in zip(left, right, strict=False):
        if not a.same_as(b):
            break
        count += 1
    return count
