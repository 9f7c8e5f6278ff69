"""``mmopt``: finds the command, runs it, and turns every way it can fail into a message and an exit code."""

from __future__ import annotations

import importlib
import os
import platform
import sys
import tempfile
import traceback
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from mmopt.errors import MmoptError, did_you_mean

COMMANDS = (
    *("optimize", "inspect", "verify", "run", "bench", "tune", "calibrate", "distill", "passes", "targets"),
    "runner",
)
"""Commands in the order of the help; each is ``app`` in the module of ``mmopt.cli`` with its name."""

INTERRUPTED = 130


def _named(kind: type, name: str) -> type[Exception]:
    return next(base for base in kind.__mro__ if base.__name__ == name)


# Newer typer brings its own click, older typer imports the package; the class is found through what both export.
_UsageError: Any = _named(typer.BadParameter, "UsageError")


class _Commands(TyperGroup):
    """Imports a command when it is asked for, so that ``mmopt run`` does not load the compiler."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        command = typer.main.get_command(importlib.import_module(f"mmopt.cli.{cmd_name}").app)
        command.name = cmd_name
        return command

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            ctx.fail(f"there is no command {args[0]!r}; {did_you_mean(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"mmopt {version('mmopt')}")
        raise typer.Exit


@app.callback()
def mmopt(version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True)) -> None:
    """Optimize and compile multimodal models, and prove that nothing changed."""


def run(arguments: Sequence[str]) -> int:
    """Run one command line (without the program's name).

    Returns:
        The exit code: 0 success, 1 internal error, 2 usage, 3 the model cannot be loaded, 4 compiling or running
        failed, 5 verification failed, 6 a contract was missed, 7 benchmark regression.
    """
    try:
        result = typer.main.get_command(app).main(list(arguments), prog_name="mmopt", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except typer.Exit as stop:
        return int(stop.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _complain("interrupted")
        return INTERRUPTED
    except Exception as error:
        return _report(error, arguments)


def _report(error: Exception, arguments: Sequence[str]) -> int:
    """Say what went wrong, and give the exit code for it."""
    verbose = any(argument in ("-v", "-vv", "--verbose") for argument in arguments)
    if isinstance(error, _UsageError):
        return _usage(error)
    if isinstance(error, BrokenPipeError):
        # Whoever read our output has gone; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if not isinstance(error, MmoptError | OSError | MemoryError):
        return _internal(error, arguments, verbose)
    if verbose:
        traceback.print_exception(error)
    if isinstance(error, MmoptError):
        _complain(f"error: {error}")
        return error.exit_code
    _complain("error: out of memory" if isinstance(error, MemoryError) else f"error: {error}")
    return 4


def _usage(error: Any) -> int:
    message = error.format_message()
    option = getattr(error, "option_name", "")
    if option and "did you mean" not in message.lower() and error.ctx is not None:
        known = [name for parameter in error.ctx.command.params for name in parameter.opts]
        message += f" {did_you_mean(option, known)}"
    path = error.ctx.command_path if error.ctx is not None else "mmopt"
    _complain(f"error: {message}\n  see {path} --help")
    return 2


def _internal(error: Exception, arguments: Sequence[str], verbose: bool) -> int:
    """A bug: keep what is needed to find it."""
    descriptor, path = tempfile.mkstemp(prefix="mmopt-", suffix=".log")
    with os.fdopen(descriptor, "w", encoding="utf-8") as log:
        log.write(f"mmopt {' '.join(arguments)}\npython {sys.version}\n{platform.platform()}\n\n")
        traceback.print_exception(error, file=log)
    if verbose:
        traceback.print_exception(error)
    _complain(f"internal error: {type(error).__name__}: {error}\n  this is a bug in mmopt; the log is {path}")
    return 1


def _complain(message: str) -> None:
    print(message, file=sys.stderr)


def entry() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    entry()
