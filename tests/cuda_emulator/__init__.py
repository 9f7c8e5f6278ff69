"""Runs generated CUDA C++ on the CPU: the oracle for kernels on machines without a GPU.

The host code is the real one, the virtual machine too; only the kernels are compiled by g++, against ``emulator.h``,
and take the place of the CUDA module among the library's imports.
"""

from __future__ import annotations

import ctypes
import functools
import pathlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import tvm_ffi

from mmopt.backends.cpu.choosing import Chooser
from mmopt.backends.cuda.pipeline import Generated, generate, with_device_code
from mmopt.backends.profile import Profile, load_profile
from mmopt.ir.module import Module
from mmopt.lowering.compiler import CompileOptions
from mmopt.lowering.partition import Part, partition
from mmopt.lowering.program import ProgramBuilder
from mmopt.runtime.artifact import Segment
from mmopt.runtime.device import DeviceConverter, DeviceEngine
from mmopt.runtime.graphs import GraphRuntime
from mmopt.runtime.libraries import load_runtime
from mmopt.runtime.native import Machine
from mmopt.runtime.tensors import Converter

HEADER = pathlib.Path(__file__).with_name("graphs.h")
_KERNEL = re.compile(r'^extern "C" __global__ void (?:__launch_bounds__\(\d+\) )?(\w+)\((.*)\) \{$', re.MULTILINE)
_MEETING = ("__syncthreads", "__shfl", "__syncwarp", "mmopt_")

available = shutil.which("g++") is not None


def host_source(source: str) -> str:
    """Generated CUDA C++ as C++ for the host, with a function that TVM can call for every kernel."""
    kernels = list(_KERNEL.finditer(source))
    if not kernels:
        return f'#include "{HEADER}"\n'
    # Behind the bodies of one kernel comes the declaration of none: TVM declares all of them first.
    body = with_device_code(source)[source.index('extern "C" __global__') :]
    body = body.replace("__shared__ alignas(64)", "alignas(64) static")
    wrappers = []
    for number, kernel in enumerate(kernels):
        end = kernels[number + 1].start() if number + 1 < len(kernels) else len(source)
        text = source[kernel.end() : end]
        wrappers.append(_wrapper(kernel.group(1), kernel.group(2), any(word in text for word in _MEETING)))
    return f'#include "{HEADER}"\n' + body + "\n".join(wrappers)


def _wrapper(name: str, parameters: str, cooperative: bool) -> str:
    types = [p.rsplit(" ", 1)[0].replace("__restrict__", "").strip() for p in parameters.split(",") if p.strip()]
    values = ", ".join(f"p{n} = argument<{t}>(args[{n}])" for n, t in enumerate(types))
    names, count = ", ".join(f"p{n}" for n in range(len(types))), len(types)
    return f"""
extern "C" int __tvm_ffi_{name}(void*, const Argument* args, int32_t count, Argument*) {{
  unsigned extent[3] = {{1, 1, 1}};
  for (int n = {count}; n + 1 < count; ++n) extent[n - {count}] = argument<unsigned>(args[n]);
  emulator::submit({{extent[0], extent[1], extent[2]}}, argument<int>(args[count - 1]), {str(cooperative).lower()},
                   [{values}] {{ {name}({names}); }});
  return 0;
}}
"""


