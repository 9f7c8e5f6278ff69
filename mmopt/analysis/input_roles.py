"""The role of a single input, decided from its uses by an ordered list of rules; the first that applies wins."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import onnx_ir as ir

from mmopt.analysis import operators as ops
from mmopt.analysis.dataflow import FlatGraph, FlatNode
from mmopt.analysis.input_uses import Use
from mmopt.analysis.streams import Streams
from mmopt.ir.modality import Modality

MEL_BANDS = range(10, 258)
"""Features per frame of speech front ends: from 10 cepstral coefficients to the 257 bins of a 512-point spectrum."""

MIN_WAVE = 240
"""Fewest samples that count as a waveform: 15 ms at 16 kHz."""

ORDINARY = range(10, 4097)
"""Rows of tables of positions; fewer are token types, more a vocabulary."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one input is, before it is put into a group.

    Attributes:
        modality: Kind of data; ``UNKNOWN`` also for inputs that get it from their group.
        role: See :class:`mmopt.analysis.modalities.InputRole`.
        reason: Why.
        bound: Exclusive upper bound of ids.
        primary: Whether the input carries data of its own, so that it starts a group.
        fixed: Whether the user said so.
        used: Whether anything depends on the input.
    """

    modality: Modality
    role: str
    reason: str
    bound: int | None = None
    primary: bool = True
    fixed: bool = False
    used: bool = True


@dataclasses.dataclass(frozen=True)
class _Input:
    """An input with everything the rules ask about."""

    graph: FlatGraph
    streams: Streams
    value: int
    uses: list[Use]

    @property
    def rank(self) -> int | None:
        return self.graph.rank(self.value)

    @property
    def dtype(self) -> ir.DataType:
        return self.graph.dtype(self.value) or ir.DataType.UNDEFINED

    @property
    def floating(self) -> bool:
        return bool(self.dtype.is_floating_point())

    def size(self, axis: int) -> int | None:
        """A dimension, when it is a known number."""
        return known(self.graph, self.value, axis)

    def of(self, *kinds: str) -> list[Use]:
        """Uses of the data as it is, not of decisions made from it."""
        return [u for u in self.uses if u.kind in kinds and not u.path.decided]


def known(graph: FlatGraph, value: int, axis: int) -> int | None:
    """A dimension of a value, when it is a known number."""
    dims = graph.dims(value)
    if dims is None or not -len(dims) <= axis < len(dims):
        return None
    size = dims[axis]
    return size if isinstance(size, int) else None


def find_role(graph: FlatGraph, streams: Streams, value: int, uses: list[Use]) -> Finding:
    """Decide what an input is from its uses.

    Args:
        graph: The flat graph.
        streams: Labels in which every input has a bit of its own.
        value: Value number of the input.
        uses: Its uses.
    """
    if not uses:
        return Finding(Modality.UNKNOWN, "features", "nothing depends on it", primary=False, used=False)
    given = _Input(graph, streams, value, uses)
    for rule in _RULES:
        finding = rule(given)
        if finding is not None:
            return finding
    return Finding(Modality.UNKNOWN, "features", f"its uses ({_kinds(uses)}) do not tell what it is")


def _kinds(uses: list[Use]) -> str:
    return ", ".join(dict.fromkeys(f"{u.kind} by {u.node.op}" if u.node else u.kind for u in uses))


def _string(given: _Input) -> Finding | None:
    if given.dtype != ir.DataType.STRING:
        return None
    if any(u.kind == "text" for u in given.uses):
        return Finding(Modality.TEXT, "features", "strings are taken apart as text")
    return Finding(Modality.UNKNOWN, "features", "strings whose use does not tell what they are")


def _state(given: _Input) -> Finding | None:
    if given.of("lookup", "convolution", "spectral"):
        return None
    states = given.of("state")
    if states and all(u.kind in ("state", "returned") for u in given.uses):
        return _steering("state", f"it goes to the initial state of {_name(states[0])} only")
    if cache := _returned_cache(given):
        return _steering("state", cache)
    if carried := _returned_state(given):
        return _steering("state", carried)
    return None


def _steering(role: str, reason: str, bound: int | None = None) -> Finding:
    return Finding(Modality.UNKNOWN, role, reason, bound, primary=False)


def _name(use: Use) -> str:
    return use.node.name if use.node is not None else "an output"


def _returned_cache(given: _Input) -> str:
    """A cache: new entries are appended to it and the result is returned."""
    for use in given.of("meets"):
        if use.node is None or use.node.op != "Concat":
            continue
        outputs = set(given.graph.outputs)
        if any(v in outputs for v in forward_through(given.graph, use.node, ops.LAYOUT | {"Slice", "Concat"})):
            return f"{use.node.name} appends to it and the result is returned"
    return ""


def _returned_state(given: _Input) -> str:
    """The state of a recurrence written out: gates update it with other data, and it is returned in the same shape."""
    graph, streams, own = given.graph, given.streams, given.streams.reach(given.value)
    dims = graph.dims(given.value)
    if not given.floating or dims is None or not 2 <= len(dims) <= 3:
        return ""
    returned = [v for v in graph.outputs if streams.reach(v) & own and graph.dims(v) in (dims, None)]
    returned = [v for v in returned if _is_batched(given, streams.reach(v) & ~own)]
    if not returned:
        return ""
    gates = {n.op for n in graph.nodes if n.op in ("Sigmoid", "Tanh", *ops.RECURRENT) and _carries(n, given)}
    if not (gates >= {"Sigmoid", "Tanh"} or gates & ops.RECURRENT):
        return ""
    return f"gates update it with other data and {graph.name(returned[0])!r} returns it in the same shape"


def _carries(node: FlatNode, given: _Input) -> bool:
    own = given.streams.reach(given.value)
    return any(given.streams.reach(v) & own for v in node.outputs)


def _is_batched(given: _Input, others: int) -> bool:
    """Whether the input has the batch of other data behind an axis of layers, or in front when it has no such axis."""
    dims = given.graph.dims(given.value) or ()
    batch = dims[1] if len(dims) == 3 else dims[0]
    for position, value in enumerate(given.graph.inputs):
        theirs = given.graph.dims(value)
        if others >> position & 1 and theirs and theirs[0] == batch:
            return True
    return False


def forward_through(graph: FlatGraph, node: FlatNode, operators: frozenset[str], limit: int = 64) -> list[int]:
    """The outputs of a node and everything made from them by the given operators alone, nearest first."""
    found = list(node.outputs)
    for value in found:
        for user in graph.users(value):
            if user.op in operators and len(found) < limit:
                found.extend(v for v in user.outputs if v not in found)
    return found


def _ids(given: _Input) -> Finding | None:
    lookups = [u for u in given.of("lookup") if not u.path.joined]
    if not lookups:
        return None
    bounds = [u.size - u.path.offset for u in lookups if u.size]
    bound = min(bounds) if bounds else None
    where = f"{_name(lookups[0])} looks it up in a table" + (f" of {bound} rows" if bound else "")
    tables = {u.node.inputs[0] for u in lookups if u.node is not None and u.node.op == "Gather"}
    columns = all(u.path.sliced for u in lookups) and len(tables) > 1
    if columns:
        modality = Modality.TABULAR if given.rank == 2 else Modality.UNKNOWN
        return Finding(modality, "ids", f"each of its columns is looked up in a table of its own ({where})", bound)
    if (given.rank == 1 or given.size(1) == 1) and not _in_sequence(given):
        return Finding(Modality.TABULAR, "ids", f"{where}, one a sample", bound)
    return Finding(Modality.TEXT, "ids", where, bound)


def _in_sequence(given: _Input) -> bool:
    """Whether attention or a recurrent layer works on this input's data alone."""
    own = given.streams.reach(given.value)
    for node in given.graph.nodes:
        if node.op in ops.RECURRENT and given.streams.reach(node.inputs[0]) == own:
            return True
        if node.op == "Softmax" and given.streams.content[node.inputs[0]] == own:
            values = forward_through(given.graph, node, ops.LAYOUT, 8)
            users = (n for v in values for n in given.graph.users(v) if n.op in ops.PRODUCTS)
            if any(all(given.streams.content[v] for v in n.inputs[:2]) for n in users):
                return True
    return False


