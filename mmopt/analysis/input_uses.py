"""What a model does with an input before it learns anything from it.

From every input a walk goes forward through operators that leave the data raw (casts, transposes, slices, scaling by
constants, quantization, padding) up to the first ones that say what the data is: a look-up in a table, a convolution,
a recurrent layer, a product with weights, a condition, a sum with something else.
"""

from __future__ import annotations

import collections
import dataclasses

from mmopt.analysis import operators as ops
from mmopt.analysis.dataflow import FLOW_OPERATORS, FlatGraph, FlatNode
from mmopt.analysis.streams import Streams


@dataclasses.dataclass(frozen=True)
class Path:
    """What happened to the data on the way from the input.

    Attributes:
        decided: It went through comparisons, indices or accumulated sums.
        sliced: Only a part was taken, at a constant place.
        unsqueezed: How many axes were added.
        reshaped: Its axes were merged or split.
        patched: It was cut into patches or frames: a transpose over five or more axes, or a gather by an index matrix.
        looped: It is one slice of it, inside a loop.
        joined: It was put beside other data.
        reduced: It was summed or averaged.
        offset: Constant that was added to it.
    """

    decided: bool = False
    sliced: bool = False
    unsqueezed: int = 0
    reshaped: bool = False
    patched: bool = False
    looped: bool = False
    joined: bool = False
    reduced: bool = False
    offset: int = 0


@dataclasses.dataclass(frozen=True)
class Use:
    """Where raw data ends.

    Attributes:
        kind: ``lookup``, ``convolution``, ``dense``, ``recurrent``, ``lengths``, ``state``, ``spectral``, ``table``,
            ``text``, ``wave`` (sine or cosine), ``condition``, ``index``, ``mask`` (of an attention operator),
            ``position`` (of a rotary embedding), ``meets`` (combined with other data), ``returned``, ``other``.
        node: The node, or ``None`` when the data is returned.
        value: The raw value that the node uses.
        path: What happened before.
        size: Rows of the table, channels of the convolution, or features of the layer; 0 when unknown.
        kernel: Spatial sizes of a convolution's filter, 0 where unknown.
        others: The other data it meets.
    """

    kind: str
    node: FlatNode | None
    value: int
    path: Path
    size: int = 0
    kernel: tuple[int, ...] = ()
    others: tuple[int, ...] = ()


def uses_of(graph: FlatGraph, streams: Streams, source: int) -> list[Use]:
    """All uses of the raw data of the input ``source``, in breadth-first order.

    Args:
        graph: The flat graph.
        streams: Labels in which every input has a bit of its own.
        source: Value number of the input.
    """
    walk = _Walk(graph, streams, streams.reach(source))
    queue = collections.deque([(source, Path())])
    seen = {source}
    outputs = set(graph.outputs)
    while queue:
        value, path = queue.popleft()
        if value in outputs:
            walk.uses.append(Use("returned", None, value, path))
        for node in graph.users(value):
            after = walk.step(node, value, path)
            for output in node.outputs if after is not None else ():
                if output not in seen:
                    seen.add(output)
                    queue.append((output, after or path))
    return walk.uses


