"""Takes whole residual branches out, those that the outputs miss least.

x + f(x)        →        x + mean of f(x)

What is left of a branch is a constant, and what only it needed is gone.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from mmopt.analysis import dims
from mmopt.analysis.cost import analyze_cost
from mmopt.analysis.shapes import infer_shapes
from mmopt.errors import UserError
from mmopt.ir.evaluate import ReferenceRunner
from mmopt.ir.module import Module
from mmopt.pipeline.base import Fidelity, Pass, PassContext
from mmopt.transforms.canonicalize.editing import drop_unused, erase, is_onnx, new_initializer
from mmopt.transforms.prune import budgets, costs
from mmopt.transforms.prune.observing import batches_of, stream
from mmopt.transforms.prune.reference import remember
from mmopt.transforms.prune.sensitivity import SAMPLES, Sensitivity

Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True)
class Branch:
    """One residual branch.

    Attributes:
        join: Name of the first output of the Add where it comes back.
        operand: Which input of the Add it is.
        value: Name of its result.
        nodes: Names of the nodes that nothing else needs.
        axis: The axis of its result that holds features: the second one of what a convolution makes, else the last.
        tower: The tower it lies in, or None.
    """

    join: str
    operand: int
    value: str
    nodes: tuple[str, ...]
    axis: int
    tower: str | None


@dataclasses.dataclass(frozen=True)
class PruneBlocks(Pass):
    """Take whole residual branches out (``x + f(x)`` becomes ``x`` and a constant): a share of the arithmetic at most.

    Attributes:
        share: Share of the multiply-accumulates of the model that is to go, at most.
        include: Patterns of names of the tensors that branches make; all when empty.
        exclude: Patterns of names to leave alone.
        samples: Calibration samples for the means; 0 for all.
    """

    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY

    share: str = "20%"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    samples: int = 0

    def run(self, module: Module, context: PassContext) -> bool:
        """Take branches out, the least damage for what is saved first, and remember what the module was.

        Raises:
            UserError: No samples, or a share that is none.
        """
        share = budgets.share(self.share, f"{self.name}, share")
        if context.inputs is None:
            raise UserError(
                "what a branch does is only seen on samples", where=self.name, hint="give some with --calib"
            )
        branches = [branch for branch in residual_branches(module) if self._wants(branch)]
        if not branches:
            self.remark(context, "missed", "", "there is no residual branch that only its sum needs.")
            return False
        cost, total = _macs(module, branches, context.inputs)
        batches = batches_of(module, context.inputs, most=self.samples)
        with ReferenceRunner(seed=context.seed) as runner:
            means = _means(module, branches, batches, runner)
            some = batches_of(module, context.inputs, most=SAMPLES)
            sensitivity = Sensitivity(module, (), some, runner)
            damage = {
                branch: sensitivity.moved_by(lambda cut, b=branch: _take_out(cut, [b], means), branch.tower)  # type: ignore[misc]
                for branch in branches
            }
        gone = _chosen(branches, damage, cost, share * total)
        if not gone:
            self.remark(context, "missed", "", f"every branch computes more than {share:.0%} of the model.")
            return False
        original = module.clone()
        _take_out(module, gone, means)
        remember(module, original)
        for branch in gone:
            self.remark(context, "applied", branch.value, f"a branch of {cost[branch] / total:.1%} of the arithmetic.")
        saved = sum(cost[branch] for branch in gone) / total
        self.remark(
            context, "applied", "", f"took out {len(gone)} of {len(branches)} branches; less macs: {saved:.0%}."
        )
        return True

    def _wants(self, branch: Branch) -> bool:
        if self.include and not any(fnmatch.fnmatchcase(branch.value, pattern) for pattern in self.include):
            return False
        return not any(fnmatch.fnmatchcase(branch.value, pattern) for pattern in self.exclude)


def residual_branches(module: Module) -> list[Branch]:
    """Branches of the main graph: what is added to what it was made from, has its shape, and is needed nowhere else.

    Args:
        module: The module.
    """
    facts, owner = infer_shapes(module.model), costs.owners(module)
    found = []
    for node in module.graph:
        if not is_onnx(node, "Add") or node.inputs[0] is None or node.inputs[1] is None:
            continue
        for operand in (0, 1):
            value, trunk = node.inputs[operand], node.inputs[1 - operand]
            assert value is not None
            assert trunk is not None
            shape = facts.shape(value)
            if shape is None or not shape or shape != facts.shape(trunk) or value.is_graph_output():
                continue
            nodes = _only_for(value, node)
            kind = value.type if value.type is not None else facts.type(value)
            if nodes and _reads(nodes, trunk) and kind == ir.TensorType(ir.DataType.FLOAT):
                axis = 1 if _ends_in_convolution(nodes) else len(shape) - 1
                names = tuple(str(one.name) for one in nodes)
                join, tower = str(node.outputs[0].name), owner.get(str(node.name))
                found.append(Branch(join, operand, str(value.name), names, axis, tower))
                break
    return found


def _only_for(value: ir.Value, reader: ir.Node) -> list[ir.Node]:
    """The nodes that nothing needs but ``reader`` by way of ``value``, the last one first."""
    gone: dict[ir.Node, None] = {}
    pending = [value.producer()]
    while pending:
        node = pending.pop(0)
        if node is None or node in gone:
            continue
        readers = {use.node for output in node.outputs for use in output.uses()}
        allowed = {*gone, reader} if value in node.outputs else set(gone)
        if any(output.is_graph_output() for output in node.outputs) or not readers <= allowed:
            continue
        gone[node] = None
        pending += [read.producer() for read in node.inputs if read is not None]
    return list(gone)


def _reads(nodes: Sequence[ir.Node], trunk: ir.Value) -> bool:
    """Whether the trunk feeds these nodes, and is not made by them."""
    if trunk.producer() in nodes:
        return False
    inside = {output for node in nodes for output in node.outputs}
    pending = [read for node in nodes for read in node.inputs if read is not None and read not in inside]
    seen: set[ir.Value] = set()
    while pending:
        value = pending.pop()
        if value is trunk:
            return True
        producer = value.producer()
        # What branches and others share (a norm, a mask) lies between them and the trunk.
        if value not in seen and producer is not None and value.producer() is not trunk.producer():
            seen.add(value)
            pending += [read for read in producer.inputs if read is not None]
    return False


def _ends_in_convolution(nodes: Sequence[ir.Node]) -> bool:
    products = (node for node in nodes if node.op_type in ("Conv", "ConvTranspose", "MatMul", "Gemm"))
    last = next(products, None)
    return last is not None and last.op_type in ("Conv", "ConvTranspose")


def _macs(
    module: Module, branches: Sequence[Branch], samples: Mapping[str, Array]
) -> tuple[dict[Branch, float], float]:
    """Multiply-accumulates of each branch, and of the model."""
    report, binding = analyze_cost(module), costs.binding_of(module, samples)

    def count(name: str) -> float:
        macs = report.nodes[name].macs if name in report.nodes else None
        if macs is None:
            return 0.0
        return float(dims.evaluate(macs, {**dict.fromkeys(dims.symbols(macs), 1), **binding}))

    return {b: sum(map(count, b.nodes)) for b in branches}, sum(map(count, report.nodes))


def _means(
    module: Module, branches: Sequence[Branch], batches: Sequence[Mapping[str, Array]], runner: ReferenceRunner
) -> dict[Branch, Array]:
    """The mean of what each branch makes, shaped so that it broadcasts."""
    totals = {branch: np.zeros(()) for branch in branches}
    for values in stream(module, list({branch.value for branch in branches}), batches, runner):
        for branch in branches:
            array = values[branch.value].astype(np.float64)
            others = tuple(axis for axis in range(array.ndim) if axis != branch.axis)
            totals[branch] = totals[branch] + array.mean(axis=others, keepdims=True) / len(batches)
    return {branch: total.astype(np.float32) for branch, total in totals.items()}


def _chosen(
    branches: Sequence[Branch], damage: Mapping[Branch, float], cost: Mapping[Branch, float], budget: float
) -> list[Branch]:
    """Branches of the least damage for what they save, while they fit into ``budget``."""
    found: list[Branch] = []
    for branch in sorted(branches, key=lambda one: damage[one] / max(cost[one], 1e-30)):
        if cost[branch] and sum(cost[one] for one in [*found, branch]) <= budget * (1 + 1e-9):
            found.append(branch)
    return found


def _take_out(module: Module, branches: Sequence[Branch], means: Mapping[Branch, Array]) -> None:
    """Put means where branches were, and drop what nothing needs any more, in place."""
    joins = {str(output.name): node for node in module.graph for output in node.outputs}
    for branch in branches:
        node, tensor = joins[branch.join], ir.tensor(means[branch])
        value = new_initializer(module.graph, tensor, f"{branch.value}_mean")
        node.replace_input_with(branch.operand, value)
    # What lies in one branch only is dead now; users come before what they use.
    named = {name for branch in branches for name in branch.nodes}
    for node in reversed(list(module.graph)):
        if str(node.name) in named:
            read = list(node.inputs)
            erase([node])
            for one in read:
                drop_unused(one)
