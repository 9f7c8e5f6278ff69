"""Helpers for tests of axes: small graphs from text with random weights, and one check of all groups."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from mmopt.analysis.axes import Group, find_groups
from mmopt.ir.evaluate import ReferenceRunner
from mmopt.ir.module import Module
from mmopt.ir.verify import verify
from mmopt.transforms.prune.masking import mask_units
from mmopt.transforms.prune.proof import difference
from mmopt.transforms.prune.slicing import slice_units
from tests.canonical import module_from

BOUND = 1e-5


@dataclasses.dataclass(frozen=True)
class Case:
    """A graph and the groups it must have.

    Attributes:
        nodes: The nodes, as ONNX's text form has them.
        weights: Shape of every random float weight, by name.
        groups: Kind and number of units of the groups that can be cut, in any order.
        x: Type of the input ``x``.
        y: Type of the output ``y``.
        numbers: Integer constants by name.
        more: Further inputs.
    """

    nodes: str
    weights: Mapping[str, tuple[int, ...]]
    groups: Sequence[tuple[str, int]]
    x: str = "float[2, 5, 6]"
    y: str = "float[2, 5, 3]"
    numbers: Mapping[str, Sequence[int] | int] = dataclasses.field(default_factory=dict)
    more: str = ""

    def module(self, opset: int = 23, seed: int = 0) -> Module:
        """The module."""
        random = np.random.default_rng(seed)
        arrays = {name: random.normal(0, 0.5, shape).astype(np.float32) for name, shape in self.weights.items()}
        arrays |= {name: np.abs(array) for name, array in arrays.items() if name.startswith("positive")}
        arrays |= {name: np.array(numbers, dtype=np.int64) for name, numbers in self.numbers.items()}
        return with_weights(f"g ({self.x} x{self.more}) => ({self.y} y) {{ {self.nodes} }}", arrays, opset)


def with_weights(text: str, arrays: Mapping[str, np.ndarray[Any, Any]], opset: int = 23) -> Module:
    """A graph from text in which ``arrays`` are initializers."""
    head, bracket, rest = text.partition("(")
    kinds = {"float32": "float", "int64": "int64", "int8": "int8", "bool": "bool"}
    declared = [f"{kinds[a.dtype.name]}{list(a.shape) if a.ndim else ''} {name}" for name, a in arrays.items()]
    inputs, bracket_end, tail = rest.partition(")")
    everything = ", ".join([part for part in [inputs] if part.strip()] + declared)
    module = module_from(f"{head}{bracket}{everything}{bracket_end}{tail}", opset=opset)
    graph = module.graph
    for value in [v for v in graph.inputs if v.name in arrays]:
        graph.inputs.remove(value)
        value.const_value = ir.tensor(arrays[str(value.name)], name=value.name)
        graph.register_initializer(value)
    for position, node in enumerate(graph):
        node.name = node.name or f"{node.op_type}_{position}"
    return module


def free(groups: Sequence[Group]) -> list[Group]:
    """Those that can be cut."""
    return [group for group in groups if not group.frozen]


def feeds(module: Module, seed: int = 0) -> dict[str, Any]:
    """Seeded inputs; dimensions with a name are 3, whole numbers are 0 or 1."""
    random = np.random.default_rng(seed)
    result: dict[str, Any] = {}
    for value in module.graph.inputs:
        shape = [dim if isinstance(dim, int) else 3 for dim in value.shape or ()]
        whole = value.dtype is not None and not value.dtype.is_floating_point()
        array = random.integers(0, 2, shape) if whole else random.standard_normal(shape)
        result[str(value.name)] = array.astype(value.dtype.numpy() if value.dtype else np.float32)
    return result


def some(group: Group, random: np.random.Generator, share: float = 0.3) -> list[int]:
    """Units to keep when about ``share`` of them go, at least one."""
    count = max(1, group.units - max(1, round(share * group.units)))
    return sorted(random.choice(group.units, count, replace=False).tolist())


def check_cuts(module: Module, seed: int = 0, *, moves: bool = True) -> tuple[Group, ...]:
    """Cut every group alone and all of them together: slice equals mask, and is a valid model.

    Args:
        module: The module; it stays as it is.
        seed: Seed of units and inputs.
        moves: Whether masking everything must change some output, so that equality says something.
    """
    groups, random, inputs = find_groups(module), np.random.default_rng(seed), feeds(module, seed)
    keep = {group.name: some(group, random) for group in free(groups)}
    with ReferenceRunner(threads=1) as runner:
        for choice in [{name: units} for name, units in keep.items()] + [keep]:
            sliced, masked = module.clone(), module.clone()
            assert slice_units(sliced, groups, choice) is bool(choice)
            mask_units(masked, groups, choice)
            assert [p for p in verify(sliced) if p.severity == "error"] == []
            assert sliced.signature() == module.signature()
            got, want = runner.run(sliced, inputs), runner.run(masked, inputs)
            error = max(difference(got[name], want[name]) for name in want)
            assert error <= BOUND, (choice, error)
        original = runner.run(module, inputs)
        assert not moves or max(difference(want[name], original[name]) for name in want) > 1e-4
    return groups