class _Walk:
    def __init__(self, graph: FlatGraph, streams: Streams, own: int) -> None:
        self.graph, self.streams, self.own = graph, streams, own
        self.uses: list[Use] = []

    def step(self, node: FlatNode, value: int, path: Path) -> Path | None:
        """The path behind ``node`` when the data is still raw there; otherwise its use is noted."""
        position = node.inputs.index(value)
        if node.op in ops.DEAD:
            return None
        if position in ops.STEERING_INPUTS.get(node.op, ()) or (node.op == "Collect" and value != node.inputs[-1]):
            return self._steer(node, value, path, position)
        if node.op in ops.GATHERS:
            return self._gather(node, value, path, position)
        if ops.is_contraction(node.op):
            return self._contract(node, value, path, position)
        if node.op in _NAMED:
            return self._note(_NAMED[node.op], node, value, path)
        if node.op.startswith(ops.TRADITIONAL):
            return self._note("table", node, value, path)
        return self._pass_on(node, value, path)

    def _note(
        self, kind: str, node: FlatNode, value: int, path: Path, size: int = 0, others: tuple[int, ...] = ()
    ) -> Path | None:
        """Note a use: the walk ends here, so there is no path behind it."""
        self.uses.append(Use(kind, node, value, path, size, (), others))
        return None

    def _others(self, node: FlatNode, value: int) -> tuple[int, ...]:
        """Inputs that carry something besides this input's own data."""
        return tuple(v for v in node.inputs if v != value and self.streams.reach(v) & ~self.own)

    def _steer(self, node: FlatNode, value: int, path: Path, position: int) -> Path | None:
        if node.op in ("Where", "Branch"):
            self._note("condition", node, value, path, others=self._others(node, value))
            only_constants = not any(self.streams.reach(v) for v in node.inputs if v != value)
            return dataclasses.replace(path, decided=True) if only_constants else None
        if node.op in ops.RECURRENT:
            return self._note("lengths", node, value, path, others=(node.inputs[0],))
        if node.op.endswith("RotaryEmbedding"):
            return self._note("position", node, value, path, others=(node.inputs[0],))
        if node.op in ops.ATTENTIONS or node.op == "com.microsoft.Attention":
            return self._note("mask", node, value, path, others=(node.inputs[0],))
        if node.op == "com.microsoft.EmbedLayerNormalization":
            return self._note("mask" if position == 7 else "position", node, value, path, others=(node.inputs[0],))
        return self._note("index", node, value, path, others=self._others(node, value))

    def _gather(self, node: FlatNode, value: int, path: Path, position: int) -> Path | None:
        data, indices = node.inputs[0], node.inputs[1]
        if position == 1 and self.streams.reach(data):
            return self._note("index", node, value, path, others=self._others(node, value))
        if position == 1:
            return self._look_up(node, value, path)
        framed = (self.graph.rank(indices) or 0) >= 2
        return dataclasses.replace(path, sliced=path.sliced or not framed, patched=path.patched or framed)

    def _look_up(self, node: FlatNode, value: int, path: Path) -> Path | None:
        table = self.graph.dims(node.inputs[0])
        axis = node.node.attributes.get_int("axis", 0)
        rows = table[axis] if table and -len(table) <= axis < len(table) else None
        if not is_table(self.graph, node.inputs[0]):
            return dataclasses.replace(path, decided=True)
        return self._note("lookup", node, value, path, size=rows if isinstance(rows, int) else 0)

    def _contract(self, node: FlatNode, value: int, path: Path, position: int) -> Path | None:
        if node.op in ops.RECURRENT:
            return self._recurrent(node, value, path, position)
        if node.op in ops.ATTENTIONS:
            return self._note("meets", node, value, path, others=self._others(node, value))
        data, weight = ops.CONVOLUTIONS.get(node.op) or ops.PRODUCTS[node.op]
        if position == weight:
            data, weight = weight, data
        other = node.inputs[weight] if weight < len(node.inputs) else value
        if position != data or self.streams.reach(other):
            return self._note("meets", node, value, path, others=self._others(node, value))
        if node.op in ops.CONVOLUTIONS:
            return self._convolve(node, value, path, other)
        if self._is_wave(node):
            return self._note("wave", node, value, path)
        return self._note("dense", node, value, path, size=_features(self.graph, node, value))

    def _convolve(self, node: FlatNode, value: int, path: Path, weight: int) -> Path | None:
        dims = self.graph.dims(weight) or ()
        sizes = [d if isinstance(d, int) else 0 for d in dims]
        turned = node.op == "ConvTranspose"
        channels = 0 if not sizes else sizes[0] if turned else sizes[1] * node.node.attributes.get_int("group", 1)
        self.uses.append(Use("convolution", node, value, path, channels, tuple(sizes[2:])))
        return None

    def _is_wave(self, node: FlatNode) -> bool:
        """Whether the product is with the frequencies of a sinusoidal embedding: sine or cosine follows."""
        value = node.outputs[0]
        for _ in range(4):
            following = list(self.graph.users(value))
            if any(n.op in ("Sin", "Cos") for n in following):
                return True
            if not following or following[0].op not in ops.LAYOUT | {"Concat", "Mul"}:
                return False
            value = following[0].outputs[0]
        return False

    def _recurrent(self, node: FlatNode, value: int, path: Path, position: int) -> Path | None:
        if position in (5, 6):
            return self._note("state", node, value, path, others=(node.inputs[0],))
        if position != 0:
            return self._note("meets", node, value, path, others=self._others(node, value))
        dims = self.graph.dims(node.inputs[1])
        features = dims[2] if dims is not None and len(dims) == 3 else None
        return self._note("recurrent", node, value, path, size=features if isinstance(features, int) else 0)

    def _pass_on(self, node: FlatNode, value: int, path: Path) -> Path | None:
        if node.op == "OneHot":
            depth = self.graph.constant(node.inputs[1])
            rows = 0 if depth is None else int(depth.numpy().reshape(-1)[0])
            return self._note("lookup", node, value, path, size=rows)
        if node.op in ops.DECISIONS:
            return self._decide(node, value, path)
        if node.op not in _RAW:
            return self._note("other", node, value, path, others=self._others(node, value))
        if others := self._others(node, value):
            if node.op not in ops.SELECTION:
                return self._note("meets", node, value, path, others=others)
            self._note("meets", node, value, path, others=others)
            return dataclasses.replace(path, joined=True)
        return self._reshape(node, value, path)

    def _decide(self, node: FlatNode, value: int, path: Path) -> Path | None:
        if others := self._others(node, value):
            self._note("meets", node, value, dataclasses.replace(path, decided=True), others=others)
        if node.op == "Equal" and self.streams.content[node.outputs[0]]:
            fixed = next((v for v in node.inputs if not self.streams.reach(v)), value)
            dims = self.graph.dims(fixed) or ()
            longest = max((d for d in dims if isinstance(d, int)), default=0)
            return self._note("lookup", node, value, path, size=longest)
        return dataclasses.replace(path, decided=True)

    def _reshape(self, node: FlatNode, value: int, path: Path) -> Path:
        if node.op == "Unsqueeze":
            before, after = self.graph.rank(value), self.graph.rank(node.outputs[0])
            added = after - before if before is not None and after is not None else 1
            return dataclasses.replace(path, unsqueezed=path.unsqueezed + added)
        if node.op == "Transpose":
            perm = node.node.attributes.get("perm")
            return dataclasses.replace(path, patched=path.patched or (perm is not None and len(perm.as_ints()) >= 5))
        if node.op in ("Add", "Sub"):
            return dataclasses.replace(path, offset=path.offset + self._offset(node, value))
        if node.op in ops.REDUCTIONS:
            return dataclasses.replace(path, reduced=True)
        flag = _FLAGS.get(node.op)
        return dataclasses.replace(path, **{flag: True}) if flag else path

    def _offset(self, node: FlatNode, value: int) -> int:
        other = node.inputs[1] if node.inputs[0] == value else node.inputs[0]
        tensor = self.graph.constant(self.graph.back_through(other, ops.LAYOUT))
        if tensor is None or tensor.size != 1 or (node.inputs.index(value) != 0 and node.op == "Sub"):
            return 0
        return int(tensor.numpy().reshape(-1)[0]) * (1 if node.op == "Add" else -1)


