"""Whether equality saturation would find what the rewrites of ``-O2`` leave in element-wise islands.

``python -m benchmarks.saturation FOLDER [--models …] [--json FILE]``, with exports of the reference models as
``FOLDER/NAME/*.onnx`` (``python -m benchmarks.portable --work FOLDER`` makes them in ``FOLDER/models``).

Every connected set of element-wise arithmetic of the optimized model goes into an e-graph, where commutativity,
associativity, distributivity and the inverse operations are applied until nothing new comes or a limit is reached. The
cheapest form of each result is then compared with what was there, by arithmetic on elements: what is constant is free,
and broadcasting makes early operators cheaper than late ones. No times: an upper bound of what could be saved.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import pathlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

import mmopt
from benchmarks.models import chosen
from benchmarks.zoo import ZOO
from mmopt.analysis.cost import analyze_cost
from mmopt.analysis.operators import UNARY
from mmopt.analysis.shapes import infer_shapes
from mmopt.errors import MmoptError
from mmopt.ir.module import Module
from mmopt.pipeline.recipe import load_recipe
from mmopt.transforms.canonicalize.editing import is_onnx, tensor_of

BINARY = ("Add", "Sub", "Mul", "Div")
WORK = {**dict.fromkeys(("Add", "Sub", "Mul", "Neg", "Abs", "Relu", "Clip"), 1), "Div": 4, "Reciprocal": 4, "leaf": 0}
DEAR = 10
"""Arithmetic of one element of any other operator: exponential, error function, root, …"""

MAX_ENTRIES = 2_000
"""Entries of an e-graph after which no rule is applied any more."""

Shape = tuple[int, ...]
Entry = tuple[str, tuple[int, ...]]


@dataclasses.dataclass
class Graph:
    """An e-graph: classes of equal expressions, each a set of entries ``(operator, classes of its operands)``."""

    parents: list[int] = dataclasses.field(default_factory=list)
    entries: dict[Entry, int] = dataclasses.field(default_factory=dict)
    shapes: dict[int, Shape] = dataclasses.field(default_factory=dict)
    constant: set[int] = dataclasses.field(default_factory=set)

    def find(self, number: int) -> int:
        """The class that ``number`` is part of now."""
        while self.parents[number] != number:
            number = self.parents[number]
        return number

    def add(self, op_type: str, operands: Sequence[int], shape: Shape | None = None) -> int:
        """The class of an expression; a new one where it is new."""
        entry = (op_type, tuple(self.find(operand) for operand in operands))
        if entry in self.entries:
            return self.find(self.entries[entry])
        number = len(self.parents)
        self.parents.append(number)
        self.entries[entry] = number
        self.shapes[number] = np.broadcast_shapes(*(self.shapes[o] for o in entry[1])) if shape is None else shape
        if operands and all(operand in self.constant for operand in entry[1]):
            self.constant.add(number)
        return number

    def merge(self, left: int, right: int) -> None:
        """Two expressions are equal."""
        left, right = self.find(left), self.find(right)
        if left == right or self.shapes[left] != self.shapes[right]:
            return
        self.parents[right] = left
        if right in self.constant:
            self.constant.add(left)

    def rebuild(self) -> None:
        """Let entries name the classes as they are now; equal entries make their classes equal."""
        changed = True
        while changed:
            changed = False
            fresh: dict[Entry, int] = {}
            for (op_type, operands), number in list(self.entries.items()):
                entry = (op_type, tuple(self.find(operand) for operand in operands))
                if entry in fresh and self.find(fresh[entry]) != self.find(number):
                    self.merge(fresh[entry], number)
                    changed = True
                fresh[entry] = self.find(number)
            self.entries = fresh

    def by_class(self) -> dict[int, list[Entry]]:
        """Entries of every class."""
        found: dict[int, list[Entry]] = collections.defaultdict(list)
        for entry, number in self.entries.items():
            found[self.find(number)].append(entry)
        return found


Operands = tuple[int, ...]


class Rules:
    """All pairs of classes that one application of a rule shows to be equal.

    Args:
        graph: Where to apply them; new expressions are added to it.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph, self.classes = graph, graph.by_class()

    def pairs(self) -> Iterator[tuple[int, int]]:
        """One round over the entries that there are now."""
        for (op_type, operands), number in list(self.graph.entries.items()):
            if rule := getattr(self, op_type.lower(), None) if op_type in (*BINARY, "Neg") else None:
                for other in rule(*operands):
                    yield number, other

    def _of(self, number: int, op_type: str) -> list[Operands]:
        return [operands for name, operands in self.classes.get(self.graph.find(number), ()) if name == op_type]

    def _associative(self, op_type: str, a: int, b: int) -> Iterator[int]:
        yield self.graph.add(op_type, (b, a))
        for c, d in self._of(a, op_type):
            yield self.graph.add(op_type, (c, self.graph.add(op_type, (d, b))))

    def add(self, a: int, b: int) -> Iterator[int]:
        """c d + c f = c (d + f)."""
        yield from self._associative("Add", a, b)
        for c, d in self._of(a, "Mul"):
            for e, f in self._of(b, "Mul"):
                if c == e:
                    yield self.graph.add("Mul", (c, self.graph.add("Add", (d, f))))

    def mul(self, a: int, b: int) -> Iterator[int]:
        """a (c + d) = a c + a d."""
        yield from self._associative("Mul", a, b)
        for c, d in self._of(b, "Add"):
            yield self.graph.add("Add", (self.graph.add("Mul", (a, c)), self.graph.add("Mul", (a, d))))

    def sub(self, a: int, b: int) -> Iterator[int]:
        """a - b = a + (-b)."""
        yield self.graph.add("Add", (a, self.graph.add("Neg", (b,))))

    def div(self, a: int, b: int) -> Iterator[int]:
        """a / b = a (1 / b)."""
        yield self.graph.add("Mul", (a, self.graph.add("Reciprocal", (b,))))

    def neg(self, a: int) -> Iterator[int]:
        """-(a b) = (-a) b."""
        for c, d in self._of(a, "Mul"):
            yield self.graph.add("Mul", (self.graph.add("Neg", (c,)), d))


