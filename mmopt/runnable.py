"""Models and artifacts behind one interface, so that any two of them can be compared."""

from __future__ import annotations

import mmap
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import onnx_ir as ir

from mmopt.ir.evaluate import ReferenceRunner
from mmopt.ir.module import Module
from mmopt.runtime import Session, TensorSpec, load_artifact
from mmopt.runtime.store import is_artifact

Inputs = Mapping[str, Any]

OPTIMIZED = "optimized.onnx"
"""Name of the ONNX model inside an artifact."""


class Runnable(Protocol):
    """Something that computes outputs from inputs."""

    @property
    def label(self) -> str:
        """How to call it."""

    @property
    def inputs(self) -> Sequence[TensorSpec]:
        """What it takes."""

    @property
    def outputs(self) -> Sequence[TensorSpec]:
        """What it gives."""

    def run_all(self, batches: Sequence[Inputs]) -> list[dict[str, Any]]:
        """Outputs by name for each set of inputs."""

    def module(self) -> Module | None:
        """The model it computes, where that is known."""


class ModelRunnable:
    """A module, computed by onnxruntime with every optimization off."""

    def __init__(self, module: Module, label: str, *, threads: int = 0, seed: int = 0) -> None:
        self.label, self._module, self._threads, self._seed = label, module, threads, seed
        graph = module.graph
        self.inputs = [spec_of(value) for value in graph.inputs if value.name not in graph.initializers]
        self.outputs = [spec_of(value) for value in graph.outputs]

    def run_all(self, batches: Sequence[Inputs]) -> list[dict[str, Any]]:
        """See :class:`Runnable`."""
        with ReferenceRunner(threads=self._threads, seed=self._seed) as runner:
            found = [dict(outputs) for outputs in runner.run_all(self._module, batches)]
        # What comes next may map as much again: an artifact's weights, for example.
        unload_pages(self._module)
        return found

    def module(self) -> Module:
        """See :class:`Runnable`."""
        return self._module


class ArtifactRunnable:
    """A loaded artifact, or one entry point of it."""

    def __init__(self, session: Session, label: str, *, entry: str = "main", module: Module | None = None) -> None:
        self.label, self._session, self._module = label, session, module
        self._entry = session.entry(entry)
        self.inputs, self.outputs = self._entry.inputs, self._entry.outputs

    def run_all(self, batches: Sequence[Inputs]) -> list[dict[str, Any]]:
        """See :class:`Runnable`."""
        return [self._entry.run(inputs) for inputs in batches]

    def module(self) -> Module | None:
        """See :class:`Runnable`."""
        if self._module is None and self._entry.name == "main" and OPTIMIZED in self._session.manifest.files:
            from mmopt.frontends.onnx import load_onnx

            self._module = load_onnx(self._session.file(OPTIMIZED))
        return self._module


def as_runnable(
    source: Any, *, threads: int | None = None, seed: int = 0, trust_code: bool = False, label: str = ""
) -> Runnable:
    """Whatever ``source`` names, ready to run.

    Args:
        source: A loaded artifact, a module, or what :func:`mmopt.load` and :func:`mmopt.load_artifact` take.
        threads: Threads it may use.
        seed: Seed of operators of a model that draw random numbers.
        trust_code: Whether ``package.module:function`` may be called.
        label: How to call it; by default its path.

    Raises:
        LoadError: It is neither.
    """
    if isinstance(source, Session):
        return ArtifactRunnable(source, label or "artifact")
    if isinstance(source, str | os.PathLike):
        path = pathlib.Path(source)
        label = label or str(source)
        if path.is_dir() or path.name.endswith((".mmopt", ".zip")) or is_artifact(path):
            return ArtifactRunnable(load_artifact(path, threads), label)
    if isinstance(source, Module):
        return ModelRunnable(source, label or "model", threads=threads or 0, seed=seed)
    from mmopt.loading import load_source

    module = load_source(source, trust_code=trust_code)
    return ModelRunnable(module, label or type(source).__name__, threads=threads or 0, seed=seed)


def unload_pages(module: Module) -> None:
    """Take mapped weights of ``module`` out of this process's memory; they come back from the file when used."""
    for graph in module.model.graphs():
        for value in graph.initializers.values():
            mapped = value.const_value.raw if isinstance(value.const_value, ir.ExternalTensor) else None
            if mapped is not None and hasattr(mapped, "madvise"):
                mapped.madvise(mmap.MADV_DONTNEED)


def spec_of(value: ir.Value) -> TensorSpec:
    """How an input or output of a graph looks to a caller."""
    kinds = {ir.SequenceType: "sequence", ir.OptionalType: "optional"}
    kind = next((text for type_, text in kinds.items() if isinstance(value.type, type_)), "tensor")
    dtype = value.dtype
    name = "unknown" if dtype is None else "string" if dtype == ir.DataType.STRING else dtype.numpy().name
    shape = None
    if value.shape is not None:
        shape = tuple(dim if isinstance(dim, int) else dim.value or "?" for dim in value.shape)
    return TensorSpec(str(value.name), name, shape, kind)
