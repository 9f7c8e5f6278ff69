"""Splits a graph into parts that run natively and parts that onnxruntime runs inside the same artifact.

A trial lowering goes over all nodes and notes those that cannot be lowered; behind such a node it goes on with values
of the types the model states. The nodes are then put into as few parts as their order allows, and each native part is
lowered into one function.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
from tvm import tirx

from mmopt.backends.compute import Source
from mmopt.errors import UnsupportedError
from mmopt.ir.module import Module, save_model
from mmopt.lowering.excerpt import NotCut, cut_out, refusal
from mmopt.lowering.function import FunctionLowering
from mmopt.lowering.grouping import Group, absorbed, grouped, reads
from mmopt.lowering.program import ProgramBuilder
from mmopt.lowering.values import ConstantSource, NotLowered, Value, identifier

if TYPE_CHECKING:
    from mmopt.lowering.compiler import CompileOptions


@dataclasses.dataclass
class Part:
    """A run of nodes one engine executes.

    Attributes:
        name: Function name, or stem of the fallback model's file.
        inputs: Names of values it reads.
        outputs: Names of values it makes.
        params: Weights of a native part.
        model: Writes the fallback model to a path; ``None`` for a native part.
        notes: Why nodes fell back.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    params: list[ConstantSource] = dataclasses.field(default_factory=list)
    model: Callable[[pathlib.Path], None] | None = None
    notes: list[str] = dataclasses.field(default_factory=list)


def partition(module: Module, entry: str, builder: ProgramBuilder, options: CompileOptions) -> list[Part]:
    """Split ``module`` and lower its native parts into ``builder``.

    Raises:
        UnsupportedError: A node runs neither natively nor in onnxruntime, or fallback is not allowed.
    """
    graph = module.graph
    inputs = [v for v in graph.inputs if v.name not in graph.initializers]
    outputs = [v for v in dict.fromkeys(graph.outputs) if v not in inputs]
    if not outputs:
        return []
    name = builder.unique(f"{entry}_0")
    trial = _Trial(module, name, inputs, outputs, builder)
    if not trial.reasons:
        return [Part(name, _names(inputs), _names(outputs), trial.params)]
    if not options.allow_fallback:
        node, reason = next(iter(trial.reasons.items()))
        raise UnsupportedError(reason, where=_place(node), hint="allow onnxruntime to run what has no native code")
    return _Splitter(module, entry, builder, trial, inputs, outputs).parts()


class _Discard(Exception):
    """Leaves a function that is not wanted."""


class _Trial:
    """A lowering of the whole graph that goes on behind nodes that have none.

    Attributes:
        reasons: The nodes without a lowering, and why.
        values: The lowered values.
        params: Weights of the function, which is added to the program when every node has been lowered.
    """

    def __init__(
        self,
        module: Module,
        name: str,
        inputs: Sequence[ir.Value],
        outputs: Sequence[ir.Value],
        builder: ProgramBuilder,
    ) -> None:
        self.reasons: dict[ir.Node, str] = {}
        self._lowering = _lowering(module, name, builder)
        self.values = self._lowering.values
        for value in inputs:
            self._declare(value)
        try:
            with self._lowering.body() as body:
                self._lowering.run(module.graph, outputs, self._failed)
                results = self._results(outputs)
                if self.reasons:
                    raise _Discard
                body.finish(results)
            self.params = _add(builder, name, self._lowering, body.function)
        except _Discard:
            self.params = []

    def _declare(self, value: ir.Value) -> None:
        try:
            self._lowering.argument(value)
        except NotLowered as why:
            self._lowering.missing[value] = why.reason

    def _failed(self, node: ir.Node, why: NotLowered) -> None:
        self.reasons[node] = why.reason
        for value in node.outputs:
            self._declare(value)

    def _results(self, outputs: Sequence[ir.Value]) -> list[Value]:
        """The lowered outputs; the node behind one that is not a tensor for kernels is a node without a lowering."""
        results = []
        for value in outputs:
            try:
                results.append(self._lowering.value(value))
            except NotLowered as why:
                producer = value.producer()
                if producer is not None:
                    self.reasons.setdefault(producer, why.reason)
        return results