def is_table(graph: FlatGraph, value: int) -> bool:
    """Whether a value is a constant table: floats, or rows of (quantized) numbers; not a list of indices."""
    if graph.constant(graph.back_through(value, ops.LAYOUT)) is None:
        return False
    dtype = graph.dtype(value)
    return (dtype is not None and bool(dtype.is_floating_point())) or (graph.rank(value) or 0) >= 2


def _features(graph: FlatGraph, node: FlatNode, value: int) -> int:
    dims = graph.dims(value)
    return dims[-1] if dims and isinstance(dims[-1], int) else 0


_FLAGS = {
    "Slice": "sliced",
    "Split": "sliced",
    "Reshape": "reshaped",
    "Flatten": "reshaped",
    "SpaceToDepth": "patched",
    "Element": "looped",
    "Merge": "looped",
    "CumSum": "decided",
}

_NAMED = {
    "Sin": "wave",
    "Cos": "wave",
    "STFT": "spectral",
    "DFT": "spectral",
    "MelWeightMatrix": "other",
    **dict.fromkeys(ops.TEXT_OPERATORS, "text"),
    "com.microsoft.EmbedLayerNormalization": "lookup",
}

_RAW = (
    ops.LAYOUT | ops.SELECTION | ops.UNARY | ops.NORMS | ops.ARITHMETIC | ops.REDUCTIONS | ops.POOLS
    | FLOW_OPERATORS | {"CumSum", "Where"}
) - {"Sin", "Cos"}  # fmt: skip