def _lengths(given: _Input) -> Finding | None:
    if given.floating or given.dtype == ir.DataType.BOOL or (given.rank or 0) > 1 or given.size(0) == 0:
        return None
    lengths = [u for u in given.uses if u.kind == "lengths"]
    if lengths:
        return _steering("lengths", f"{_name(lengths[0])} takes it as the lengths of its sequences")
    if given.rank == 1 and given.uses and all(u.path.decided or u.kind == "index" for u in given.uses):
        return _steering("lengths", "one whole number a sample that is only compared with positions")
    return None


def _positions(given: _Input) -> Finding | None:
    marks = [u for u in given.uses if u.kind in ("wave", "position")]
    if not marks or given.of("convolution", "dense", "recurrent", "spectral"):
        return None
    return _steering("positions", f"{_name(marks[0])} turns it into sines and cosines")


def _scalar(given: _Input) -> Finding | None:
    if given.rank == 0 or (given.rank == 1 and given.size(0) == 1):
        return _steering("scalar", "a single number")
    return None


def _mask(given: _Input) -> Finding | None:
    if given.of("convolution", "recurrent", "spectral", "dense", "table"):
        return None
    if given.dtype == ir.DataType.BOOL:
        return _steering("mask", "truth values that choose among other data")
    for use in given.uses:
        if use.others and (use.kind in ("condition", "mask") or (use.kind == "meets" and use.path.decided)):
            return _steering("mask", f"{_name(use)} chooses by it")
        if use.kind == "meets" and use.node is not None and _masks(given, use, use.node):
            return _steering("mask", f"{use.node.name} masks other data with it")
    return None


