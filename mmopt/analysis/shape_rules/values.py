"""Elements of small integer tensors: what ``Shape → Gather → Add → Concat`` chains compute, with names kept.

Every rule is exact for all sizes >= 0, or gives ``None``. Element counts stay below ``MAX_ELEMENTS``; booleans are 0
and 1; a float counts while it is a whole number.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import onnx_ir as ir

from mmopt.analysis.dims import Size, at_least, floor_divide, lower_bound, maximum, minimum, modulo, product
from mmopt.analysis.shape_rules.compute import shape_slice
from mmopt.analysis.shape_rules.layout import complete, slice_size
from mmopt.analysis.shape_rules.registry import MAX_ELEMENTS, Elements, NodeView, normalize_axis, value_rule

_Combine = Callable[[Size, Size], "Size | None"]


@value_rule("Shape")
def shape_of(view: NodeView) -> Elements:
    """The dimensions themselves."""
    shape = view.shape()
    return None if shape is None else tuple(shape_slice(view, shape))


@value_rule("Size")
def size_of(view: NodeView) -> Elements:
    """Their product."""
    dims = complete(view.shape() or (None,)) if view.shape() != () else []
    return None if dims is None else (product(dims),)


@value_rule("Identity", "Squeeze", "Unsqueeze", "Reshape", "Flatten", "Transpose")
def copied(view: NodeView) -> Elements:
    """Layout changes keep the order of at most one axis' elements."""
    return view.elements()


@value_rule("Cast")
def cast(view: NodeView) -> Elements:
    """Whole numbers stay, except in a bool."""
    to = view.integer("to", 0)
    if to == ir.DataType.BOOL:
        return _mapped(view.elements(), _truth)
    return view.elements() if to in (*_WHOLE, ir.DataType.FLOAT, ir.DataType.DOUBLE) else None


_WHOLE = (ir.DataType.INT64, ir.DataType.INT32)


def _truth(element: Size) -> Size | None:
    if isinstance(element, int):
        return int(bool(element))
    return 1 if lower_bound(element) > 0 else None


@value_rule("Gather")
def gather(view: NodeView) -> Elements:
    """Picked by constant indices."""
    data, indices = view.elements(0), view.integers(1)
    if data is None or indices is None or not all(-len(data) <= i < len(data) for i in indices):
        return None
    return tuple(data[i] for i in indices)


@value_rule("Slice")
def slice_elements(view: NodeView) -> Elements:
    """A slice with known bounds."""
    data = view.elements(0)
    if data is None or view.version < 10:
        return None
    starts, ends, steps = view.integers(1), view.integers(2), view.integers(4) if view.has(4) else [1]
    if not starts or not ends or not steps or steps[0] == 0:
        return None
    step, end = steps[0], ends[0]
    picked = data[slice(starts[0], None if step < 0 and end < -len(data) else end, step)]
    return picked if len(picked) == slice_size(len(data), starts[0], end, step) else None


@value_rule("Concat")
def concat(view: NodeView) -> Elements:
    """One after the other; a part with unknown elements but known length keeps its place."""
    parts: list[Size | None] = []
    for i in range(len(view.node.inputs)):
        elements, shape = view.elements(i), view.shape(i)
        if elements is None:
            if shape is None or len(shape) != 1 or not isinstance(shape[0], int) or shape[0] > MAX_ELEMENTS:
                return None
            elements = (None,) * shape[0]
        parts.extend(elements)
    return tuple(parts)


@value_rule("Split")
def split(view: NodeView) -> Elements:
    """The first part (only first outputs are tracked)."""
    data, sizes = view.elements(0), view.integers(1) if view.has(1) else view.ints("split")
    return None if data is None or not sizes else data[: sizes[0]]


def _divide(a: Size, b: Size) -> Size | None:
    """Integer division truncates towards zero; on sizes that is the floor."""
    if isinstance(a, int) and isinstance(b, int):
        return None if b == 0 else int(a / b) if abs(a) < 1 << 50 else None
    return floor_divide(a, b) if at_least(a, 0) and at_least(b, 1) else None


def _divide_float(a: Size, b: Size) -> Size | None:
    if b == 0 or not at_least(b, 1) or modulo(a, b) != 0:
        return None
    return floor_divide(a, b)


def _modulo(a: Size, b: Size) -> Size | None:
    return modulo(a, b) if at_least(b, 1) else None


def _equal(a: Size, b: Size) -> Size | None:
    if a == b:
        return 1
    difference = a - b
    return 0 if isinstance(difference, int) or at_least(difference, 1) or at_least(-difference, 1) else None


def _greater(a: Size, b: Size) -> Size | None:
    return 1 if at_least(a, b + 1) else (0 if at_least(b, a) else None)


def _greater_equal(a: Size, b: Size) -> Size | None:
    return 1 if at_least(a, b) else (0 if at_least(b, a + 1) else None)


_BINARY: dict[str, _Combine] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Div": _divide,
    "Mod": _modulo,
    "Max": maximum,
    "Min": minimum,
    "Equal": _equal,
    "Greater": _greater,
    "Less": lambda a, b: _greater(b, a),
    "GreaterOrEqual": _greater_equal,
    "LessOrEqual": lambda a, b: _greater_equal(b, a),
    "And": minimum,
    "Or": maximum,
}


@value_rule(*_BINARY)
def binary(view: NodeView) -> Elements:
    """Element by element, a scalar against a vector included."""
    if len(view.node.inputs) != 2 or (view.node.op_type == "Mod" and view.integer("fmod", 0)):
        return None
    combine = _BINARY[view.node.op_type]
    if view.node.op_type == "Div" and view.dtype() not in _WHOLE:
        combine = _divide_float
    return _zipped(combine, view.elements(0), view.elements(1))


