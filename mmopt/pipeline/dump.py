"""Writes the module to a folder after every pass, for people who look for the one that went wrong."""

from __future__ import annotations

import pathlib

from mmopt.ir.module import Module
from mmopt.ir.text import to_text


class Dump:
    """Numbered text files, ``000-input.txt``, ``001-fold-constants.txt``, …

    Args:
        folder: Where to write; made when missing. None writes nothing.
    """

    def __init__(self, folder: pathlib.Path | None) -> None:
        self._folder = folder
        self._count = 0
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, module: Module) -> None:
        """Write ``module`` under the next number; of a module too broken to print, the reason is written."""
        if self._folder is None:
            return
        try:
            text = to_text(module)
        except Exception as error:  # a rejected module can be broken in any way, and its dump is wanted most
            text = f"the module cannot be printed: {type(error).__name__}: {error}\n"
        (self._folder / f"{self._count:03d}-{name}.txt").write_text(text, encoding="utf-8")
        self._count += 1