def _masks(given: _Input, use: Use, node: FlatNode) -> bool:
    if node.op in ops.ADDITIVE:
        return leads_to_softmax(given.graph, node)
    if node.op not in ops.MULTIPLICATIVE:
        return False
    return not given.floating or use.path.unsqueezed > 0 or use.path.reduced


SCORE_OPERATORS = ops.LAYOUT | ops.ARITHMETIC | {"Where", "Clip", "Slice", "Tanh", "Concat"}
"""What lies between attention scores and their softmax."""


def leads_to_softmax(graph: FlatGraph, node: FlatNode) -> bool:
    """Whether what a node computes are scores on their way to a softmax."""
    values = forward_through(graph, node, SCORE_OPERATORS, 24)
    return any(user.op in ("Softmax", "LogSoftmax", "Exp") for v in values for user in graph.users(v))


def _convolved(given: _Input) -> Finding | None:
    for use in given.of("convolution"):
        where = f"{_name(use)} convolves it over {len(use.kernel)} axes and {use.size} channels"
        # A convolution over one axis is often written as one over two with a filter one element high.
        flat = len(use.kernel) == 2 and 1 in use.kernel and max(use.kernel) > 1 and use.path.unsqueezed > 0
        if len(use.kernel) == 1 or (flat and (given.rank or 0) <= 3):
            return _sound(given, use, where)
        if len(use.kernel) == 2:
            return _picture(given, use, where)
        return _volume(given, use, where)
    return None


def _sound(given: _Input, use: Use, where: str) -> Finding:
    samples = given.size(-1)
    if use.size == 1 and (samples is None or samples >= MIN_WAVE) and not use.path.joined:
        return Finding(Modality.AUDIO, "waveform", where)
    if use.size in MEL_BANDS and given.rank == 3 and not use.path.joined:
        return Finding(Modality.AUDIO, "spectrogram", where)
    return Finding(Modality.UNKNOWN, "features", f"{where}, which does not tell a kind")


