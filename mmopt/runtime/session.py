"""Loads an artifact and runs its entry points."""

from __future__ import annotations

import functools
import os
import pathlib
import threading
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np

from mmopt.errors import BackendError, UnsupportedError, UserError, did_you_mean
from mmopt.runtime.artifact import LIBRARY, MAIN, WEIGHTS, EntryPoint, Segment, TensorSpec
from mmopt.runtime.cpu import allowed_cpus, check_target, default_threads
from mmopt.runtime.device import DeviceEngine
from mmopt.runtime.fallback import OnnxRuntimeEngine
from mmopt.runtime.manifest import Manifest
from mmopt.runtime.native import NativeEngine
from mmopt.runtime.store import Store, open_store
from mmopt.runtime.tensors import Array, as_array, dtype_name, numpy_dtype
from mmopt.runtime.weights import map_weights

_PLAIN = {"bool", *(f"{kind}{bits}" for kind in ("int", "uint", "float") for bits in (8, 16, 32, 64))} - {"float8"}
"""Dtypes that numpy has itself."""


class Entry:
    """One entry point of a loaded artifact.

    Attributes:
        name: Its name.
        inputs: What :meth:`run` takes.
        outputs: What it returns.
    """

    def __init__(self, entry: EntryPoint, session: Session) -> None:
        self.name, self.inputs, self.outputs = entry.name, entry.inputs, entry.outputs
        self._segments, self._session = entry.segments, session
        plain = all(spec.kind == "tensor" and spec.dtype in _PLAIN for spec in self.inputs)
        self._exact = [(spec.name, np.dtype(spec.dtype), spec.shape) for spec in self.inputs] if plain else []
        self._fresh = {name for segment in entry.segments if segment.fresh for name in segment.outputs}

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Compute the outputs. May be called from several threads at once.

        Args:
            inputs: By name: numpy arrays or CPU tensors with ``__dlpack__``. They are used where they lie when they are
                contiguous and start at a multiple of 64 bytes, and copied otherwise. A sequence is a list of
                tensors, an absent optional is None.

        Returns:
            Outputs by name: fresh arrays, which no later run changes.

        Raises:
            UserError: A missing or unknown name, or a wrong dtype or shape.
            BackendError: A segment failed.
        """
        values = self._as_specified(inputs) or check_inputs(self.inputs, inputs, where=f"entry point {self.name}")
        given = {id(value) for value in values.values()}
        for segment in self._segments:
            results = self._session.execute(segment, [_lookup(values, name) for name in segment.inputs])
            values.update(zip(segment.outputs, results, strict=True))
        return {spec.name: self._result(spec, _lookup(values, spec.name), given) for spec in self.outputs}

    def _as_specified(self, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
        """``inputs`` when every one is an array just as it should be: the quick way past :func:`check_inputs`."""
        if not self._exact or len(inputs) != len(self._exact):
            return None
        for name, dtype, shape in self._exact:
            value = inputs.get(name)
            if type(value) is not np.ndarray or value.shape != shape or value.dtype != dtype:
                return None
        return dict(inputs)

    def _result(self, spec: TensorSpec, value: Any, given: set[int]) -> Any:
        if isinstance(value, np.ndarray):
            return value.copy() if id(value) in given else value
        if isinstance(value, list):
            return [item.copy() if id(value) in given else item for item in value]
        if value is None:
            return None
        convert = self._session.native.convert
        return convert.to_numpy(value, numpy_dtype(spec.dtype), copy=spec.name not in self._fresh)


def _lookup(values: Mapping[str, Any], name: str) -> Any:
    if name not in values:
        raise BackendError(f"no segment makes the value {name!r}")
    return values[name]


class Session:
    """A loaded artifact. Use :func:`load_artifact`.

    Attributes:
        manifest: What the artifact says about itself, for the target that is used.
        threads: Threads each run uses.
        pinned: Whether each of them stays on a CPU of its own.
        entries: Entry points by name.
    """

    def __init__(self, store: Store, manifest: Manifest, threads: int, *, pin: bool = False) -> None:
        self.manifest = manifest
        self.threads, self.pinned = threads, pin
        self.entries = {name: Entry(entry, self) for name, entry in manifest.entries.items()}
        self._store = store
        self._lock = threading.RLock()
        self._fallback = OnnxRuntimeEngine(store.file, threads)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What :meth:`run` takes."""
        return self.entry(MAIN).inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What :meth:`run` returns."""
        return self.entry(MAIN).outputs

    def entry(self, name: str) -> Entry:
        """The entry point ``name``.

        Raises:
            UserError: There is none.
        """
        if name not in self.entries:
            raise UserError(f"there is no entry point {name!r}", hint=did_you_mean(name, self.entries))
        return self.entries[name]

    def file(self, name: str) -> pathlib.Path:
        """A file of the artifact on disk, such as ``optimized.onnx``; extracted when the artifact is a zip.

        Raises:
            LoadError: There is none.
        """
        return self._store.file(name)

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Run the entry point ``main``; see :meth:`Entry.run`."""
        return self.entry(MAIN).run(inputs)

    @functools.cached_property
    def native(self) -> NativeEngine:
        """The compiled library, loaded when it is first needed."""
        weights: dict[str, Array] = {}
        for name in _weight_files(self.manifest):
            extent = self._store.extent(name)
            weights |= map_weights(extent.path, extent.offset, extent.size)
        carried = [self._store.file(name) for name in self.manifest.files if name.startswith("runtime/")]
        engine = DeviceEngine if self.manifest.target.get("kind") == "cuda" else NativeEngine
        library = self._store.file(self.manifest.folder + LIBRARY)
        return engine(library, weights, self.threads, carried, pin=self.pinned)

    def execute(self, segment: Segment, values: Sequence[Any]) -> list[Any]:
        """Run one segment on the engine it names."""
        if segment.kind == "native":
            return self._engine().run(segment, values)
        if segment.kind == "onnxruntime":
            return self._fallback.run(segment, [self._to_host(value) for value in values])
        raise BackendError(f"unknown kind of segment: {segment.kind!r}")

    def _engine(self) -> NativeEngine:
        if "native" in self.__dict__:
            return self.native
        with self._lock:  # cached_property alone would load it twice
            return self.native

    def _to_host(self, value: Any) -> Any:
        if value is None or isinstance(value, np.ndarray | list):
            return value
        return self.native.convert.to_numpy(value)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.__dict__.pop("native", None)
        self._fallback = OnnxRuntimeEngine(self._store.file, self.threads)


