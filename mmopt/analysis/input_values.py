"""Legal values for one input: integers that index, steer or mask, and reals in the range of what they stand for."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from mmopt.analysis import dims
from mmopt.analysis.dims import Size
from mmopt.analysis.input_facts import InputFacts

Array = np.ndarray[Any, Any]

_AMPLITUDES = (1.0, 0.25, 2.0)
"""Spread of real-valued inputs, one a set: a normalization's epsilon shows on small ones, a lost clip on large ones."""

_WORDS = ("a", "photo", "of", "ten", "cats", "", "naïve", "42")


@dataclasses.dataclass(frozen=True)
class Request:
    """One input to make.

    Attributes:
        name: Its name.
        dtype: Its element type.
        shape: Its shape.
        facts: What is demanded of it.
        role: What it is, by :func:`mmopt.analysis.modalities.classify_inputs`; "" when unknown.
        sizes: Sizes of symbols, for bounds.
        number: Number of the set.
        variant: Which of the possible guesses to take where there are several.
        rng: Source of randomness, of this input alone.
    """

    name: str
    dtype: ir.DataType
    shape: tuple[int, ...]
    facts: InputFacts
    role: str
    sizes: Mapping[str, int]
    number: int
    variant: int
    rng: np.random.Generator

    def bound(self) -> int | None:
        """Smallest of the sizes that the values must stay below; None when it indexes nothing."""
        if self.facts.blind and not self.facts.bounds:
            return self.facts.low + 1
        known = [bound for size in self.facts.bounds if (bound := _evaluate(size, self.sizes)) is not None]
        return min(known) if known else None


def make_value(request: Request, type_: ir.TypeProtocol | None) -> Any:
    """The value asked for: an array, or a list of two for a sequence."""
    if isinstance(type_, ir.OptionalType):
        return make_value(request, type_.elem_type)
    if isinstance(type_, ir.SequenceType):
        return [np.asarray(_array(request)) for _ in range(2)]
    return np.asarray(_array(request))


def _array(request: Request) -> Array:
    if request.dtype == ir.DataType.STRING:
        return request.rng.choice(np.array(_WORDS, dtype=object), size=request.shape)
    if request.dtype == ir.DataType.BOOL:
        return _mask(request).astype(bool)
    if request.dtype.is_floating_point():
        return _real(request).astype(request.dtype.numpy())
    if request.dtype.name.startswith("COMPLEX"):
        parts = request.rng.standard_normal((2, *request.shape))
        return np.asarray(parts[0] + 1j * parts[1]).astype(request.dtype.numpy())
    return _whole(request).astype(request.dtype.numpy())