def _picture(given: _Input, use: Use, where: str) -> Finding:
    rank, channels = given.rank, use.size
    if rank == 5 or (use.path.looped and rank == 4):
        return Finding(Modality.VIDEO, "frames", f"{where}, frame by frame")
    height, width = (known(given.graph, use.value, axis) for axis in (-2, -1))
    square = height is not None and height == width
    if rank == 3 and use.path.unsqueezed and channels == 1 and not square:
        bands = [d for d in (given.size(1), given.size(2)) if d in MEL_BANDS]
        if bands:
            return Finding(Modality.AUDIO, "spectrogram", f"{where}; a rectangle without an axis of channels")
    seen = (rank in (None, 4) or (rank == 3 and channels == given.size(0))) and channels >= 3
    if seen or (square and rank in (2, 3, 4) and channels in (1, 3)):
        return Finding(Modality.IMAGE, "image", where)
    return Finding(Modality.UNKNOWN, "features", f"{where}: a picture or a spectrogram")


def _volume(given: _Input, use: Use, where: str) -> Finding:
    if len(use.kernel) == 3 and use.size >= 3 and given.rank == 5:
        return Finding(Modality.VIDEO, "frames", where)
    return Finding(Modality.UNKNOWN, "features", f"{where}, which does not tell a kind")


def _spectral(given: _Input) -> Finding | None:
    uses = given.of("spectral")
    if uses and (given.rank or 0) <= 3:
        return Finding(Modality.AUDIO, "waveform", f"{_name(uses[0])} takes its spectrum")
    return None


def _recurrent(given: _Input) -> Finding | None:
    for use in given.of("recurrent"):
        where = f"{_name(use)} steps over its frames of {use.size} features"
        steps, features = given.size(-2), given.size(-1)
        square = steps is not None and steps == features
        plain = given.rank == 3 and not (use.path.joined or use.path.reshaped or use.path.unsqueezed)
        if plain and use.size in MEL_BANDS and not square:
            return Finding(Modality.AUDIO, "spectrogram", where)
        return Finding(Modality.UNKNOWN, "features", f"{where}, which does not tell a kind")
    return None


def _patched(given: _Input) -> Finding | None:
    for use in given.of("dense"):
        if not use.path.patched:
            continue
        where = f"it is cut into pieces that {_name(use)} projects"
        if given.rank == 2:
            return Finding(Modality.AUDIO, "waveform", f"{where}: overlapping frames")
        if given.rank == 4:
            return Finding(Modality.IMAGE, "image", where)
        if given.rank == 5:
            return Finding(Modality.VIDEO, "frames", where)
    return None


def _dense(given: _Input) -> Finding | None:
    tables, dense = given.of("table"), given.of("dense")
    if tables and (given.rank or 0) <= 2:
        return Finding(Modality.TABULAR, "features", f"{_name(tables[0])} works on rows of a table")
    if not dense:
        return None
    use = dense[0]
    if given.rank == 2 and not (use.path.reshaped or use.path.unsqueezed):
        return Finding(Modality.TABULAR, "features", f"{_name(use)} projects one row of features a sample")
    if given.rank == 4 and use.path.reshaped and _looks_like_pixels(given):
        return Finding(Modality.IMAGE, "image", f"{_name(use)} projects all of its pixels")
    return Finding(Modality.UNKNOWN, "features", f"{_name(use)} projects its last axis, which does not tell a kind")


def _looks_like_pixels(given: _Input) -> bool:
    sides = {axes: tuple(given.size(a) for a in axes) for axes in ((1, 2, 3), (3, 1, 2))}
    return any(c in (1, 3) and h == w and (h or 0) >= 8 for c, h, w in sides.values())


_RULES: tuple[Callable[[_Input], Finding | None], ...] = (
    _string,
    _state,
    _ids,
    _convolved,
    _spectral,
    _recurrent,
    _lengths,
    _positions,
    _scalar,
    _mask,
    _patched,
    _dense,
)