class _Splitter:
    """Makes the parts of a graph of which some nodes have no lowering."""

    def __init__(
        self,
        module: Module,
        entry: str,
        builder: ProgramBuilder,
        trial: _Trial,
        inputs: Sequence[ir.Value],
        outputs: Sequence[ir.Value],
    ) -> None:
        self._module, self._entry, self._builder, self._trial = module, entry, builder, trial
        self._inputs, self._outputs = list(inputs), list(outputs)
        self._reasons = dict(trial.reasons)

    def parts(self) -> list[Part]:
        """The parts in order."""
        while True:
            groups = absorbed(grouped(self._module.graph, self._reasons), self._module.graph)
            before = len(self._reasons)
            try:
                parts = [self._part(group, groups, n) for n, group in enumerate(groups)]
            except NotCut:
                groups, parts = [], [self._whole()]
            if len(self._reasons) == before:
                parts[0].notes = [*self._notes(groups), *parts[0].notes]
                return parts

    def _notes(self, groups: Sequence[Group]) -> list[str]:
        """Why nodes are where they are."""
        notes = [f"{self._entry}: {_place(n)} runs in onnxruntime: {why}" for n, why in self._reasons.items()]
        taken = [n for g in groups if not g.native for n in g.nodes if n not in self._reasons]
        if taken:
            kinds = ", ".join(sorted({n.op_type for n in taken}))
            notes.append(
                f"{self._entry}: {len(taken)} nodes run with them, not worth native code between them: {kinds}"
            )
        return notes

    def _part(self, group: Group, groups: Sequence[Group], number: int) -> Part:
        outside = {v for g in groups if g is not group for n in g.nodes for v in reads(n)} | set(self._outputs)
        made = [v for n in group.nodes for v in n.outputs if v in outside]
        made += self._unmade() if number == 0 else []
        return self._native(group.nodes, made, number) if group.native else self._foreign(group.nodes, made, number)

    def _unmade(self) -> list[ir.Value]:
        """Outputs that are initializers."""
        return [v for v in self._outputs if v.producer() is None]

    # -- native ------------------------------------------------------------------------------------------------------

    def _native(self, nodes: Sequence[ir.Node], outputs: Sequence[ir.Value], number: int) -> Part:
        chosen, inputs = self._closed(nodes, outputs)
        name = self._builder.unique(f"{self._entry}_{number}")
        lowering = _lowering(self._module, name, self._builder)
        before = len(self._reasons)

        def failed(node: ir.Node, why: NotLowered) -> None:
            self._reasons[node] = why.reason
            for value in node.outputs:
                lowering.missing[value] = why.reason

        params: list[ConstantSource] = []
        try:
            with lowering.body() as body:
                for value in inputs:
                    lowering.set_value(value, lowering.bind_argument(self._boundary(value, lowering)))
                lowering.run(chosen, outputs, failed)
                if len(self._reasons) > before:
                    raise _Discard
                body.finish([lowering.value(o) for o in outputs])
            params = _add(self._builder, name, lowering, body.function)
        except _Discard:
            pass
        return Part(name, _names(inputs), _names(outputs), params)

    def _closed(self, nodes: Sequence[ir.Node], outputs: Sequence[ir.Value]) -> tuple[list[ir.Node], list[ir.Value]]:
        """``nodes`` with those that only work out sizes for them, in order, and what they all read.

        Sizes that a kernel has to know at compile time would be mere data behind the border of a part.
        """
        wanted, pending = set(nodes), [v for n in nodes for v in reads(n)] + list(outputs)
        inputs: dict[ir.Value, None] = {}
        while pending:
            value = pending.pop()
            producer = value.producer()
            if producer in wanted or _constant(value):
                continue
            if producer is not None and producer not in self._reasons and self._followed(producer):
                wanted.add(producer)
                pending.extend(reads(producer))
            else:
                inputs[value] = None
        order = [n for n in self._module.graph if n in wanted]
        return order, list(inputs)

    def _followed(self, node: ir.Node) -> bool:
        values = [self._trial.values.get(v) for v in node.outputs]
        return all(v is not None and (v.elements is not None or v.constant is not None) for v in values)

    def _boundary(self, value: ir.Value, lowering: FunctionLowering) -> Source:
        """A value that another part makes: with the extents of the trial, where equal ones have equal names."""
        known = self._trial.values[value]
        shape = [d if isinstance(d, tirx.IntImm) else lowering.symbol(identifier(str(d))) for d in known.shape]
        return Source(shape, known.dtype, identifier(value.name))

    # -- onnxruntime -------------------------------------------------------------------------------------------------

    def _foreign(self, nodes: Sequence[ir.Node], outputs: Sequence[ir.Value], number: int) -> Part:
        model = cut_out(self._module.model, nodes, outputs, self._trial.values)
        self._insist(model, nodes)
        name = self._builder.unique(f"{self._entry}_{number}")
        return Part(name, _names(model.graph.inputs), _names(outputs), model=_writer(model))

    def _whole(self) -> Part:
        """The whole graph in onnxruntime: what a part reads has a type that nobody knows."""
        self._insist(self._module.model, list(self._module.graph))
        name = self._builder.unique(f"{self._entry}_0")
        return Part(name, _names(self._inputs), _names(self._outputs), model=_writer(self._module.model))

    def _insist(self, model: ir.Model, nodes: Sequence[ir.Node]) -> None:
        """Load a fallback model now rather than in front of a user."""
        why = refusal(model)
        if not why:
            return
        culprit, reason = self._culprit(nodes) or (None, why)
        where = _place(culprit) if culprit is not None else f"{len(nodes)} nodes that have no native code"
        native = self._reasons.get(culprit, "") if culprit is not None else "; ".join(self._reasons.values())
        raise UnsupportedError(
            f"it has no native code ({native}), and onnxruntime refuses it ({reason})",
            where=where,
            hint="replace the operator by others, or save the model with an opset and types that onnxruntime knows",
        )

    def _culprit(self, nodes: Sequence[ir.Node]) -> tuple[ir.Node, str] | None:
        """The first node that onnxruntime refuses on its own."""
        for node in nodes:
            try:
                why = refusal(
                    cut_out(self._module.model, [node], [v for v in node.outputs if v.name], self._trial.values)
                )
            except NotCut:
                continue
            if why:
                return node, why
        return None


def _lowering(module: Module, name: str, builder: ProgramBuilder) -> FunctionLowering:
    return FunctionLowering(builder, name, dict(module.model.opset_imports), dict(module.model.functions))


def _add(builder: ProgramBuilder, name: str, lowering: FunctionLowering, function: Any) -> list[ConstantSource]:
    """Add a finished function to the program; its weights, in order."""
    builder.add_entry(function, name)
    return lowering.params.sources


def _constant(value: ir.Value) -> bool:
    return value.producer() is None and value.const_value is not None


def _place(node: ir.Node) -> str:
    kind = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    return f"{kind} {node.name!r}" if node.name else kind


def _names(values: Iterable[ir.Value]) -> tuple[str, ...]:
    return tuple(str(v.name) for v in values)


def _writer(model: ir.Model) -> Callable[[pathlib.Path], None]:
    return lambda path: save_model(model, path)