def load_artifact(
    path: str | os.PathLike[str],
    threads: int | None = None,
    *,
    pin: bool = False,
    target: str | None = None,
    verify_hashes: str = "full",
) -> Session:
    """Load an artifact: a folder or a zip that ``mmopt optimize`` or :func:`mmopt.compile` wrote.

    Args:
        path: The artifact.
        threads: Threads a run may use; None for one per physical core.
        pin: Bind each thread of native code to a CPU of its own, the calling thread while it runs. That helps where the
            system moves threads about, and hurts where something else wants the same CPUs. On Linux only.
        target: Which of the targets of an artifact that is compiled for several; None for the best that runs here.
        verify_hashes: ``full`` compares the SHA-256 of every file that will be used with the manifest, ``size`` the
            sizes only.

    Raises:
        LoadError: It is not an artifact, or a damaged one.
        UnsupportedError: It is compiled for another kind of CPU.
        UserError: ``threads`` or ``verify_hashes`` is out of range, there are fewer CPUs than threads to pin, or the
            artifact has no such target.
    """
    if threads is not None and threads < 1:
        raise UserError(f"threads is {threads}", hint="give 1 or more, or leave it out")
    if verify_hashes not in ("full", "size"):
        raise UserError(f"verify_hashes is {verify_hashes!r}", hint="give 'full' or 'size'")
    if pin:
        _check_pinning(threads or default_threads())
    store = open_store(pathlib.Path(path))
    manifest = _choose(store.manifest, target, str(path))
    if verify_hashes == "full":
        store.verify(_used_files(store, manifest))
    return Session(store, manifest, threads or default_threads(), pin=pin)


def _check_pinning(threads: int) -> None:
    if not hasattr(os, "sched_setaffinity"):
        raise UserError("this system does not bind threads to CPUs", hint="leave out pin")
    if threads > len(allowed_cpus()):
        hint = f"give {len(allowed_cpus())} threads or fewer, or leave out pin"
        raise UserError(f"there are {len(allowed_cpus())} CPUs for {threads} pinned threads", hint=hint)


