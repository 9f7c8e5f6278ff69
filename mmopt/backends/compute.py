"""Lazy tensors: what a kernel computes, before anyone decides how.

A :class:`Tensor` is a shape, a dtype and a rule that gives the scalar expression at an index. Operators are written
against it once; a backend's emitter turns a connected group of tensors into one kernel with loops for its target.
Rules are plain closures: reading ``t[i, j]`` inside a rule asks the emitter at work either for a load from memory or
for the inlined rule of ``t``, so fusion is nothing but a decision not to store.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from tvm import tirx
from tvm.ir import Expr

if TYPE_CHECKING:
    from mmopt.backends.cpu.choosing import Workload

Body = Callable[..., Any]


class Loader(Protocol):
    """The emitter side of reading an element."""

    def load(self, tensor: Tensor, indices: tuple[Expr, ...]) -> Expr: ...

    def guarded(self) -> contextlib.AbstractContextManager[None]: ...


_LOADER: contextvars.ContextVar[Loader] = contextvars.ContextVar("loader")


@contextlib.contextmanager
def loading_with(loader: Loader) -> Iterator[None]:
    """Make ``loader`` answer element reads inside the block."""
    token = _LOADER.set(loader)
    try:
        yield
    finally:
        _LOADER.reset(token)


def index(value: int | Expr) -> Expr:
    """``value`` as a 64-bit index expression."""
    if isinstance(value, int):
        return tirx.const(value, "int64")
    return value if str(value.ty) == "int64" else value.astype("int64")


class Tensor:
    """A lazily computed array.

    Attributes:
        shape: Extents as int64 expressions, constants or symbolic.
        dtype: TVM dtype name of an element.
        name: A hint for generated code.
    """

    def __init__(self, shape: Sequence[int | Expr], dtype: str, name: str) -> None:
        self.shape: tuple[Expr, ...] = tuple(index(s) for s in shape)
        self.dtype = dtype
        self.name = name

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __getitem__(self, indices: Any) -> Expr:
        wanted = indices if isinstance(indices, tuple) else (indices,)
        if len(wanted) != self.ndim:
            raise IndexError(f"{self.name} has {self.ndim} axes, got {len(wanted)} indices")
        return _LOADER.get().load(self, tuple(index(i) for i in wanted))

    def __repr__(self) -> str:
        dims = ", ".join(str(s) for s in self.shape)
        return f"{type(self).__name__}({self.name}: {self.dtype}[{dims}])"


class Source(Tensor):
    """An array in memory: a kernel parameter."""


class Map(Tensor):
    """Each element by a rule of its own indices: elementwise, broadcast, gather, view, padding."""

    def __init__(self, shape: Sequence[int | Expr], dtype: str, body: Body, name: str = "map") -> None:
        super().__init__(shape, dtype, name)
        self.body = body


@dataclasses.dataclass(frozen=True)
class Combiner:
    """An associative, commutative reduction.

    Attributes:
        identity: Values of an empty reduction, one for each component, from the component dtypes.
        combine: Merges two states.
        simple: Single-component and free to be split into lanes.
    """

    identity: Callable[[tuple[str, ...]], tuple[Expr, ...]]
    combine: Callable[[tuple[Expr, ...], tuple[Expr, ...]], tuple[Expr, ...]]
    simple: bool = True


def _constants(value: float) -> Callable[[tuple[str, ...]], tuple[Expr, ...]]:
    return lambda dtypes: tuple(tirx.const(value, d) for d in dtypes)


SUM = Combiner(_constants(0), lambda a, b: (a[0] + b[0],))
PRODUCT = Combiner(_constants(1), lambda a, b: (a[0] * b[0],))
MAXIMUM = Combiner(lambda dtypes: (tirx.min_value(dtypes[0]),), lambda a, b: (tirx.max(a[0], b[0]),))
MINIMUM = Combiner(lambda dtypes: (tirx.max_value(dtypes[0]),), lambda a, b: (tirx.min(a[0], b[0]),))


class Reduction(Tensor):
    """Each element by combining a rule over extra axes.

    Args:
        shape: Extents of the result.
        axes: Extents of the reduced axes.
        dtypes: Dtypes of the state's components; the result is ``finish(state)``.
        body: ``body(*indices, *reduced)`` gives the state of one element (an expression, or a tuple of them).
        combiner: How states merge.
        finish: Result from the final state; the first component when absent.
        dtype: Result dtype; the first component's when absent.
    """

    def __init__(
        self,
        shape: Sequence[int | Expr],
        axes: Sequence[int | Expr],
        dtypes: Sequence[str],
        body: Body,
        combiner: Combiner,
        finish: Callable[[tuple[Expr, ...]], Expr] | None = None,
        dtype: str | None = None,
        name: str = "reduce",
    ) -> None:
        super().__init__(shape, dtype or dtypes[0], name)
        self.axes = tuple(index(a) for a in axes)
        self.dtypes = tuple(dtypes)
        self._body = body
        self.combiner = combiner
        self.finish = finish or (lambda state: state[0])

    def body(self, *indices: Expr) -> tuple[Expr, ...]:
        result = self._body(*indices)
        return result if isinstance(result, tuple) else (result,)


Sink = Callable[[Sequence[Expr], Expr], Any]
"""Takes (indices, value) of one element a loop nest produced; gives the statement that consumes it."""


class LoopNest:
    """Hand-written loops with one or more results: a kernel template with its parameters chosen.

    Subclasses set ``inputs`` and call :meth:`result` for each output in order.

    Attributes:
        workload: What its parameters were chosen for, where there was a choice; links the kernel to that choice.
    """

    inputs: tuple[Tensor, ...] = ()
    name: str = "loops"
    workload: Workload | None = None

    def __init__(self) -> None:
        self.results: list[LoopResult] = []

    def result(self, shape: Sequence[int | Expr], dtype: str, name: str = "") -> LoopResult:
        """Declare the next output."""
        out = LoopResult(shape, dtype, name or f"{self.name}_{len(self.results)}", self, len(self.results))
        self.results.append(out)
        return out

    def parameters(self) -> Mapping[str, object]:
        """The parameters it was made with, for reports."""
        return {}

    def emit(self, kernel: Any, sinks: Sequence[Sink]) -> Any:
        """Statements that produce every output element once and hand it to the output's sink."""
        raise TypeError(f"{type(self).__name__} does not emit")


class LoopResult(Tensor):
    """One output of a :class:`LoopNest`."""

    def __init__(self, shape: Sequence[int | Expr], dtype: str, name: str, nest: LoopNest, position: int) -> None:
        super().__init__(shape, dtype, name)
        self.nest = nest
        self.position = position


def compute(shape: Sequence[int | Expr], dtype: str, body: Body, name: str = "map") -> Map:
    """Shorthand for :class:`Map`."""
    return Map(shape, dtype, body, name)


def guarded(condition: Expr, then: Callable[[], Expr], other: Expr) -> Expr:
    """``then()`` where ``condition`` holds, else ``other``; reads in ``then`` happen only where it holds."""
    with _LOADER.get().guarded():
        value = then()
    return tirx.if_then_else(condition, value, other)
