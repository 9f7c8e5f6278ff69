"""What a compiler hands over (:class:`Program`) and what a manifest holds: entry points made of segments.

This module is the contract between compiler and runtime. It imports numpy, the standard library and plain data only.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mmopt.runtime.encoded import Encoded

SCHEMA_VERSION = 1
"""Version of the manifest's layout; a runtime refuses artifacts with a greater one."""

LIBRARY = "lib.so"
WEIGHTS = "weights.safetensors"
MAIN = "main"
"""Names of the files the runtime looks for, and of the entry point that is the whole model."""

FileSource = bytes | pathlib.Path | Callable[[pathlib.Path], None]
"""Content of one file of an artifact: its bytes, a file to copy, or a function that writes to the path it is given."""

Shape = tuple[int | str, ...]
"""Dimensions of a tensor; a name stands for a size known at run time and agrees across all inputs of one run."""


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One input or output of an entry point.

    Attributes:
        name: Name in the model.
        dtype: Element type by its numpy name, with ``bfloat16``, ``float8_e4m3fn``, ``int4``, ``string``, … added.
        shape: Sizes and names of sizes, or None when not even the rank is known.
        kind: ``tensor``, ``sequence`` (a list of tensors) or ``optional`` (a tensor or None).
    """

    name: str
    dtype: str
    shape: Shape | None = None
    kind: str = "tensor"

    def to_json(self) -> dict[str, Any]:
        """The form the manifest holds."""
        shape = None if self.shape is None else list(self.shape)
        return {"name": self.name, "dtype": self.dtype, "shape": shape, "kind": self.kind}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TensorSpec:
        """Inverse of :meth:`to_json`."""
        shape = data["shape"]
        return cls(data["name"], data["dtype"], None if shape is None else tuple(shape), data.get("kind", "tensor"))

    def __str__(self) -> str:
        dims = "[…]" if self.shape is None else "[" + ", ".join(str(d) for d in self.shape) + "]"
        text = f"{self.dtype}{dims}"
        return text if self.kind == "tensor" else f"{self.kind}({text})"


Order = tuple[tuple[int, tuple[int, ...]], ...]
"""Steps on a device: of each how many kernels it launches, and which earlier steps it has to wait for."""


@dataclasses.dataclass(frozen=True)
class Segment:
    """A part of an entry point that one engine executes; later segments read the values earlier ones made, by name.

    Sub-byte element types (``int4``, …) cross into native functions as ``int8`` or ``uint8``, one value a byte.

    Attributes:
        kind: ``native`` (a function of ``lib.so``) or ``onnxruntime`` (a fallback model).
        inputs: Names of values it reads, in the order of its parameters.
        outputs: Names of values it makes, in the order of its results.
        function: Native: name of the VM function. It takes ``inputs`` positionally, then, when ``params`` is not empty,
            one array of the param tensors; it always returns an array of tensors in the order of ``outputs``.
        params: Native: keys in ``weights.safetensors``.
        model: Onnxruntime: path of the model relative to the artifact, with ``/``.
        table: Native: the array of param tensors is always passed, and begins with one more tensor: int64, the address
            of a clock or 0, that of the workspace, then the address of each param. The clock has two int64 for each of
            the manifest's kernels, cycles of the CPU's counter spent in it and calls, and one more, its last reading.
        workspace: Native: bytes that a run needs for itself, with ``table``.
        fresh: Native: every result is memory of its own, which nobody else uses.
        repeats: Native, on a device: the function launches the same kernels whatever its inputs hold, so that they can
            be recorded and repeated, for inputs of the same shapes.
        order: With ``repeats``: the order its kernels have to keep; when empty, that in which they are launched.
    """

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    function: str = ""
    params: tuple[str, ...] = ()
    model: str = ""
    table: bool = False
    fresh: bool = False
    workspace: int = 0
    repeats: bool = False
    order: Order = ()

    def to_json(self) -> dict[str, Any]:
        """The form the manifest holds."""
        made = {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(self).items()}
        return made | {"order": [[count, list(after)] for count, after in self.order]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Segment:
        """Inverse of :meth:`to_json`."""
        return cls(
            kind=data["kind"],
            inputs=tuple(data["inputs"]),
            outputs=tuple(data["outputs"]),
            function=data.get("function", ""),
            params=tuple(data.get("params", ())),
            model=data.get("model", ""),
            table=bool(data.get("table", False)),
            fresh=bool(data.get("fresh", False)),
            workspace=int(data.get("workspace", 0)),
            repeats=bool(data.get("repeats", False)),
            order=tuple((int(count), tuple(map(int, after))) for count, after in data.get("order", ())),
        )


@dataclasses.dataclass(frozen=True)
class EntryPoint:
    """Something an artifact can compute: the whole model (``main``), a tower (``encode_image``), the fusion (``fuse``).

    Attributes:
        name: Name by which a session finds it.
        inputs: What a run takes.
        outputs: What a run gives, in order.
        segments: What is executed, in order, over an environment from names to values that starts with the inputs.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    segments: tuple[Segment, ...]

    def to_json(self) -> dict[str, Any]:
        """The form the manifest holds."""
        return {
            "name": self.name,
            "inputs": [spec.to_json() for spec in self.inputs],
            "outputs": [spec.to_json() for spec in self.outputs],
            "segments": [segment.to_json() for segment in self.segments],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EntryPoint:
        """Inverse of :meth:`to_json`."""
        return cls(
            name=data["name"],
            inputs=tuple(TensorSpec.from_json(spec) for spec in data["inputs"]),
            outputs=tuple(TensorSpec.from_json(spec) for spec in data["outputs"]),
            segments=tuple(Segment.from_json(segment) for segment in data["segments"]),
        )


@dataclasses.dataclass
class Program:
    """A compiled model, before it is written.

    Attributes:
        library: Bytes of the shared library that holds all native functions, a path to it, or None when everything
            falls back.
        weights: Param tensors by key, already packed for their kernels; all entry points share them.
        entries: Entry points by name; ``main`` is always there.
        fallback_models: ONNX models for ``onnxruntime`` segments, by path relative to the artifact.
        target: What it was compiled for: ``name``, ``triple``, ``cpu``, ``features`` (list of ISA feature names), …
        kernels: One record a kernel, for ``mmopt inspect``.
        notes: What the compiler has to say, one sentence each (what fell back and why).
        encoded: The form in which some of the weights are stored, by key.
    """

    library: bytes | pathlib.Path | None
    weights: dict[str, np.ndarray]
    entries: dict[str, EntryPoint]
    fallback_models: dict[str, FileSource] = dataclasses.field(default_factory=dict)
    target: dict[str, Any] = dataclasses.field(default_factory=dict)
    kernels: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    encoded: dict[str, Encoded] = dataclasses.field(default_factory=dict)
