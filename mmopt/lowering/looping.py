"""Repetition in a virtual machine that has calls and branches, but no jumps back.

A trip is a function from a state to the next one. ``run(level)`` makes up to 2**level trips: two times
``run(level - 1)``, unless the state says that no trip is left. ``grow(level)`` is ``run(level)``, then
``grow(level + 1)``. So any number of trips needs a depth of calls that only grows with its logarithm, and the values
that trips put out are joined in pairs, each copied as often as the logarithm says.

    state  = (number of the next trip, whether it happens, carried values…)
    result = (state…, what the trips put out, stacked along a new first axis…)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from tvm import relax, tirx
from tvm.ir import Expr, GlobalVar

from mmopt.backends.compute import Map, Source, Tensor, guarded, index
from mmopt.backends.expressions import same, simplify, variables
from mmopt.lowering.function import FunctionLowering
from mmopt.lowering.values import NotLowered, Value

Trip = Callable[[FunctionLowering, Value, Sequence[Value]], tuple["Value | None", list[Value]]]
"""Lowers one trip inside a function: from (function, number of the trip, carried values) to (whether another one
follows, carried values and then what the trip puts out). ``None`` for a condition that always holds."""


def opaque(type_: relax.Type) -> relax.Type:
    """A type without extents: what a function accepts that only hands a value on."""
    if isinstance(type_, relax.TensorType):
        return relax.TensorType(None, str(type_.dtype), ndim=type_.ndim)
    return type_


def tensor_type(value: Value | Tensor) -> relax.TensorType:
    """Rank and element type of a value."""
    return relax.TensorType(None, value.dtype, ndim=value.ndim)


def result_types(values: Sequence[Value]) -> relax.TupleType:
    """What a function returns that gives ``values``, whatever their extents."""
    return relax.TupleType([tensor_type(v) for v in values])


@dataclasses.dataclass
class _Step:
    """A lowered trip.

    Attributes:
        handle: The function.
        captured: Values of the outer function that it takes.
        shapes: Extents of the carried values: of the outer function where no trip changes them, ``None`` elsewhere.
        pieces: What it puts out, with a first axis of extent one.
    """

    handle: GlobalVar
    captured: list[Value]
    shapes: list[list[Expr | None]]
    pieces: list[Value]


class Repetition:
    """A loop in the function ``context``.

    Args:
        context: Where the loop is.
        name: For the names of functions.
        trips: Largest number of trips, a scalar; ``None`` for no limit.
        condition: Whether the first trip happens; ``None`` when it holds and always will.
        carried: First values of the state.
    """

    def __init__(
        self,
        context: FunctionLowering,
        name: str,
        trips: Value | None,
        condition: Value | None,
        carried: Sequence[Value],
    ) -> None:
        self.context, self.name = context, name
        self.trips = None if trips is None else _scalar(context, trips, "int64")
        self.condition = None if condition is None else _scalar(context, condition, "bool")
        self.carried = list(carried)

    def emit(self, trip: Trip) -> list[Value]:
        """Lower the loop.

        Returns:
            The carried values after the last trip, then what the trips put out, stacked along a new first axis.

        Raises:
            NotLowered: The body has no lowering, or a trip changes the rank or type of what is carried.
        """
        for value in self.carried:
            self.context.dense(value)
        if self.trips is not None and self.trips.constant is None and self.trips.elements is None:
            self.context.dense(self.trips)
        step = self._step(trip)
        functions = _Functions(self.context, self.name, step, self._types(step))
        return self._call(functions.grow(), step)

    # -- one trip ----------------------------------------------------------------------------------------------------

    def _step(self, trip: Trip) -> _Step:
        shapes: list[list[Expr | None]] = [list(v.shape) for v in self.carried]
        while True:
            step, changed = self._lowered(trip, shapes)
            if not changed:
                return step

    def _lowered(self, trip: Trip, shapes: list[list[Expr | None]]) -> tuple[_Step, bool]:
        """Lower a trip that keeps the extents in ``shapes``; those it does not keep are taken out of them."""
        inner = self.context.child("trip")
        outer = list(self.context.symbols.values())
        with inner.body() as body:
            number = inner.bind_argument(Source((), "int64", "number"))
            inner.receive(relax.TensorType((), "bool"), "going")
            state = [inner.bind_argument(_carried(inner, v, s)) for v, s in zip(self.carried, shapes, strict=True)]
            going, results = trip(inner, number, state)
            after, pieces = results[: len(state)], results[len(state) :]
            changed = [_generalize(a, b, s) for a, b, s in zip(state, after, shapes, strict=True)]
            stacked = [inner.reshape(p, (1, *p.shape)) for p in pieces]
            counters = self._counters(inner, number, going)
            inner.realize(counters, "next")
            body.finish([*counters, *after, *stacked], symbols=outer)
        for piece in pieces:
            if any(not variables(d) <= set(outer) for d in piece.shape):
                raise NotLowered("the extents of what a trip puts out are only known at run time")
        handle = self.context.program.add_function(body.function, inner.name)
        return _Step(handle, inner.captured, shapes, stacked), any(changed)

    def _counters(self, inner: FunctionLowering, number: Value, going: Value | None) -> list[Value]:
        here = number.tensor
        following = Value(Map((), "int64", lambda: here[()] + 1, "number"))
        return [following, self._flag(inner, following.tensor, going)]

    def _flag(self, inner: FunctionLowering, number: Tensor, going: Value | None) -> Value:
        """Whether trip ``number`` happens."""
        flag = None if going is None else _scalar(inner, going, "bool").tensor
        limit = None
        if self.trips is not None:
            limit = (self.trips if inner is self.context else inner.capture(self.trips)).tensor

        def body() -> Expr:
            held = tirx.const(True, "bool") if flag is None else flag[()]
            return held if limit is None else tirx.all(held, number[()] < limit[()])

        return Value(Map((), "bool", body, "going"))

    # -- the call ----------------------------------------------------------------------------------------------------

    def _types(self, step: _Step) -> relax.TupleType:
        counters = [relax.TensorType((), "int64"), relax.TensorType((), "bool")]
        return relax.TupleType([*counters, *(tensor_type(v) for v in [*self.carried, *step.pieces])])

    def _call(self, grow: GlobalVar, step: _Step) -> list[Value]:
        context = self.context
        number = Value(Map((), "int64", lambda: tirx.const(0, "int64"), "number"))
        going = self._flag(context, number.tensor, self.condition)
        level = Value(Map((), "int64", lambda: tirx.const(0, "int64"), "level"))
        start = [level, number, going, *self.carried]
        arguments = [context.var(context.dense(v)) for v in start]
        result = context.builder.emit(relax.Call(grow, [*arguments, *context.hand_over(step.captured)]))
        shapes = [[d if d is not None else context.fresh_symbol("carried") for d in shape] for shape in step.shapes] + [
            [self._stack_extent(), *piece.shape[1:]] for piece in step.pieces
        ]
        made = []
        for n, (value, shape) in enumerate(zip([*self.carried, *step.pieces], shapes, strict=True)):
            made.append(context.match(relax.TupleGetItem(result, n + 2), shape, value.dtype, f"{self.name}_{n}"))
        for value in made[: len(self.carried)]:  # without a trip, these are the first values themselves
            context.borrow(value)
        return made

    def _stack_extent(self) -> Expr:
        """The number of trips, where nothing but their limit ends the loop."""
        if self.condition is None and self.trips is not None and self.trips.elements is not None:
            extent = simplify(index(self.trips.elements.reshape(-1)[0]))
            known = isinstance(extent, tirx.IntImm | tirx.Var)
            return tirx.max(extent, index(0)) if isinstance(extent, tirx.IntImm) else extent if known else self._fresh()
        return self._fresh()

    def _fresh(self) -> Expr:
        return self.context.fresh_symbol("trips")


def _scalar(context: FunctionLowering, value: Value, dtype: str) -> Value:
    flat = context.reshape(value, [])
    if flat.dtype != dtype:
        raise NotLowered(f"a {flat.dtype} where a loop needs {dtype}")
    return flat


def _carried(inner: FunctionLowering, first: Value, shape: Sequence[Expr | None]) -> Source:
    extents = [d if d is not None else inner.fresh_symbol("carried") for d in shape]
    return Source(extents, first.dtype, "carried")


def _generalize(before: Value, after: Value, shape: list[Expr | None]) -> bool:
    """Take the extents a trip changes out of ``shape``."""
    if before.dtype != after.dtype:
        raise NotLowered(f"a trip makes {after.dtype} of a carried {before.dtype}")
    if before.ndim != after.ndim:
        raise NotLowered(f"a trip makes {after.ndim} axes of {before.ndim} of a carried value")
    changed = [n for n, d in enumerate(shape) if d is not None and not same(before.shape[n], after.shape[n])]
    for n in changed:
        shape[n] = None
    return bool(changed)


class _Functions:
    """The functions around a trip. All take (level, number, going, carried…, captured…, sizes, weights).

    Attributes:
        types: What all of them return.
    """

    def __init__(self, context: FunctionLowering, name: str, step: _Step, types: relax.TupleType) -> None:
        self._context, self._name, self._step, self.types = context, name, step, types
        self._size = len(types.fields) - len(step.pieces)
        self._symbols = list(context.symbols.values())
        self._handed = [opaque(v.ty) for v in context.hand_over(step.captured)]
        level = relax.TensorType((), "int64")
        self._own = [level, *types.fields[: self._size], *self._handed[: len(self._handed) - self._tail]]

    def grow(self) -> GlobalVar:
        """Define all functions; returns the outermost one."""
        run, grow = self._declare("run"), self._declare("grow")
        stop = self._stop()
        twice = self._joined("twice", run, run, first=-1, second=0)
        more = self._joined("more", run, grow, first=0, second=1)
        self._define(
            run, lambda going, params: relax.If(going, relax.Call(self._leaf(twice), params), relax.Call(stop, params))
        )
        self._define(grow, lambda going, params: relax.If(going, relax.Call(more, params), relax.Call(stop, params)))
        return grow

    def _declare(self, hint: str) -> GlobalVar:
        """A function others can call before it is defined."""
        program = self._context.program
        name = program.unique(f"{self._context.name}_{hint}")
        params = self._params()
        body = relax.call_pure_packed(name, *params, ty_args=[self.types])
        return program.add_function(relax.Function(params, body, self.types, is_pure=True), name)

    def _define(self, handle: GlobalVar, branch: Callable[[relax.Var, list[relax.Var]], relax.If]) -> None:
        params = self._params()
        self._context.program.replace_function(handle, _returning(params, [], branch(params[2], params), self.types))

    def _leaf(self, twice: GlobalVar) -> GlobalVar:
        """One trip at level 0, two halves above."""
        params = self._params()
        call, made = self._scalar(params[0], "bool", lambda level: tirx.EQ(level, index(0)))
        flag = relax.Var("zero", made)
        branch = relax.If(flag, relax.Call(self._step.handle, params[1:]), relax.Call(twice, params))
        function = _returning(params, [relax.VarBinding(flag, call)], branch, self.types)
        program = self._context.program
        return program.add_function(function, program.unique(f"{self._context.name}_leaf"))

    def _stop(self) -> GlobalVar:
        """No trip: the state as it is, and nothing put out."""
        inner = self._context.child("stop")
        with inner.body() as body:
            own = [inner.receive(t, f"a{n}") for n, t in enumerate(self._own)]
            shapes = [((0, *p.shape[1:]), p.dtype) for p in self._step.pieces]
            empty = [Value(Map(s, d, lambda *_, d=d: tirx.const(0, d), "nothing")) for s, d in shapes]
            body.close([*own[1 : 1 + self._size], *inner.results(empty)], self._symbols)
        return self._context.program.add_function(body.function, inner.name)

    def _joined(self, hint: str, one: GlobalVar, other: GlobalVar, first: int, second: int) -> GlobalVar:
        """Calls ``one``, then ``other`` with the state it left; ``first`` and ``second`` are added to their levels."""
        inner = self._context.child(hint)
        with inner.body() as body:
            own = [inner.receive(t, f"a{n}") for n, t in enumerate(self._own)]
            captured = [*own[1 + self._size :], *inner.hand_over([])]
            earlier = inner.builder.emit(
                relax.Call(one, [self._shifted(inner, own[0], first), *own[1:], *captured[-self._tail :]])
            )
            state = [inner.builder.emit(relax.TupleGetItem(earlier, n)) for n in range(self._size)]
            level = self._shifted(inner, own[0], first + second)
            later = inner.builder.emit(relax.Call(other, [level, *state, *captured]))
            after = [inner.builder.emit(relax.TupleGetItem(later, n)) for n in range(self._size)]
            pieces = [self._both(inner, earlier, later, n) for n in range(len(self._step.pieces))]
            body.close([*after, *inner.results(pieces)], self._symbols)
        return self._context.program.add_function(body.function, inner.name)

    def _both(self, inner: FunctionLowering, earlier: relax.Var, later: relax.Var, number: int) -> Value:
        """What both calls put out, one behind the other."""
        piece = self._step.pieces[number]

        def stack(result: relax.Var) -> Tensor:
            shape = [inner.fresh_symbol("stacked"), *piece.shape[1:]]
            item = relax.TupleGetItem(result, self._size + number)
            return inner.match(item, shape, piece.dtype, "stacked").tensor

        front, back = stack(earlier), stack(later)
        border = front.shape[0]

        def body(at: Expr, *rest: Expr) -> Expr:
            behind = guarded(at >= border, lambda: back[(at - border, *rest)], tirx.const(0, piece.dtype))
            return guarded(at < border, lambda: front[(at, *rest)], behind)

        return Value(Map((border + back.shape[0], *piece.shape[1:]), piece.dtype, body, "joined"))

    def _shifted(self, inner: FunctionLowering, level: relax.Var, by: int) -> relax.Var:
        if by == 0:
            return level
        call, _ = self._scalar(level, "int64", lambda value: value + by)
        return inner.builder.emit(call)

    def _scalar(self, level: relax.Var, dtype: str, rule: Callable[[Expr], Expr]) -> tuple[Expr, relax.TensorType]:
        """A kernel on the level."""
        source = Source((), "int64", "level")
        handle, _ = self._context.program.kernel([Map((), dtype, lambda: rule(source[()]), "level")], "level")
        made = relax.TensorType((), dtype)
        return relax.call_tir(handle, [level], made), made

    @property
    def _tail(self) -> int:
        return 2 if self._symbols else 1

    def _params(self) -> list[relax.Var]:
        types = [*self._own, *self._handed[len(self._handed) - self._tail :]]
        return [relax.Var(f"a{n}", t) for n, t in enumerate(types)]


def _returning(
    params: Sequence[relax.Var], before: Sequence[relax.VarBinding], branch: relax.If, types: relax.TupleType
) -> relax.Function:
    """A function that returns what one of two branches gives."""
    result = relax.Var("result", types)
    block = relax.BindingBlock([*before, relax.VarBinding(result, branch)])
    return relax.Function(list(params), relax.SeqExpr([block], result), types, is_pure=True)