def _choose(manifest: Manifest, target: str | None, where: str) -> Manifest:
    """The first of what the artifact is compiled for that runs here, or the one called ``target``."""
    choices = manifest.each()
    if target is not None:
        names = [str(choice.target.get("name")) for choice in choices]
        if target not in names:
            hint = did_you_mean(target, names) or f"it is compiled for {', '.join(names)}"
            raise UserError(f"the artifact is not compiled for {target!r}", where=where, hint=hint)
        choices = (choices[names.index(target)],)
    for choice in choices:
        try:
            if any(segment.kind == "native" for segment in _segments(choice)):
                check_target(choice.target, where=where)
        except UnsupportedError:
            if choice is choices[-1]:
                raise
        else:
            return choice
    raise AssertionError("a manifest has at least one target")


def _segments(manifest: Manifest) -> list[Segment]:
    return [segment for entry in manifest.entries.values() for segment in entry.segments]


def _weight_files(manifest: Manifest) -> list[str]:
    """Files of weights, of which later ones hold what a variant packs differently."""
    names = dict.fromkeys((WEIGHTS, manifest.folder + WEIGHTS))
    return [name for name in names if name in manifest.files]


def _used_files(store: Store, manifest: Manifest) -> list[str]:
    """Every file a run may read; what is there for people and other tools (``optimized.onnx``) is not among them."""
    files = manifest.files
    used = {name for name in files if name == manifest.folder + LIBRARY or name.startswith("runtime/")}
    used.update(_weight_files(manifest))
    for segment in _segments(manifest):
        if segment.model:
            used.update(store.belonging(segment.model))
    return sorted(used)


def check_inputs(specs: Sequence[TensorSpec], inputs: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """The inputs as arrays, after comparing them with what is expected.

    Args:
        specs: What is expected.
        inputs: What is given, by name.
        where: For errors.

    Raises:
        UserError: A missing or unknown name, a wrong dtype or shape, or two sizes for one symbolic dimension.
    """
    expected = {spec.name: spec for spec in specs}
    for name in inputs:
        if name not in expected:
            raise UserError(f"there is no input {name!r}", where=where, hint=did_you_mean(name, expected))
    for spec in specs:
        if spec.name not in inputs and spec.kind != "optional":
            raise UserError(f"the input {spec.name!r} is missing", where=where, hint=f"expected: {spec.name} {spec}")
    sizes: dict[str, tuple[int, str]] = {}
    return {name: _check_value(spec, inputs.get(name), sizes, where) for name, spec in expected.items()}


def _check_value(spec: TensorSpec, value: Any, sizes: dict[str, tuple[int, str]], where: str) -> Any:
    if spec.kind == "sequence" or (spec.kind == "optional" and isinstance(value, list)):
        if not isinstance(value, list | tuple):
            raise UserError(f"the input {spec.name!r} is not a list", where=where, hint=f"expected: {spec}")
        element = TensorSpec(spec.name, spec.dtype, spec.shape)
        # The tensors of one sequence may differ in their symbolic dimensions.
        return [_check_array(element, item, {}, where) for item in value]
    if spec.kind == "optional" and value is None:
        return None
    return _check_array(spec, value, sizes, where)


def _check_array(spec: TensorSpec, value: Any, sizes: dict[str, tuple[int, str]], where: str) -> Array:
    array = as_array(value, f"the input {spec.name!r}")
    if dtype_name(array) != spec.dtype:
        raise UserError(f"the input {spec.name!r} has dtype {dtype_name(array)}", where=where, hint=_expected(spec))
    if spec.shape is None:
        return array
    if len(spec.shape) != array.ndim:
        raise UserError(f"the input {spec.name!r} has shape {list(array.shape)}", where=where, hint=_expected(spec))
    for size, dim in zip(array.shape, spec.shape, strict=True):
        if isinstance(dim, int):
            if size != dim:
                raise UserError(
                    f"the input {spec.name!r} has shape {list(array.shape)}", where=where, hint=_expected(spec)
                )
            continue
        known, source = sizes.setdefault(dim, (size, spec.name))
        if known != size:
            raise UserError(
                f"the input {spec.name!r} has {dim} = {size}, but {source!r} has {dim} = {known}",
                where=where,
                hint=_expected(spec),
            )
    return array


def _expected(spec: TensorSpec) -> str:
    return f"expected: {spec}"
