"""The driver of local rewrite rules: a worklist, so that a rule is tried again only where something changed."""

from __future__ import annotations

import abc
import collections
import dataclasses
from collections.abc import Callable, Iterable, Sequence

import onnx_ir as ir

from mmopt.analysis.shape_facts import own_type
from mmopt.analysis.shape_rules import Shape
from mmopt.analysis.shapes import Fact, ShapeFacts, infer_shapes
from mmopt.errors import PassError
from mmopt.ir.module import Module
from mmopt.pipeline.base import Pass, PassContext
from mmopt.transforms.canonicalize import editing

_REWRITES_PER_NODE = 8
"""A rule that settles fires a few times a node at most; beyond this it is going round in circles."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """One rewrite.

    Attributes:
        name: Kebab-case; stands in remarks and in the error about a rule that does not settle.
        op_types: Operators of the default domain it starts from.
        apply: Rewrites the node and returns True, or returns False having changed nothing.
    """

    name: str
    op_types: tuple[str, ...]
    apply: Callable[[ir.Node, Rewriter], bool]


class Rewriter:
    """Applies rules to a module until none fires; rules change the graph through its methods only.

    Args:
        module: The module.
        rules: What to apply; for one node in this order.
        facts: Shapes of the module's values, when somebody inferred them already.
    """

    def __init__(self, module: Module, rules: Iterable[Rule], facts: ShapeFacts | None = None) -> None:
        self._model = module.model
        self._facts, self._names = facts, None if facts is None else editing.Names(module.model)
        self._rules: dict[str, list[Rule]] = {}
        for rule in rules:
            for op_type in rule.op_types:
                self._rules.setdefault(op_type, []).append(rule)
        self._queue: collections.deque[ir.Node] = collections.deque()
        self._queued: set[ir.Node] = set()
        self.fired: collections.Counter[str] = collections.Counter()
        self.missed: list[tuple[str, str]] = []

    @property
    def facts(self) -> ShapeFacts:
        """Inferred shapes; computed when the first rule asks."""
        if self._facts is None:
            self._facts = infer_shapes(self._model)
        return self._facts

    @property
    def names(self) -> editing.Names:
        """The supply of fresh names."""
        if self._names is None:
            self._names = editing.Names(self._model)
        return self._names

    def opset(self, node: ir.Node) -> int:
        """Opset version that ``node`` follows."""
        return int(node.version or self._model.opset_imports.get(node.domain, 1))

    def shape(self, value: ir.Value | None) -> Shape:
        """Inferred shape of ``value``."""
        return None if value is None else self.facts.shape(value)

    def dtype(self, value: ir.Value | None) -> ir.DataType | None:
        """Element type of ``value``; the annotation is a contract in ONNX, so no inference is run for it."""
        if value is None:
            return None
        kind = value.type if value.type is not None else self.facts.type(value)
        return kind.dtype if isinstance(kind, ir.TensorType) else None

    def same_shape(self, a: ir.Value | None, b: ir.Value | None) -> bool:
        """Whether two values certainly have the same shape."""
        left, right = self.shape(a), self.shape(b)
        return left is not None and None not in left and left == right

    def replace(self, node: ir.Node, new: ir.Value) -> bool:
        """Let ``new`` stand for the only used output of ``node`` and drop the node.

        Where a graph output must keep a node of its own, an ``Identity`` takes the place of ``node``.

        Returns:
            False, with nothing changed, when ``node`` is that ``Identity`` already or another output is in use.
        """
        old = node.outputs[0]
        if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
            return False
        if not editing.can_replace(old, new):
            if editing.is_onnx(node, "Identity"):
                return False
            new = self.emit("Identity", [new], node, like=old).outputs[0]
        self._touch_users(old)
        known = None if self._facts is None else _merged(self._facts.fact(new), self._facts.fact(old))
        editing.replace(old, new)
        if self._facts is not None and known is not None:
            self._facts.set(new, known)
        self.drop(node)
        self._touch(new.producer())
        return True

    def drop(self, node: ir.Node) -> None:
        """Erase a node that nobody needs."""
        read = [value for value in node.inputs if value is not None]
        self._queued.discard(node)
        editing.erase([node])
        for value in read:
            self._lost_user(value)

    def emit(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        before: ir.Node,
        *,
        like: ir.Value | None = None,
        attributes: Sequence[ir.Attr] = (),
    ) -> ir.Node:
        """A new node of the default domain with one output, put before the node it will replace.

        Args:
            op_type: The operator.
            inputs: Its inputs.
            before: The node whose place and name it takes.
            like: A value of the same type and shape as the output.
            attributes: Its attributes.
        """
        node = editing.new_node(op_type, inputs, before, self.names, attributes)
        if like is not None:
            node.outputs[0].type = None if like.type is None else own_type(like.type)
            node.outputs[0].shape = None if like.shape is None else like.shape.copy()
            if self._facts is not None:
                self._facts.set(node.outputs[0], self._facts.fact(like))
        self._touch(node)
        return node

    def set_input(self, node: ir.Node, index: int, value: ir.Value | None) -> None:
        """Change what ``node`` reads."""
        old = node.inputs[index]
        node.replace_input_with(index, value)
        if old is not None:
            self._lost_user(old)
        if value is not None:
            self._touch(value.producer())
        self.changed(node)

    def changed(self, node: ir.Node) -> None:
        """Have ``node`` and its users looked at again."""
        self._touch(node)
        for output in node.outputs:
            self._touch_users(output)

    def miss(self, node: ir.Node, reason: str) -> bool:
        """Note why a rule did not fire on ``node``; returns False."""
        self.missed.append((node.name or "", reason))
        return False

    def run(self) -> bool:
        """Apply the rules until none fires.

        Raises:
            PassError: They do not settle; names the rule that fires most.
        """
        for graph in self._model.graphs():
            for node in graph:
                self._touch(node)
        limit = _REWRITES_PER_NODE * len(self._queue) + 64
        while self._queue:
            node = self._queue.popleft()
            if node not in self._queued:
                continue
            self._queued.discard(node)
            self._visit(node)
            if self.fired.total() > limit:
                name, count = self.fired.most_common(1)[0]
                raise PassError(
                    f"rewriting does not settle: rule {name!r} fired {count} times, last on {node.op_type}",
                    where=str(node.name),
                    hint="leave this pass out, and report the model: two of its rules undo each other",
                )
        return bool(self.fired)

    def _visit(self, node: ir.Node) -> None:
        if node.graph is None or not editing.is_onnx(node, node.op_type):
            return
        for rule in self._rules.get(node.op_type, ()):
            if rule.apply(node, self):
                self.fired[rule.name] += 1
                if node.graph is not None:
                    self._touch(node)
                return

    def _touch(self, node: ir.Node | None) -> None:
        if node is not None and node.op_type in self._rules and node not in self._queued:
            self._queued.add(node)
            self._queue.append(node)

    def _lost_user(self, value: ir.Value) -> None:
        """Have those looked at again who may do more with a value that fewer read: its producer and an only user."""
        self._touch(value.producer())
        if len(value.uses()) == 1:
            self._touch_users(value)

    def _touch_users(self, value: ir.Value) -> None:
        for user, _ in value.uses():
            self._touch(user)


def _merged(fact: Fact, other: Fact) -> Fact:
    """``fact`` with what only ``other``, a fact about the same tensor, knows."""
    shape = fact.shape
    if shape is None:
        shape = other.shape
    elif other.shape is not None and len(other.shape) == len(shape):
        shape = tuple(b if a is None else a for a, b in zip(shape, other.shape, strict=True))
    elements = fact.elements if fact.elements is not None else other.elements
    return Fact(shape, elements, fact.type if fact.type is not None else other.type)


@dataclasses.dataclass(frozen=True)
class RulePass(Pass):
    """A pass that consists of local rules."""

    @abc.abstractmethod
    def rules(self) -> tuple[Rule, ...]:
        """The rules; for one node they are tried in this order."""

    def run(self, module: Module, context: PassContext) -> bool:
        """Apply the rules until none fires."""
        rewriter = Rewriter(module, self.rules())
        changed = rewriter.run()
        report(self, rewriter, context)
        return changed


def report(pass_: Pass, rewriter: Rewriter, context: PassContext) -> None:
    """Leave one remark a rule that fired, and one a node that a rule had to leave alone."""
    for name, count in sorted(rewriter.fired.items()):
        pass_.remark(context, "applied", "", f"{name}: {count} {'place' if count == 1 else 'places'}.")
    for node, reason in dict.fromkeys(rewriter.missed):
        pass_.remark(context, "missed", node, reason)
