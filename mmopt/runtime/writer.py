"""Writes an artifact: everything into a staging folder, checked there, then moved into place in one step."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mmopt.errors import UserError
from mmopt.runtime import atomic
from mmopt.runtime.artifact import LIBRARY, WEIGHTS, EntryPoint, FileSource, Program
from mmopt.runtime.manifest import MANIFEST, FileRecord, Manifest, Variant, record_file
from mmopt.runtime.store import is_artifact
from mmopt.runtime.tensors import ALIGNMENT, Array
from mmopt.runtime.weights import map_weights, write_weights

_VERSIONED = ("mmopt", "apache-tvm", "apache-tvm-ffi", "numpy", "onnx", "onnx-ir", "onnxruntime", "torch")


def check_output(output: pathlib.Path) -> pathlib.Path:
    """Make sure that an artifact may be written to ``output``.

    Returns:
        ``output`` with links resolved.

    Raises:
        UserError: Its folder is missing or cannot be written to, or it exists and is not an artifact.
    """
    output = output.expanduser().resolve()
    atomic.check_parent(output)
    if not output.exists() or is_artifact(output):
        return output
    if output.is_dir() and not any(output.iterdir()):
        return output
    kind = "folder" if output.is_dir() else "file"
    raise UserError(
        f"the {kind} exists and is not an artifact of mmopt, so it is not replaced",
        where=str(output),
        hint="choose another -o, or remove it yourself",
    )


def installed_versions() -> dict[str, str]:
    """Versions of the packages that decide what an artifact holds, as far as they are installed."""
    versions = {}
    for name in _VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


class ArtifactWriter:
    """An artifact in the making. Use :func:`write_artifact`.

    Attributes:
        folder: The staging folder. :meth:`seal` makes it loadable, :meth:`commit` moves it to ``output``.
        output: Where it will be.
    """

    def __init__(self, folder: pathlib.Path, output: pathlib.Path) -> None:
        self.folder, self.output = folder, output
        self._manifest = Manifest(entries={})
        self._records: dict[str, FileRecord] = {}

    def add_program(self, program: Program, *, config: Mapping[str, Any] | None = None) -> None:
        """Write library, weights and fallback models, and take over what the manifest says about them."""
        self._add_files("", program, program.weights)
        self._manifest = Manifest(
            entries=program.entries,
            target=program.target,
            versions=installed_versions(),
            config=dict(config or {}),
            kernels=program.kernels,
            notes=program.notes,
        )

    def add_variant(self, program: Program, folder: str) -> None:
        """Write the same model for another target. Of its weights, those that are there already are not written again.

        Args:
            program: What :meth:`add_program` has got, compiled for less than what was added before.
            folder: Where its files go, ending in ``/``.
        """
        written = self.folder / WEIGHTS
        known = map_weights(written, 0, written.stat().st_size) if written.is_file() else {}
        weights = {key: array for key, array in program.weights.items() if not _same(array, known.get(key))}
        self._add_files(folder, program, weights)
        entries = {name: _moved(entry, folder) for name, entry in program.entries.items()}
        variant = Variant(folder, program.target, entries, program.kernels)
        notes = list(dict.fromkeys([*self._manifest.notes, *program.notes]))
        variants = (*self._manifest.variants, variant)
        self._manifest = dataclasses.replace(self._manifest, variants=variants, notes=notes)

    def _add_files(self, folder: str, program: Program, weights: Mapping[str, Array]) -> None:
        if program.library is not None:
            self.add(folder + LIBRARY, program.library)
        if weights:
            self.add(folder + WEIGHTS, lambda path: write_weights(weights, path, program.encoded))
        for name, source in program.fallback_models.items():
            self.add(folder + name, source)

    def add(self, name: str, source: FileSource) -> None:
        """Write one file, ``name`` relative to the artifact, with ``/``."""
        path = self.folder / name
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise ValueError(f"file name {name!r} leads out of the artifact")
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(source, bytes):
            path.write_bytes(source)
        elif isinstance(source, pathlib.Path):
            shutil.copyfile(source, path)
        else:
            source(path)

    def add_json(self, name: str, data: Mapping[str, Any]) -> None:
        """Write one JSON file."""
        self.add(name, (json.dumps(data, indent=2, allow_nan=True) + "\n").encode())

    def seal(self) -> Manifest:
        """Write the manifest for the files that are there; files that :meth:`seal` has seen are not hashed again."""
        paths = [path for path in self.folder.rglob("*") if path.is_file()]
        names = {path.relative_to(self.folder).as_posix(): path for path in paths}
        names.pop(MANIFEST, None)
        for name, path in names.items():
            if name not in self._records:
                self._records[name] = record_file(path)
        self._manifest = dataclasses.replace(self._manifest, files=dict(self._records))
        text = json.dumps(self._manifest.to_json(), indent=2) + "\n"
        (self.folder / MANIFEST).write_text(text, encoding="utf-8")
        return self._manifest

    def commit(self) -> None:
        """Seal, have everything reach the disk, and replace ``output``."""
        self.seal()
        if self.output.suffix == ".zip":
            packed = self.folder / "packed.zip"
            write_zip(self.folder, [MANIFEST, *sorted(self._records)], packed)
            atomic.sync(packed)
            atomic.publish(packed, self.output)
        else:
            atomic.sync_tree(self.folder)
            atomic.publish(self.folder, self.output)


@contextlib.contextmanager
def write_artifact(output: str | os.PathLike[str]) -> Iterator[ArtifactWriter]:
    """Begin an artifact at ``output``: a folder, or one zip when the name ends in ``.zip``.

    Nothing changes at ``output`` before :meth:`ArtifactWriter.commit`; without it, nothing is left behind.

    Raises:
        UserError: ``output`` cannot be written or is something else's.
    """
    path = check_output(pathlib.Path(output))
    with atomic.staging(path) as folder:
        yield ArtifactWriter(folder, path)


def _same(array: Array, other: Array | None) -> bool:
    """Whether both are the same, compared as bytes, so that NaN equals itself and -0.0 differs from 0.0."""
    if other is None or array.dtype != other.dtype or array.shape != other.shape:
        return False
    mine, theirs = (np.ascontiguousarray(a).reshape(-1).view(np.uint8) for a in (array, other))
    return bool(np.array_equal(mine, theirs))


def _moved(entry: EntryPoint, folder: str) -> EntryPoint:
    """An entry point whose fallback models lie in ``folder``."""
    segments = (dataclasses.replace(s, model=folder + s.model) if s.model else s for s in entry.segments)
    return dataclasses.replace(entry, segments=tuple(segments))


def write_zip(folder: pathlib.Path, names: list[str], path: pathlib.Path) -> None:
    """Pack files into a zip without compression, each starting at a multiple of the weights' alignment."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name in names:
            # A fixed date, so that equal contents give equal zips.
            info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            info.extra = _padding(archive, info)
            info.external_attr = 0o644 << 16
            with (folder / name).open("rb") as source, archive.open(info, "w", force_zip64=True) as target:
                shutil.copyfileobj(source, target, 8 << 20)


def _padding(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """An extra field (of an id nobody uses) that moves the data of the next member to an aligned offset."""
    zip64_extra = 20
    header = 30 + len(info.filename.encode()) + zip64_extra
    position = archive.fp.tell() if archive.fp else 0
    gap = -(position + header + 4) % ALIGNMENT
    return (0x6D6D).to_bytes(2, "little") + gap.to_bytes(2, "little") + b"\0" * gap
