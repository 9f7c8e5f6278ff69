"""A module and its entry points, compiled for one target."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import onnx_ir as ir

from mmopt.backends.cpu.choosing import Chooser
from mmopt.backends.linking import Library
from mmopt.backends.profile import Profile
from mmopt.ir.module import Module
from mmopt.lowering.partition import Part, partition
from mmopt.lowering.program import ProgramBuilder
from mmopt.lowering.targets import library_builder
from mmopt.runtime.artifact import EntryPoint, Program, Segment, TensorSpec


@dataclasses.dataclass(frozen=True)
class CompileOptions:
    """Switches of one compilation.

    Attributes:
        allow_fallback: Nodes without a kernel may be run by onnxruntime; otherwise they are an error.
        chooser: Picks the parameters of kernel templates; by their own predictions when None.
    """

    allow_fallback: bool = True
    chooser: Chooser | None = None


def compile_module(
    module: Module,
    profile: Profile,
    *,
    entries: Mapping[str, Module] | None = None,
    options: CompileOptions | None = None,
) -> Program:
    """Compile ``module`` as entry point ``main``, and every one of ``entries`` under its name.

    Args:
        module: The whole model.
        profile: What to compile for.
        entries: Further entry points (towers, fusion) that share weights with ``module``.
        options: Switches.

    Returns:
        The compiled program, ready to be written as an artifact.

    Raises:
        UnsupportedError: A node runs neither natively nor in onnxruntime.
        BackendError: Code generation failed.
    """
    options = options or CompileOptions()
    builder = ProgramBuilder(profile, options.chooser)
    done: dict[str, EntryPoint] = {}
    fallback: dict[str, object] = {}
    notes: list[str] = []
    for name, entry in {"main": module, **(entries or {})}.items():
        parts = partition(entry, name, builder, options)
        notes.extend(note for part in parts for note in part.notes)
        segments = tuple(_segment(part, builder, fallback) for part in parts)
        inputs = tuple(tensor_spec(v) for v in entry.graph.inputs if v.name not in entry.graph.initializers)
        done[name] = EntryPoint(name, inputs, tuple(tensor_spec(v) for v in entry.graph.outputs), segments)
    native = any(s.kind == "native" for e in done.values() for s in e.segments)
    library: bytes | None = None
    if native:
        collected = builder.module()
        made = library_builder(profile)(collected, profile, list(builder.kernels))
        library = made.data
        for name, facts in made.facts.items():
            builder.kernels[name] |= facts
        done = {name: _finished(entry, made) for name, entry in done.items()}
    return Program(
        library=library,
        weights=builder.weights,
        encoded=builder.encoded,
        entries=done,
        fallback_models=dict(fallback),  # type: ignore[arg-type]
        target=profile.to_dict(),
        kernels=list(builder.kernels.values()),
        notes=list(dict.fromkeys(notes)),
    )


def _finished(entry: EntryPoint, library: Library) -> EntryPoint:
    """``entry`` with what is known of its functions once they are compiled."""

    def finished(segment: Segment) -> Segment:
        if segment.kind != "native":
            return segment
        found = library.repeatable.get(segment.function)
        return dataclasses.replace(segment, workspace=library.workspace, repeats=found is not None, order=found or ())

    return dataclasses.replace(entry, segments=tuple(map(finished, entry.segments)))


def _segment(part: Part, builder: ProgramBuilder, fallback: dict[str, object]) -> Segment:
    if part.model is not None:
        path = f"fallback/{part.name}.onnx"
        fallback[path] = part.model
        return Segment("onnxruntime", part.inputs, part.outputs, model=path)
    params = tuple(builder.weight_key(s) for s in part.params)
    return Segment("native", part.inputs, part.outputs, function=part.name, params=params, table=True, fresh=True)


def tensor_spec(value: ir.Value) -> TensorSpec:
    """How an input or output of a graph is described in the manifest."""
    kinds = {ir.SequenceType: "sequence", ir.OptionalType: "optional"}
    kind = next((k for t, k in kinds.items() if isinstance(value.type, t)), "tensor")
    dtype = (
        "unknown"
        if value.dtype is None
        else "string"
        if value.dtype == ir.DataType.STRING
        else value.dtype.numpy().name
    )
    if value.shape is None:
        return TensorSpec(str(value.name), dtype, None, kind)
    dims = tuple(d if isinstance(d, int) else str(d.value or f"{value.name}_{n}") for n, d in enumerate(value.shape))
    return TensorSpec(str(value.name), dtype, dims, kind)
