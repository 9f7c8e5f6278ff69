"""Every error mmopt raises on purpose, with the process exit code it maps to on the command line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class MmoptError(Exception):
    """Root of all errors mmopt raises.

    Args:
        what: What is wrong, with the value that is wrong.
        where: The place: file, node name, operator, shape.
        hint: What the reader can do about it.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, where: str = "", hint: str = "") -> None:
        self.what, self.where, self.hint = what, where, hint
        text = f"{where}: {what}" if where else what
        super().__init__(f"{text}\n  {hint}" if hint else text)


class UserError(MmoptError):
    """The request itself is wrong: an option, a name, a file of inputs."""

    exit_code = 2


class LoadError(UserError):
    """The model file or module cannot be read as a model."""

    exit_code = 3


class UnsupportedError(MmoptError):
    """The model is valid, but something in it cannot run on the chosen target."""

    exit_code = 4


class BackendError(MmoptError):
    """Compiling or running failed inside a backend."""

    exit_code = 4


class PassError(MmoptError):
    """A pass raised, or broke the module, and the run is strict."""

    exit_code = 4


class VerifyError(MmoptError):
    """Two models that must agree do not."""

    exit_code = 5


class ContractError(MmoptError):
    """An accuracy, latency or size contract was missed."""

    exit_code = 6


class RegressionError(MmoptError):
    """A benchmark got worse by more than is allowed."""

    exit_code = 7


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint that names the nearest of ``known``, and all of them when there are few."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if near:
        return f"did you mean {near[0]!r}?"
    shown = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
    return f"known: {shown}" if names else "there are none"
