"""Where a command speaks: results on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from mmopt.errors import UserError

_WIDE = 500

Verbose = Annotated[int, typer.Option("--verbose", "-v", count=True, help="Say more; show tracebacks.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only results and errors.")]
JsonFile = Annotated[
    pathlib.Path | None,
    typer.Option("--json", metavar="FILE", help="Write everything that is printed as JSON; - for stdout."),
]


@dataclasses.dataclass
class Output:
    """How much a command says, and where.

    Attributes:
        verbose: 0 for the usual amount, more for more.
        quiet: Results and errors only.
        json_file: Where the results go as JSON; ``-`` is stdout, which then gets nothing else.
    """

    verbose: int = 0
    quiet: bool = False
    json_file: pathlib.Path | None = None

    def __post_init__(self) -> None:
        if self.quiet and self.verbose:
            raise UserError("--verbose and --quiet exclude each other")
        if self.json_file is not None and not self._json_to_stdout and not self.json_file.parent.is_dir():
            raise UserError(f"there is no folder {self.json_file.parent}", where="--json", hint="create it first")
        # Lines in a file or a pipe are not wrapped: programs read them.
        self._out = Console(width=None if sys.stdout.isatty() else _WIDE, highlight=False)
        self._err = Console(stderr=True, width=None if sys.stderr.isatty() else _WIDE, highlight=False)

    @property
    def _json_to_stdout(self) -> bool:
        return str(self.json_file) == "-"

    def result(self, item: str | Table) -> None:
        """Print a line or a table of the result."""
        if not self._json_to_stdout:
            self._out.print(item, markup=False, soft_wrap=isinstance(item, str))

    def say(self, text: str, *, level: int = 0) -> None:
        """Tell what goes on; ``level`` 1 needs ``-v``."""
        if not self.quiet and self.verbose >= level:
            self._err.print(text, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Tell what the reader must not miss."""
        self._err.print(f"warning: {text}", markup=False, soft_wrap=True)

    def json(self, data: Mapping[str, Any]) -> None:
        """Write ``data`` where ``--json`` says, if it was given.

        Raises:
            UserError: The file cannot be written.
        """
        if self.json_file is None:
            return
        text = json.dumps(finite({"schema_version": 1, **data}), indent=2, default=str, allow_nan=False) + "\n"
        if self._json_to_stdout:
            sys.stdout.write(text)
            return
        try:
            self.json_file.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot be written: {error.strerror}", where=str(self.json_file)) from error

    @contextlib.contextmanager
    def steps(self, title: str) -> Iterator[Steps]:
        """A bar with the step at hand and the time left; without a terminal, plain lines."""
        if self.quiet or not sys.stderr.isatty():
            yield Steps(self, title)
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self._err, transient=True) as bar:
            yield Steps(self, title, bar)


class Steps:
    """Progress of one piece of work. Use :meth:`Output.steps`."""

    def __init__(self, output: Output, title: str, bar: Progress | None = None) -> None:
        self._output, self._title, self._bar = output, title, bar
        self._task = bar.add_task(title, total=None) if bar else None
        self._said: set[str] = set()

    def at(self, index: int, total: int, name: str) -> None:
        """Step ``index`` of ``total``, from 0, begins."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=index, total=total, description=f"{self._title}: {name}")
        elif (key := f"{index} {name}") not in self._said:  # once, however many rounds there are
            self._said.add(key)
            self._output.say(f"{self._title} [{index + 1}/{total}] {name}")


def finite(value: Any) -> Any:
    """``value`` with NaN and infinities, which JSON does not have, as None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, title: str = "") -> Table:
    """A table whose columns of numbers are aligned to the right."""
    made = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(_is_number(row[index]) for row in rows)
        made.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(str(cell)) for cell in row))
    return made


def _is_number(cell: object) -> bool:
    text = str(cell).strip()
    return text in ("", "-", "?") or re.match(r"[-+]?[\d,]*\.?\d+(e[-+]?\d+)?( ?[a-zA-Zµ%]{0,2})?$", text) is not None


def size_text(nbytes: float) -> str:
    """Bytes for people: ``1.5 MB`` (decimal units, as file managers show them)."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000 or unit == "GB":
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    raise AssertionError("unreachable")


def time_text(seconds: float) -> str:
    """A duration for people: ``12.3 ms``."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"