def saturate(graph: Graph) -> bool:
    """Apply rules until nothing changes; False when the graph grew too large before."""
    while len(graph.entries) <= MAX_ENTRIES:
        before = (len(graph.entries), len({graph.find(n) for n in graph.entries.values()}))
        for left, right in Rules(graph).pairs():
            graph.merge(left, right)
            if len(graph.entries) > 2 * MAX_ENTRIES:
                break
        graph.rebuild()
        if before == (len(graph.entries), len({graph.find(n) for n in graph.entries.values()})):
            return True
    return False


def work(op_type: str, shape: Shape) -> float:
    """Arithmetic of one operator."""
    return float(np.prod(shape, dtype=np.float64)) * WORK.get(op_type.split(" ")[0], DEAR)


def cheapest(graph: Graph) -> dict[int, tuple[float, Entry | None]]:
    """For every class the entry with the least arithmetic below it."""
    best: dict[int, tuple[float, Entry | None]] = {number: (0.0, None) for number in map(graph.find, graph.constant)}
    changed = True
    while changed:
        changed = False
        for entry, number in graph.entries.items():
            here = graph.find(number)
            below = [best.get(graph.find(operand)) for operand in entry[1]]
            if here in map(graph.find, graph.constant) or any(found is None for found in below):
                continue
            cost = work(entry[0], graph.shapes[here]) + sum(found[0] for found in below if found is not None)
            if here not in best or cost < best[here][0]:
                best[here], changed = (cost, entry), True
    return best


def total(graph: Graph, roots: Iterable[int], best: dict[int, tuple[float, Entry | None]]) -> float:
    """Arithmetic of the chosen forms, what several results share counted once."""
    seen: set[int] = set()
    todo, cost = [graph.find(root) for root in roots], 0.0
    while todo:
        number = todo.pop()
        entry = best[number][1]
        if number in seen or entry is None:
            continue
        seen.add(number)
        cost += work(entry[0], graph.shapes[number])
        todo += [graph.find(operand) for operand in entry[1]]
    return cost


