"""The kernels of a model for any choice of parameters: the model is lowered again with that choice.

So a candidate is measured as the model will use it, with its fused epilogue and its real operands, and a template needs
nothing but its list of candidates to be tuned.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Mapping
from typing import Any

import tvm

from mmopt.autotune.database import Parameters, identity
from mmopt.autotune.space import Space
from mmopt.backends.cpu.choosing import Chooser, plausible, plausible_size
from mmopt.backends.cpu.emit import Kernel
from mmopt.backends.profile import Profile
from mmopt.ir.module import Module
from mmopt.lowering.compiler import CompileOptions
from mmopt.lowering.partition import partition
from mmopt.lowering.program import ProgramBuilder
from mmopt.lowering.values import ConstantSource

MOST_KERNELS = 4
"""Kernels of one workload (with different epilogues) that are measured."""


@dataclasses.dataclass(frozen=True)
class KernelCode:
    """One kernel, ready for code generation in another process.

    Attributes:
        function: The TIR function as JSON.
        arguments: What it takes, as :mod:`mmopt.autotune.measuring` describes it.
        calls: Calls in one run of the model.
    """

    function: str
    arguments: list[dict[str, Any]]
    calls: int


class LoweredModel:
    """Kernels by workload and candidate.

    Args:
        modules: Entry points by name.
        profile: What to compile for.

    Attributes:
        spaces: The workloads there are to tune, by key.
        rounds: How often the model has been lowered.
    """

    def __init__(self, modules: Mapping[str, Module], profile: Profile) -> None:
        self._modules, self._profile = modules, profile
        self._kernels: dict[str, dict[str, list[KernelCode]]] = {}
        self.spaces: dict[str, Space] = {}
        self.rounds = 0
        self._lower({})

    def kernels(self, workload: str, parameters: Parameters) -> list[KernelCode]:
        """The kernels that compute ``workload`` with ``parameters``; empty when lowering leads elsewhere with them."""
        wanted = identity(parameters)
        if wanted not in self._kernels[workload]:
            others = {key: next(self._unseen(space), None) for key, space in self.spaces.items()}
            self._lower({key: p for key, p in {**others, workload: parameters}.items() if p is not None})
        return self._kernels[workload].get(wanted, [])

    def _unseen(self, space: Space) -> Any:
        seen = self._kernels[space.workload.key()]
        ordered = sorted(space.candidates, key=lambda candidate: candidate.cycles)
        return (c.parameters for c in ordered if identity(c.parameters) not in seen)

    def _lower(self, forced: Mapping[str, Parameters]) -> None:
        chooser = Chooser(lambda workload: forced.get(workload.key()))
        builder = ProgramBuilder(self._profile, chooser)
        for name, module in self._modules.items():
            partition(module, name, builder, CompileOptions())
        builder.module()  # leaves the records of the kernels that are used
        self.rounds += 1
        found: dict[str, list[KernelCode]] = {}
        for record in builder.kernels.values():
            if "workload" in record and len(found.setdefault(record["workload"], [])) < MOST_KERNELS:
                found[record["workload"]].append(_code(builder.built[record["name"]], record["calls"]))
        for choice in chooser.choices():
            key = choice.workload.key()
            if key in found:
                space = self.spaces.setdefault(key, Space.of(choice))
                space.calls = space.calls or sum(code.calls for code in found[key])
                self._kernels.setdefault(key, {}).setdefault(identity(choice.chosen.parameters), found[key])
        # The packed weights are as large as the model, and parts of the compiler that refer to each other hold them.
        del builder
        gc.collect()


def _code(kernel: Kernel, calls: int) -> KernelCode:
    sizes = {symbol: plausible_size(str(symbol.name)) for symbol in kernel.symbols}
    arguments: list[dict[str, Any]] = []
    for source in kernel.sources:
        role = "weight" if isinstance(source, ConstantSource) else "input"
        arguments.append({"role": role, "dtype": source.dtype, "shape": [plausible(d, sizes) for d in source.shape]})
    arguments += [{"symbol": size} for size in sizes.values()]
    for output in kernel.outputs:
        shape = [plausible(d, sizes) for d in output.shape]
        arguments.append({"role": "output", "dtype": output.dtype, "shape": shape})
    function = kernel.function.with_attr("global_symbol", "kernel")
    return KernelCode(tvm.ir.save_json(function), arguments, calls)
