"""``manifest.json``: what is in an artifact, and the hashes that prove it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mmopt.errors import LoadError
from mmopt.runtime.artifact import SCHEMA_VERSION, EntryPoint
from mmopt.runtime.cpu import default_threads

MANIFEST = "manifest.json"
FORMAT = "mmopt-artifact"
CHUNK = 8 << 20
"""Bytes. Longer files also carry one hash per chunk of this size, so that several threads can check them."""


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 of one file, and of its chunks when it is longer than :data:`CHUNK`."""

    size: int
    sha256: str
    chunks: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Variant:
    """The same entry points, compiled for another target.

    Attributes:
        folder: Where its library, and the weights it packs differently, are: a path in the artifact that ends in ``/``.
        target: What it is compiled for.
        entries: Entry points by name.
        kernels: One record a kernel.
    """

    folder: str
    target: dict[str, Any]
    entries: dict[str, EntryPoint]
    kernels: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """The form the manifest holds."""
        entries = {name: entry.to_json() for name, entry in self.entries.items()}
        return {"folder": self.folder, "target": self.target, "entries": entries, "kernels": self.kernels}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Variant:
        """Inverse of :meth:`to_json`."""
        folder = str(data["folder"])
        if not folder.endswith("/") or not _is_inside(folder):
            raise ValueError(f"folder {folder!r} of a variant")
        entries = {name: EntryPoint.from_json(entry) for name, entry in data["entries"].items()}
        return cls(folder, dict(data["target"]), entries, list(data.get("kernels", ())))


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The content of ``manifest.json``.

    Attributes:
        entries: Entry points by name.
        target: What the artifact was compiled for.
        files: Every other file of the artifact, by path relative to it.
        versions: Versions of mmopt and of what it used.
        config: The resolved configuration of the run that made it.
        kernels: One record a kernel.
        notes: What the compiler had to say.
        variants: The same for further targets, the most demanding first.
        folder: Where the library is, as in :class:`Variant`; "" for the artifact itself.
    """

    entries: dict[str, EntryPoint]
    target: dict[str, Any] = dataclasses.field(default_factory=dict)
    files: dict[str, FileRecord] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    kernels: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    variants: tuple[Variant, ...] = ()
    folder: str = ""

    def each(self) -> tuple[Manifest, ...]:
        """What the manifest says for each target it has code for, in the order of preference."""
        others = (
            dataclasses.replace(self, folder=v.folder, target=v.target, entries=v.entries, kernels=v.kernels)
            for v in self.variants
        )
        return self, *others

    def to_json(self) -> dict[str, Any]:
        """The document."""
        return {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "target": self.target,
            "entries": {name: entry.to_json() for name, entry in self.entries.items()},
            "files": {name: dataclasses.asdict(record) for name, record in sorted(self.files.items())},
            "versions": self.versions,
            "config": self.config,
            "kernels": self.kernels,
            "notes": self.notes,
            **({"variants": [variant.to_json() for variant in self.variants]} if self.variants else {}),
        }


def parse_manifest(text: bytes, where: str) -> Manifest:
    """Read a manifest.

    Raises:
        LoadError: It is not one, is incomplete, names files outside the artifact or has a newer schema.
    """
    try:
        data = json.loads(text)
    except ValueError as error:
        raise LoadError(f"{MANIFEST} is not JSON: {error}", where=where) from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise LoadError(f"{MANIFEST} is not the manifest of an mmopt artifact", where=where)
    version = data.get("schema_version")
    if version != SCHEMA_VERSION:
        raise LoadError(
            f"the artifact has schema version {version}, this mmopt reads {SCHEMA_VERSION}",
            where=where,
            hint="compile the model again, or use the mmopt that wrote it",
        )
    try:
        return _from_json(data)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise LoadError(f"{MANIFEST} is damaged: {type(error).__name__} {error}", where=where) from error


def _from_json(data: Mapping[str, Any]) -> Manifest:
    files = {}
    for name, record in data["files"].items():
        if not _is_inside(name):
            raise ValueError(f"file name {name!r} leads out of the artifact")
        files[name] = FileRecord(int(record["size"]), str(record["sha256"]), tuple(record.get("chunks", ())))
    return Manifest(
        entries={name: EntryPoint.from_json(entry) for name, entry in data["entries"].items()},
        target=dict(data["target"]),
        files=files,
        versions=dict(data.get("versions", {})),
        config=dict(data.get("config", {})),
        kernels=list(data.get("kernels", ())),
        notes=list(data.get("notes", ())),
        variants=tuple(Variant.from_json(variant) for variant in data.get("variants", ())),
    )


def _is_inside(name: str) -> bool:
    """Whether a name of a file does not lead out of the artifact."""
    path = pathlib.PurePosixPath(name)
    return not (path.is_absolute() or ".." in path.parts or "\\" in name)


def record_file(path: pathlib.Path) -> FileRecord:
    """Size and hashes of the file at ``path``. Reads it in chunks, so that memory stays small however long it is."""
    whole = hashlib.sha256()
    chunks: list[str] = []
    size = 0
    with path.open("rb") as file, ThreadPoolExecutor(1) as other:
        while data := file.read(CHUNK):
            pending = other.submit(whole.update, data)
            chunks.append(hashlib.sha256(data).hexdigest())
            pending.result()
            size += len(data)
    return FileRecord(size, whole.hexdigest(), tuple(chunks) if size > CHUNK else ())


def _sha256(data: memoryview) -> str:
    digest = hashlib.sha256(data).hexdigest()
    data.release()
    return digest


def check_bytes(parts: Iterable[tuple[str, FileRecord, memoryview]], where: str) -> None:
    """Compare contents with their records, chunk by chunk on all cores.

    Args:
        parts: File name, record and content of each file.
        where: The artifact, for the error.

    Raises:
        LoadError: A hash differs; names the file.
    """
    jobs: list[tuple[str, memoryview, str]] = []
    for name, record, view in parts:
        if record.chunks:
            slices = [view[start : start + CHUNK] for start in range(0, record.size, CHUNK)]
            if len(slices) != len(record.chunks):
                raise LoadError(f"{MANIFEST} is damaged: wrong number of chunks for {name}", where=where)
            jobs += [(name, part, digest) for part, digest in zip(slices, record.chunks, strict=True)]
        else:
            jobs.append((name, view, record.sha256))
    with ThreadPoolExecutor(default_threads()) as pool:
        digests = list(pool.map(_sha256, [view for _, view, _ in jobs]))
    for (name, _, expected), digest in zip(jobs, digests, strict=True):
        if digest != expected:
            raise LoadError(
                f"{name} is damaged: its SHA-256 is not the one in {MANIFEST}",
                where=where,
                hint="copy the artifact again or compile it again",
            )