def islands(module: Module) -> Iterator[list[ir.Node]]:
    """Connected sets of at least two element-wise operators, in order."""
    facts = infer_shapes(module.model)

    def fits(node: ir.Node) -> bool:
        shape = facts.shape(node.outputs[0])
        known = shape is not None and all(isinstance(size, int) for size in shape)
        return known and is_onnx(node, *BINARY, *UNARY) and len(node.inputs) == (2 if is_onnx(node, *BINARY) else 1)

    for graph in module.model.graphs():
        left = {node for node in graph if fits(node)}
        for node in list(graph):
            found, todo = [], [node] if node in left else []
            left.discard(node)
            while todo:
                found.append(todo.pop())
                near = [value.producer() for value in found[-1].inputs if value is not None]
                for other in (*near, *(user for user, _ in found[-1].outputs[0].uses())):
                    if other in left:
                        left.discard(other)
                        todo.append(other)
            if len(found) > 1:
                members = set(found)
                yield [member for member in graph if member in members]


@dataclasses.dataclass
class Found:
    """What became of the islands of one model."""

    islands: int = 0
    nodes: int = 0
    given_up: int = 0
    improved: int = 0
    work: float = 0.0
    saved: float = 0.0
    flops: float = 0.0


def examine(module: Module) -> Found:
    """Saturate every island of an optimized module."""
    facts, found = infer_shapes(module.model), Found()
    for nodes in islands(module):
        members, graph, classes = set(nodes), Graph(), dict[ir.Value, int]()
        before = 0.0
        for node in nodes:
            for value in node.inputs:
                if value is not None and value not in classes:
                    shape = tuple(size for size in facts.shape(value) or () if isinstance(size, int))
                    classes[value] = graph.add(f"leaf {len(classes)}", (), shape)
                    if tensor_of(value) is not None:
                        graph.constant.add(classes[value])
            result = node.outputs[0]
            # Attributes are part of what an operator of one input computes.
            name = node.op_type + "".join(f" {key}={a.value}" for key, a in sorted(node.attributes.items()))
            classes[result] = graph.add(name, [classes[v] for v in node.inputs if v is not None])
            before += work(node.op_type, graph.shapes[classes[result]])
        roots = [
            classes[node.outputs[0]]
            for node in nodes
            if node.outputs[0].is_graph_output() or any(user not in members for user, _ in node.outputs[0].uses())
        ]
        found.given_up += not saturate(graph)
        after = total(graph, roots, cheapest(graph))
        found.islands, found.nodes, found.work = found.islands + 1, found.nodes + len(nodes), found.work + before
        if after < before:
            found.improved, found.saved = found.improved + 1, found.saved + before - after
    flops = analyze_cost(module).flops
    found.flops = float(flops) if isinstance(flops, int) else 0.0
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; gives 0, or the exit code of an error."""
    options = _parser().parse_args(arguments)
    results: dict[str, Any] = {}
    recipe = load_recipe("o2")
    recipe = dataclasses.replace(recipe, phases=tuple(phase for phase in recipe.phases if phase.name != "fuse"))
    print("| model | islands | operators | improved | arithmetic saved | of all FLOPs | not saturated |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    try:
        for name in chosen(options.models, ZOO, "--models"):
            paths = sorted((options.folder / name).rglob("*.onnx"))
            if not paths:
                print(f"{name}: not in {options.folder}", file=sys.stderr)
                continue
            module = mmopt.optimize(mmopt.load(paths[0]), recipe=recipe, validate="off").module
            found = examine(module)
            results[name] = dataclasses.asdict(found)
            share, whole = (found.saved / base if base else 0.0 for base in (found.work, found.flops))
            cells = (found.islands, found.nodes, found.improved, f"{share:.2%}", f"{whole:.4%}", found.given_up)
            print(f"| {name} | {' | '.join(map(str, cells))} |", flush=True)
    except MmoptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if options.json is not None:
        options.json.write_text(json.dumps({"schema_version": 1, "models": results}, indent=1) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.saturation", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=pathlib.Path, metavar="FOLDER", help="exports, a folder for each model")
    parser.add_argument("--models", default="", metavar="NAMES", help="with commas; default: the whole zoo")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the figures as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
