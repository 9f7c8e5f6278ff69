"""The files of an artifact, in a folder or in a stored zip, read where they lie."""

from __future__ import annotations

import abc
import dataclasses
import json
import mmap
import os
import pathlib
import shutil
import tempfile
import weakref
import zipfile
from collections.abc import Iterable

from mmopt.errors import LoadError
from mmopt.runtime.manifest import FORMAT, MANIFEST, FileRecord, Manifest, check_bytes, parse_manifest

_LOCAL_HEADER = 30  # bytes of a zip member's local header before its name
_MAX_MANIFEST = 256 << 20


@dataclasses.dataclass(frozen=True)
class Extent:
    """A range of bytes within a file on disk."""

    path: pathlib.Path
    offset: int
    size: int


class Store(abc.ABC):
    """Where an artifact's files are."""

    def __init__(self, path: pathlib.Path) -> None:
        self.location = path
        self.manifest: Manifest = parse_manifest(self._read_manifest(), str(path))
        for name, record in self.manifest.files.items():
            self._check_size(name, record)

    @abc.abstractmethod
    def extent(self, name: str) -> Extent:
        """Where the bytes of the file ``name`` lie.

        Raises:
            LoadError: There is no such file.
        """

    @abc.abstractmethod
    def file(self, name: str) -> pathlib.Path:
        """A file on disk with the content of ``name``; files that belong to it (``name.data``) lie beside it."""

    def verify(self, names: Iterable[str]) -> None:
        """Compare the hashes of ``names`` with the manifest.

        Raises:
            LoadError: One differs, or is not in the manifest.
        """
        parts: list[tuple[str, FileRecord, memoryview]] = []
        for name in names:
            record = self._record(name)
            parts.append((name, record, _view(self.extent(name))))
        check_bytes(parts, str(self.location))

    def belonging(self, name: str) -> list[str]:
        """``name`` and the files that belong to it, such as the external data of a model."""
        return [other for other in self.manifest.files if other == name or other.startswith(f"{name}.")]

    def _record(self, name: str) -> FileRecord:
        if name not in self.manifest.files:
            raise LoadError(f"{MANIFEST} does not list {name}", where=str(self.location))
        return self.manifest.files[name]

    def _check_size(self, name: str, record: FileRecord) -> None:
        size = self.extent(name).size
        if size != record.size:
            raise LoadError(
                f"{name} has {size} bytes, {MANIFEST} says {record.size}",
                where=str(self.location),
                hint="copy the artifact again or compile it again",
            )

    def _read_manifest(self) -> bytes:
        extent = self.extent(MANIFEST)
        if extent.size > _MAX_MANIFEST:
            raise LoadError(f"{MANIFEST} has {extent.size} bytes", where=str(self.location))
        with extent.path.open("rb") as file:
            file.seek(extent.offset)
            return file.read(extent.size)


def _view(extent: Extent) -> memoryview:
    if extent.size == 0:
        return memoryview(b"")
    start = extent.offset - extent.offset % mmap.ALLOCATIONGRANULARITY
    with extent.path.open("rb") as file:
        length = extent.size + extent.offset - start
        data = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ, offset=start)
    return memoryview(data)[extent.offset - start :]


class FolderStore(Store):
    """An artifact as a folder."""

    def extent(self, name: str) -> Extent:
        path = self.location / name
        if not path.is_file():
            raise LoadError(f"there is no {name} in it", where=str(self.location), hint=_NOT_COMPLETE)
        return Extent(path, 0, path.stat().st_size)

    def file(self, name: str) -> pathlib.Path:
        return self.extent(name).path


class ZipStore(Store):
    """An artifact as one zip of stored members; what must be a file of its own is extracted when it is asked for."""

    def __init__(self, path: pathlib.Path) -> None:
        try:
            with zipfile.ZipFile(path) as archive:
                self._members = {info.filename: info for info in archive.infolist()}
        except (zipfile.BadZipFile, OSError) as error:
            raise LoadError(f"cannot read it as a zip: {error}", where=str(path)) from error
        self._extracted: pathlib.Path | None = None
        super().__init__(path)

    def extent(self, name: str) -> Extent:
        info = self._members.get(name)
        if info is None:
            raise LoadError(f"there is no {name} in it", where=str(self.location), hint=_NOT_COMPLETE)
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise LoadError(
                f"{name} is compressed, so it cannot be mapped", where=str(self.location), hint="use `zip -0`"
            )
        with self.location.open("rb") as file:
            file.seek(info.header_offset)
            header = file.read(_LOCAL_HEADER)
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        return Extent(self.location, info.header_offset + _LOCAL_HEADER + lengths, info.file_size)

    def file(self, name: str) -> pathlib.Path:
        if self._extracted is None:
            self._extracted = pathlib.Path(tempfile.mkdtemp(prefix="mmopt-"))
            weakref.finalize(self, shutil.rmtree, self._extracted, ignore_errors=True)
        for member in self.belonging(name):
            path = self._extracted / member
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                self._copy(self.extent(member), path)
        return self._extracted / name

    @staticmethod
    def _copy(extent: Extent, path: pathlib.Path) -> None:
        with path.open("wb") as file:
            file.write(_view(extent))


_NOT_COMPLETE = "the artifact is incomplete; copy it again or compile it again"


def is_artifact(path: pathlib.Path) -> bool:
    """Whether ``path`` is a folder or zip that mmopt wrote, complete or not."""
    try:
        if path.is_dir():
            text = (path / MANIFEST).read_bytes()
        else:
            with zipfile.ZipFile(path) as archive:
                text = archive.read(MANIFEST)
        return bool(json.loads(text)["format"] == FORMAT)
    except (OSError, KeyError, TypeError, ValueError, zipfile.BadZipFile):
        return False


def open_store(path: str | os.PathLike[str]) -> Store:
    """Open the artifact at ``path``.

    Raises:
        LoadError: There is nothing, or something else, or an incomplete artifact.
    """
    location = pathlib.Path(path)
    if not location.exists():
        raise LoadError("there is no such file or folder", where=str(location))
    if location.is_dir():
        return FolderStore(location)
    if zipfile.is_zipfile(location):
        return ZipStore(location)
    raise LoadError("is neither an artifact's folder nor its zip", where=str(location))