def _whole(request: Request) -> Array:
    """Integers: by what steers, then what is looked up, then masks; small numbers when nothing is known."""
    facts = request.facts
    for role, make in _STEERING.items():
        if role in facts.roles:
            return make(request)
    if "index" in facts.roles:
        return _indices(request)
    if facts.compared and request.shape == ():
        # Even guesses take another constant in every set, to reach every branch; odd ones stay with one.
        shift = request.number if request.variant % 2 == 0 else 0
        return np.asarray(facts.compared[(request.variant // 2 + shift) % len(facts.compared)])
    if request.role == "mask" or facts.roles & {"mask", "to-float"}:
        return _mask(request)
    if facts.compared:
        choices = np.unique([*facts.compared, 0.0, 1.0])
        return request.rng.choice(choices, size=request.shape)
    if request.dtype.bitwidth <= 8 and request.shape:
        low, high = int(request.dtype.min), int(request.dtype.max)
        return request.rng.integers(low, high + 1, size=request.shape)
    return request.rng.integers(0, 5, size=request.shape)


def _indices(request: Request) -> Array:
    facts, low = request.facts, request.facts.low
    high = max(request.bound() or low + 1, low + 1)
    if "lengths" in facts.roles:
        # The first sample of the first set is as long as can be, all others are shorter.
        order = np.arange(math.prod(request.shape)) + request.number
        return (high - 1 - order % (high - low)).reshape(request.shape)
    if request.role == "positions" and request.shape:
        return np.broadcast_to(low + np.arange(request.shape[-1]) % (high - low), request.shape)
    ids = request.rng.integers(low, high, size=request.shape)
    return _with_marks(ids, request, high) if request.shape else ids


def _with_marks(ids: Array, request: Request, high: int) -> Array:
    """Put the marks that a model looks for into token ids: what is compared with, or a largest id at the end."""
    marks = [int(mark) for mark in request.facts.compared if request.facts.low <= mark < high]
    if marks and request.variant % 2 == 0:
        # Where a model looks for a mark (end of text, padding), it is at the end of a row.
        ids[..., -1] = marks[request.variant // 2 % len(marks)]
    elif "argmax" in request.facts.roles and high - request.facts.low > 1:
        ids = np.minimum(ids, high - 2)
        ids[..., -1] = high - 1
    return ids


def _mask(request: Request) -> Array:
    """Ones, then zeros along the last axis; rows differ, and the first element of each is kept.

    A single flag is set in every other set of inputs.
    """
    if request.shape == ():
        return np.asarray(1 - (request.variant + request.number) % 2)
    length = request.shape[-1]
    rows = np.arange(math.prod(request.shape[:-1])) + request.number
    kept = length - rows % max(1, length // 2)
    return (np.arange(length) < kept[:, None]).astype(np.int64).reshape(request.shape)


def _real(request: Request) -> Array:
    """Real numbers in the range that the input's use allows."""
    rng, shape, roles = request.rng, request.shape, request.facts.roles
    for role, draw in _RANGES.items():
        if role in roles:
            return draw(rng, shape)
    amplitude = _AMPLITUDES[request.number % len(_AMPLITUDES)]
    if request.role == "mask" or "mask" in roles:
        return _mask(request).astype(np.float64)
    if _is_waveform(request):
        return _waveform(rng, shape, amplitude)
    if _is_spectrogram(request):
        # Log-mel spectra as speech models scale them: most of them near the floor, few above 1.
        return np.clip(rng.normal(-0.3, 0.5 * amplitude, size=shape), -1.0, 1.5)
    return amplitude * np.clip(rng.standard_normal(shape), -3.0, 3.0)


def _is_waveform(request: Request) -> bool:
    """One channel of samples in time."""
    shape, facts = request.shape, request.facts
    if request.role == "waveform" or "signal" in facts.roles:
        return bool(shape)
    return len(shape) == 3 and "convolved" in facts.roles and facts.channels == 1


def _is_spectrogram(request: Request) -> bool:
    facts = request.facts
    if request.role == "spectrogram":
        return True
    return len(request.shape) == 3 and "convolved" in facts.roles and facts.channels in (40, 64, 80, 128)


def _waveform(rng: np.random.Generator, shape: tuple[int, ...], amplitude: float) -> Array:
    """Two tones and some noise within [-1, 1]."""
    time = np.arange(shape[-1]) / 16_000
    pitch = rng.uniform(100, 400, size=(*shape[:-1], 1))
    tones = 0.6 * np.sin(2 * np.pi * pitch * time) + 0.2 * np.sin(2 * np.pi * 3 * pitch * time)
    return np.clip(amplitude / 2 * (tones + 0.1 * rng.standard_normal(shape)), -1.0, 1.0)


_RANGES: dict[str, Callable[[np.random.Generator, tuple[int, ...]], Array]] = {
    "scales": lambda rng, shape: np.where(np.arange(math.prod(shape)).reshape(shape) >= 2, 2.0, 1.0),
    "scale": lambda rng, shape: rng.uniform(0.01, 0.1, size=shape),
    "probability": lambda rng, shape: rng.uniform(0.1, 0.9, size=shape),
    "above-one": lambda rng, shape: rng.uniform(1.1, 4.0, size=shape),
    "positive": lambda rng, shape: rng.uniform(0.2, 2.0, size=shape),
    "unit": lambda rng, shape: rng.uniform(-0.9, 0.9, size=shape),
}
"""Ranges of real inputs, by role."""


def _filled(number: int) -> Callable[[Request], Array]:
    return lambda request: np.full(request.shape, number)


def _operand(request: Request) -> tuple[int, ...]:
    """Concrete shape of what the input steers; () when unknown."""
    for _, shape in request.facts.steered:
        if shape is not None:
            known = (_evaluate(size, request.sizes) for size in shape)
            return tuple(1 if size is None else size for size in known)
    return ()


def _reshape(request: Request) -> Array:
    """Keep the leading dimensions and let the last one take the rest."""
    count = math.prod(request.shape)
    target = np.ones(count, dtype=np.int64)
    rank = len(_operand(request))
    target[: max(0, min(count - 1, rank - 1))] = 0
    target[-1:] = -1
    return target.reshape(request.shape)


def _split(request: Request) -> Array:
    count, node = math.prod(request.shape), request.facts.steered[0][0]
    shape = _operand(request)
    size = shape[node.attributes.get_int("axis", 0)] if shape else count
    parts = np.full(count, size // max(1, count))
    parts[-1:] += size - int(parts.sum())
    return parts.reshape(request.shape)


def _squeeze(request: Request) -> Array:
    """Axes of size one, as many as are asked for."""
    ones = [axis for axis, size in enumerate(_operand(request)) if size == 1]
    return np.resize(np.array(ones or [0]), request.shape)


def _ends(request: Request) -> Array:
    shape = _operand(request)
    return np.array([max(1, size - 1) for size in _cycle(shape or (2,), math.prod(request.shape))]).reshape(
        request.shape
    )


def _resize(request: Request) -> Array:
    shape = _operand(request)
    doubled = [size * 2 if axis >= 2 else size for axis, size in enumerate(shape)]
    return np.array(list(_cycle(doubled or [2], math.prod(request.shape)))).reshape(request.shape)


def _cycle(items: Sequence[int], count: int) -> Iterator[int]:
    return itertools.islice(itertools.cycle(items), count)


def _pads(request: Request) -> Array:
    pads = np.zeros(math.prod(request.shape), dtype=np.int64)
    pads[-1:] = 1
    return pads.reshape(request.shape)


def _count(request: Request) -> Array:
    return np.arange(math.prod(request.shape)).reshape(request.shape)


_STEERING: dict[str, Callable[[Request], Array]] = {
    "reshape": _reshape,
    "split": _split,
    "squeeze": _squeeze,
    "ends": _ends,
    "resize": _resize,
    "pads": _pads,
    "axes": _count,
    "zero": _filled(0),
    "starts": _filled(0),
    "start": _filled(0),
    "one": _filled(1),
    "expand": _filled(1),
    "repeats": _filled(2),
    "sizes": _filled(2),
    "trips": _filled(3),
    "limit": _filled(5),
    "positive": lambda request: request.rng.integers(1, 6, size=request.shape),
    "depth": _filled(8),
}
"""Values of integers that steer, by role: small, legal, and never without effect where that can be."""


def _evaluate(size: Size | None, sizes: Mapping[str, int]) -> int | None:
    if size is None:
        return None
    try:
        return dims.evaluate(size, sizes)
    except KeyError:
        return None