def _zipped(combine: _Combine, a: Elements, b: Elements) -> Elements:
    if a is None or b is None or not (len(a) == len(b) or 1 in (len(a), len(b))):
        return None
    length = 0 if 0 in (len(a), len(b)) else max(len(a), len(b))
    pairs = zip(a * length if len(a) == 1 else a, b * length if len(b) == 1 else b, strict=False)
    return tuple(None if x is None or y is None else combine(x, y) for x, y in pairs)


@value_rule("Neg")
def negative(view: NodeView) -> Elements:
    """Sign change."""
    return _mapped(view.elements(), lambda e: 0 - e)


@value_rule("Abs")
def absolute(view: NodeView) -> Elements:
    """A size is its own absolute value."""
    return _mapped(view.elements(), lambda e: abs(e) if isinstance(e, int) else (e if at_least(e, 0) else None))


@value_rule("Floor", "Ceil", "Round")
def rounded(view: NodeView) -> Elements:
    """Elements are whole already."""
    return view.elements()


@value_rule("Not")
def negated(view: NodeView) -> Elements:
    """0 and 1 change places."""
    return _mapped(view.elements(), lambda e: 1 - e)


@value_rule("Sign")
def sign(view: NodeView) -> Elements:
    """1 for a size that cannot be 0."""
    return _mapped(view.elements(), _sign)


def _sign(element: Size) -> Size | None:
    if isinstance(element, int):
        return (element > 0) - (element < 0)
    return 1 if at_least(element, 1) else None


def _mapped(elements: Elements, function: Callable[[Size], Size | None]) -> Elements:
    return None if elements is None else tuple(None if e is None else function(e) for e in elements)


@value_rule("Where")
def where(view: NodeView) -> Elements:
    """Chosen by known conditions; an element both sides agree on needs none."""
    condition, yes, no = (view.elements(i) for i in range(3))
    if condition is None or yes is None or no is None:
        return None
    lengths = {len(condition), len(yes), len(no)} - {1}
    if len(lengths) > 1:
        return None
    length = lengths.pop() if lengths else 1
    wide = [e * length if len(e) == 1 else e for e in (condition, yes, no)]
    return tuple(
        (y if c else n) if isinstance(c, int) else (y if y == n else None) for c, y, n in zip(*wide, strict=False)
    )


@value_rule("ConstantOfShape")
def constant_of_shape(view: NodeView) -> Elements:
    """A short vector of one number."""
    length, fill = view.integers(0), view.attribute("value")
    if length is None or len(length) > 1 or (length and not 0 <= length[0] <= MAX_ELEMENTS):
        return None
    value = fill.as_tensor().numpy().reshape(-1)[0].item() if fill is not None else 0
    return (int(value),) * (length[0] if length else 1) if value == int(value) else None


@value_rule("Expand")
def expand(view: NodeView) -> Elements:
    """A scalar or single element repeated."""
    data, target = view.elements(0), view.integers(1)
    if data is None or target is None or len(target) > 1:
        return None
    if len(data) == 1 and target and 0 <= target[0] <= MAX_ELEMENTS:
        return data * target[0]
    return data


@value_rule("Tile")
def tile(view: NodeView) -> Elements:
    """The elements over and over."""
    data, repeats = view.elements(0), view.integers(1)
    if data is None or not repeats or len(repeats) != 1 or len(data) * repeats[0] > MAX_ELEMENTS:
        return None
    return data * repeats[0]


@value_rule("Range")
def number_range(view: NodeView) -> Elements:
    """Counted out when all three numbers are known."""
    numbers = [view.integers(i) for i in range(3)]
    if any(not n for n in numbers):
        return None
    start, limit, delta = (n[0] for n in numbers if n)
    counted = range(start, limit, delta) if delta else range(0)
    return tuple(counted) if delta and len(counted) <= MAX_ELEMENTS else None


@value_rule("ReduceProd", "ReduceSum", "ReduceMax", "ReduceMin")
def reduce(view: NodeView) -> Elements:
    """All elements of a vector in one."""
    elements = complete(view.elements() or (None,))
    if elements is None or view.integer("noop_with_empty_axes", 0):
        return None
    kind = view.node.op_type
    if kind == "ReduceProd":
        return (product(elements),)
    combine = {"ReduceSum": lambda a, b: a + b, "ReduceMax": maximum, "ReduceMin": minimum}[kind]
    return tuple(itertools.islice(reversed(list(itertools.accumulate(elements, combine))), 1))


@value_rule("CumSum")
def cumulative_sum(view: NodeView) -> Elements:
    """Running totals."""
    elements = complete(view.elements() or (None,))
    if elements is None or view.integer("exclusive", 0) or view.integer("reverse", 0):
        return None
    return tuple(itertools.accumulate(elements, lambda a, b: a + b))


@value_rule("ScatterND", "ScatterElements")
def scatter(view: NodeView) -> Elements:
    """Elements of a vector replaced at constant places."""
    data, indices, updates = view.elements(0), view.integers(1), view.elements(2)
    indices = indices if indices is not None else _flat_indices(view)
    if data is None or indices is None or updates is None or view.text("reduction", "none") != "none":
        return None
    if len(indices) != len(updates):
        return None
    out = list(data)
    for index, update in zip(indices, updates, strict=False):
        out[normalize_axis(index, len(out))] = update
    return tuple(out)


def _flat_indices(view: NodeView) -> list[int] | None:
    array = view.array(1)
    return None if array is None or (array.ndim > 1 and array.shape[-1] != 1) else [int(i) for i in array.reshape(-1)]
