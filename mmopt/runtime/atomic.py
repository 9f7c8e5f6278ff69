"""Replacing an output in one step, so that a killed run leaves the complete old one, the complete new one or none."""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import fcntl
import os
import pathlib
import secrets
import shutil
import sys
from collections.abc import Iterator

from mmopt.errors import UserError

_PARTIAL = ".partial"
_ASIDE = ".replaced"


def _sibling(output: pathlib.Path, suffix: str) -> pathlib.Path:
    return output.with_name(f".{output.name}.{secrets.token_hex(4)}{suffix}")


def _siblings(output: pathlib.Path, suffix: str) -> list[pathlib.Path]:
    digits = "[0-9a-f]" * 8
    return list(output.parent.glob(f".{_escape(output.name)}.{digits}{suffix}"))


def _escape(name: str) -> str:
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)


def check_parent(output: pathlib.Path) -> None:
    """Raise :class:`UserError` unless files can be made beside ``output``."""
    if not output.parent.is_dir():
        raise UserError(f"there is no folder {output.parent}", where=str(output), hint=f"mkdir -p {output.parent}")
    if not os.access(output.parent, os.W_OK | os.X_OK):
        raise UserError(f"the folder {output.parent} cannot be written to", where=str(output))


@contextlib.contextmanager
def staging(output: pathlib.Path) -> Iterator[pathlib.Path]:
    """A locked temporary folder beside ``output``; what killed runs left there is cleaned up first.

    The folder is deleted at the end unless :func:`publish` has moved it.
    """
    check_parent(output)
    clean_up(output)
    folder, descriptor = _make_locked(output)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _make_locked(output: pathlib.Path) -> tuple[pathlib.Path, int]:
    while True:
        folder = _sibling(output, _PARTIAL)
        folder.mkdir()
        descriptor = _lock(folder)
        # Another run may have taken the folder for a leftover between the two calls above.
        if descriptor is not None and folder.exists():
            return folder, descriptor


def _lock(folder: pathlib.Path) -> int | None:
    """A descriptor that holds the lock on ``folder``; None when another process has it or it is gone."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def clean_up(output: pathlib.Path) -> None:
    """Delete what killed runs left beside ``output``; put an output back that was caught half-way through a swap."""
    for aside in _siblings(output, _ASIDE):
        if output.exists():
            _delete(aside)
        else:
            aside.rename(output)
    for folder in _siblings(output, _PARTIAL):
        descriptor = _lock(folder)  # the lock of a killed process is free
        if descriptor is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(descriptor)


def sync_tree(folder: pathlib.Path) -> None:
    """Have every file and folder under ``folder`` reach the disk."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def sync(path: pathlib.Path) -> None:
    """Have one file or folder reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(staged: pathlib.Path, output: pathlib.Path) -> None:
    """Give ``staged``, a file or folder beside ``output``, the name ``output``; the old one is deleted after that.

    On Linux and macOS there is no moment in which neither is there. On file systems that cannot exchange two folders
    the old one is moved aside first, and :func:`clean_up` puts it back should the process die in between.
    """
    if not output.exists() or (output.is_file() and staged.is_file()):
        os.replace(staged, output)
    elif exchange(staged, output):
        _delete(staged)
    else:
        aside = _sibling(output, _ASIDE)
        output.rename(aside)
        staged.rename(output)
        _delete(aside)
    sync(output.parent)


def _delete(path: pathlib.Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def exchange(first: pathlib.Path, second: pathlib.Path) -> bool:
    """Swap the names of two existing paths atomically; False where system or file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(first), os.fsencode(second)
    try:
        if sys.platform == "darwin":
            return int(libc.renamex_np(*names, ctypes.c_uint(2))) == 0  # RENAME_SWAP
        here = ctypes.c_int(-100)  # AT_FDCWD
        return int(libc.renameat2(here, names[0], here, names[1], ctypes.c_uint(2))) == 0  # RENAME_EXCHANGE
    except AttributeError:  # an old C library
        return False
