"""How a template's parameters are chosen: by its own prediction, or by what has been measured.

A template describes what it has to do as a :class:`Workload`, offers a few :class:`Candidate` parameter sets with the
cycles its analytic model predicts, and asks the program's :class:`Chooser`::

    workload = Workload("matmul", (("m", dim(rows)), ("n", 768), ("k", 768)), ("float32",), operations=2 * m * n * k)
    options = [Candidate({"rows": tile.rows, "vectors": tile.vectors}, cycles(tile)) for tile in tiles]
    best = context.program.chooser.choose(workload, options)
    nest = Matmul(…, rows=best.number("rows"), vectors=best.number("vectors"))
    nest.workload = workload

The list of candidates is the template's tunable space: tuning measures its members and no others, and a member is
recognised by its parameters. The workload on the nest links the kernel to the choice, for reports and for tuning.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from tvm import sym, tirx
from tvm.ir import Expr

from mmopt.backends.expressions import variables

Parameter = int | str | bool

UNKNOWN = "?"
"""An extent that is known only at run time."""

TYPICAL = 128
"""Size at which an unknown extent is predicted and measured."""


def dim(extent: int | Expr) -> int | str:
    """An extent as workloads state it: a number, or :data:`UNKNOWN`."""
    if isinstance(extent, int):
        return extent
    return int(extent.value) if isinstance(extent, tirx.IntImm) else UNKNOWN


def typical(extent: int | str, otherwise: int = TYPICAL) -> int:
    """``extent``, or ``otherwise`` when it is unknown: what predictions are made for."""
    return otherwise if isinstance(extent, str) else extent


@dataclasses.dataclass(frozen=True)
class Workload:
    """What one kernel has to do, as far as it matters for its parameters.

    Attributes:
        template: Name of the template.
        dims: Extents and other facts by name, in the template's own order; :data:`UNKNOWN` for symbolic extents.
        dtypes: Element types of the operands and of the accumulator, in the template's own order.
        operations: Arithmetic operations of the whole workload, a multiply-add being two; 0 when nobody counts them.
            Unknown extents count as typical. Not part of the identity.
    """

    template: str
    dims: tuple[tuple[str, int | str], ...]
    dtypes: tuple[str, ...]
    operations: float = dataclasses.field(default=0.0, compare=False)

    def key(self) -> str:
        """Text that is equal for equal workloads in every process: ``matmul(m=128,n=768):float32``."""
        dims = ",".join(f"{name}={value}" for name, value in self.dims)
        return f"{self.template}({dims}):{','.join(self.dtypes)}"


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to instantiate a template.

    Attributes:
        parameters: Names and values; the template can be built from these alone.
        cycles: Predicted cycles of the whole workload on one core.
    """

    parameters: Mapping[str, Parameter]
    cycles: float

    def __getitem__(self, name: str) -> Parameter:
        return self.parameters[name]

    def number(self, name: str) -> int:
        """The integer parameter ``name``."""
        return int(self.parameters[name])

    def __hash__(self) -> int:
        return hash((tuple(self.parameters.items()), self.cycles))


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was chosen for a workload, and from what.

    Attributes:
        workload: What for.
        candidates: All that was offered.
        chosen: One of them.
        measured: Whether a measurement decided; otherwise the prediction did.
    """

    workload: Workload
    candidates: tuple[Candidate, ...]
    chosen: Candidate
    measured: bool

    def to_json(self) -> dict[str, object]:
        """What an artifact's kernel table says about it."""
        return {
            "workload": self.workload.key(),
            "operations": self.workload.operations,
            "choice": dict(self.chosen.parameters),
            "cycles": self.chosen.cycles,
            "candidates": len(self.candidates),
            "measured": self.measured,
        }


Known = Callable[[Workload], Mapping[str, Parameter] | None]
"""Gives the parameters that have been found best for a workload, or None."""


def nothing_known(workload: Workload) -> None:
    """A :data:`Known` without any measurements."""
    return None


class Chooser:
    """Chooses among a template's candidates, and remembers each choice.

    Args:
        known: Asked for the best measured parameters of a workload. Parameters that the template no longer offers are
            ignored.
    """

    def __init__(self, known: Known = nothing_known) -> None:
        self._known = known
        self._choices: dict[Workload, Choice] = {}

    def choose(self, workload: Workload, candidates: Sequence[Candidate]) -> Candidate:
        """The best of ``candidates``: the measured one if there is one, else the first of least predicted cycles.

        Args:
            workload: What has to be done.
            candidates: One or more, the analytic default first among equals.
        """
        if not candidates:
            raise ValueError(f"{workload.key()} has no candidates")
        wanted = self._known(workload)
        found = None if wanted is None else next((c for c in candidates if c.parameters == wanted), None)
        chosen = found or min(candidates, key=lambda candidate: candidate.cycles)
        self._choices[workload] = Choice(workload, tuple(candidates), chosen, measured=found is not None)
        return chosen

    def choice(self, workload: Workload) -> Choice | None:
        """What was chosen for ``workload``, if it has been asked for."""
        return self._choices.get(workload)

    def choices(self) -> list[Choice]:
        """All choices made, in order of the first request."""
        return list(self._choices.values())


def plausible_size(name: str) -> int:
    """What an extent of that name may be at run time: 1 for a batch, else typical."""
    return 1 if "batch" in name.lower() or name in ("N", "n", "b", "B") else TYPICAL


def plausible(extent: Expr, sizes: Mapping[Expr, int] | None = None) -> int:
    """An extent with plausible sizes for what is known only at run time.

    Args:
        extent: A number or an expression.
        sizes: Sizes of some of its variables.
    """
    if isinstance(extent, tirx.IntImm):
        return int(extent.value)
    analyzer = sym.Analyzer()
    for variable in variables(extent):
        size = (sizes or {}).get(variable, plausible_size(str(variable.name)))
        analyzer.bind(variable, tirx.const(size, "int64"))
    found = analyzer.simplify(extent)
    return int(found.value) if isinstance(found, tirx.IntImm) else TYPICAL