def kernels_library(source: str, folder: pathlib.Path) -> Any:
    """The kernels of ``source`` as a module of functions that run them."""
    text, library = folder / "kernels.cc", folder / "kernels.so"
    text.write_text(host_source(source))
    flags = ["-std=c++17", "-O1", "-w", "-ffp-contract=off", "-fno-strict-aliasing", "-shared", "-fPIC"]
    command = ["g++", *flags, str(text), "-o", str(library), tvm_ffi.libinfo.find_libtvm_ffi()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(f"the emulator does not take what was generated:\n{done.stderr[:4000]}")
    return tvm_ffi.load_module(str(library))


class Emulated:
    """Models compiled for a GPU, run on the CPU.

    Args:
        modules: The models by name; one is called ``main``.
        target: Name of a profile, or one.
        batched: Small kernels share launches.
        chooser: Picks the parameters of kernels; by prediction when None.
    """

    def __init__(
        self,
        modules: Module | Mapping[str, Module],
        target: str | Profile = "cuda-sm80",
        *,
        batched: bool = True,
        chooser: Chooser | None = None,
    ) -> None:
        self.modules = {"main": modules} if isinstance(modules, Module) else dict(modules)
        self.profile = load_profile(target) if isinstance(target, str) else target
        self.builder = ProgramBuilder(self.profile, chooser)
        self.parts: dict[str, list[Part]] = {}
        for name, module in self.modules.items():
            self.parts[name] = partition(module, name, self.builder, CompileOptions())
            lacking = [note for part in self.parts[name] if part.model is not None for note in part.notes]
            if lacking:
                raise AssertionError(f"parts of {name} have no kernels: {lacking}")
        kernels = list(self.builder.kernels)
        made = self.builder.module()
        self.generated: Generated = generate(made, self.profile, kernels, emulated=True, batched=batched)
        self._folder = tempfile.TemporaryDirectory(prefix="mmopt-emulator-")
        self._machine = self._loaded()

    def _loaded(self) -> Any:
        executable = self.generated.executable.mod
        if self.generated.source:
            kernels = kernels_library(self.generated.source, self.kernels.parent)
            (host,) = executable.imports
            host.clear_imports()
            host.import_module(kernels)
        machine = executable["vm_load_executable"]()
        machine["vm_initialization"](1, 0, 2)
        return machine

    @property
    def kernels(self) -> pathlib.Path:
        """The library of emulated kernels."""
        return pathlib.Path(self._folder.name, "kernels.so")

    def run(self, inputs: Mapping[str, np.ndarray], name: str = "main") -> dict[str, np.ndarray]:
        """All outputs of a model, by name."""
        values: dict[str, Any] = {key: np.asarray(array) for key, array in inputs.items()}
        for part in self.parts[name]:
            weights = [_aligned(self.builder.weights[self.builder.weight_key(s)]) for s in part.params]
            workspace = _aligned(np.zeros(self.generated.workspace, np.uint8))
            table = _aligned(np.array([0, workspace.ctypes.data, *(w.ctypes.data for w in weights)], np.int64))
            params = tvm_ffi.Array([_tensor(table), *map(_tensor, weights)])
            arguments = [_tensor(values[key]) for key in part.inputs]
            results = self._machine[part.name](*arguments, params)
            values.update(zip(part.outputs, [_array(r) for r in results], strict=True))
        return {str(v.name): values[str(v.name)] for v in self.modules[name].graph.outputs}


class EmulatedEngine(DeviceEngine):
    """The runtime's engine for GPUs, with the emulator for one: memory of the CPU, kernels and graphs emulated."""

    def __init__(self, emulated: Emulated) -> None:
        self._emulated = emulated
        super().__init__(pathlib.Path("lib.so"), emulated.builder.weights, 1)

    def _runtime(self, carried: Sequence[pathlib.Path]) -> tuple[ModuleType, Converter]:
        converter = DeviceConverter(load_runtime(carried))
        converter.device = tvm_ffi.device("cpu", 0)
        return tvm_ffi, converter

    def _load(self, library: pathlib.Path) -> Any:
        return self._emulated.generated.executable.mod

    def _machine(self) -> Machine:
        return Machine(self._load_vm())

    @functools.cached_property
    def _graphs(self) -> GraphRuntime:
        return GraphRuntime(ctypes.CDLL(str(self._emulated.kernels)))

    def segment(self, name: str = "main") -> Segment:
        """The one part that a model consists of, as an artifact would say it."""
        (part,) = self._emulated.parts[name]
        params = tuple(self._emulated.builder.weight_key(source) for source in part.params)
        made, found = self._emulated.generated, self._emulated.generated.repeatable.get(part.name)
        return Segment(
            "native",
            part.inputs,
            part.outputs,
            function=part.name,
            params=params,
            table=True,
            fresh=True,
            workspace=made.workspace,
            repeats=found is not None,
            order=found or (),
        )


def _array(tensor: Any) -> np.ndarray:
    """A copy of a tensor; bfloat16 is not among numpy's own types."""
    return Converter(tvm_ffi).to_numpy(tensor)


def _aligned(array: np.ndarray) -> np.ndarray:
    """A copy that starts at a multiple of 64 bytes."""
    room = np.zeros(array.nbytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    view = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def _tensor(array: np.ndarray) -> Any:
    return Converter(tvm_ffi).to_tvm(_aligned(array))
