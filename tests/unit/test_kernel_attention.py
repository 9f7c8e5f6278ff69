"""The attention template against numpy in float64."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Sequence

import numpy as np
import pytest
from tvm import tirx

from mmopt.backends.compute import Map, Source
from mmopt.backends.cpu.choosing import UNKNOWN
from mmopt.backends.cpu.kernels.attention import Attention, Rules
from mmopt.backends.cpu.kernels.attention_blocking import FEW, Blocking, Problem
from mmopt.backends.cpu.kernels.tile import lanes_of
from tests.kernels import PROFILES, WIDEST, Arrays, Case, Memory, check, compile_kernels, profiles

Extents = tuple[int, int, int, int, int, int, int]
"""Batch, query heads, heads of keys, queries, keys, size, value size."""


def reference(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    mask: np.ndarray | None = None,
    lengths: np.ndarray | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    causal: bool = False,
    past: int = 0,
) -> np.ndarray:
    """What attention is, on ``[batch, heads, sequence, size]``; rows without an open key give zeros."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[1] // k.shape[1], axis=1) for x in (k, v))
    scores = q @ k.swapaxes(-1, -2) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    queries, keys = scores.shape[-2:]
    bias = np.zeros(scores.shape)
    if mask is not None:
        added = np.where(mask, 0.0, -np.inf) if mask.dtype == bool else mask.astype(np.float64)
        missing = [(0, 0)] * (added.ndim - 1) + [(0, keys - added.shape[-1])]
        bias = bias + np.pad(added, missing, constant_values=-np.inf)
    i, j = np.arange(queries)[:, None], np.arange(keys)
    offset = np.full(len(q), past)
    if lengths is not None:
        bias = bias + np.where(j < lengths[:, None, None, None], 0.0, -np.inf)
        offset = lengths - queries
    if causal:
        bias = bias + np.where(j <= i + offset[:, None, None, None], 0.0, -np.inf)
    scores = scores + bias
    closed = np.isneginf(bias).all(axis=-1, keepdims=True)
    peak = np.where(closed, 0.0, scores.max(axis=-1, keepdims=True, initial=-np.inf))
    weights = np.where(closed, 0.0, np.exp(scores - peak))
    return weights / np.where(closed, 1.0, weights.sum(axis=-1, keepdims=True)) @ v


@dataclasses.dataclass(frozen=True)
class Layer:
    """An attention to build a case of.

    Attributes:
        extents: Sizes.
        blocking: Parameters; those of the template's own first choice when absent.
        dtype: Type of the operands.
        mask: Shape of a mask of ``mask_dtype``, if there is one.
        lengths: Keys of each sample, if they differ.
        softcap, causal: Rules.
        symbolic: Whether batch and lengths are known only when the kernel runs.
        order: Axes of the result.
    """

    extents: Extents
    blocking: Blocking | None = None
    dtype: str = "float32"
    mask: tuple[int, ...] | None = None
    mask_dtype: str = "bool"
    lengths: tuple[int, ...] | None = None
    softcap: float = 0.0
    causal: bool = False
    symbolic: bool = False
    order: str = "bhsd"

    def case(self, profile: str, seed: int = 0) -> Case:
        """The kernel on data that no memory order of the operands makes easier: heads lie behind the sequence."""
        batch, heads, kv_heads, queries, keys, size, value_size = self.extents
        data, sizes = Arrays(seed), {"B": batch, "S": queries, "T": keys}
        b, s, t = (tirx.Var(n, "int64") for n in sizes) if self.symbolic else sizes.values()
        q = data.source((b, s, heads, size), self.dtype, **sizes)
        k = data.source((b, t, kv_heads, size), self.dtype, **sizes)
        v = data.source((b, t, kv_heads, value_size), self.dtype, **sizes)
        mask = None if self.mask is None else data.source(self.mask, self.mask_dtype)
        lengths = None if self.lengths is None else data.constant(np.array(self.lengths))
        nest = self.nest(profile, *map(heads_first, (q, k, v)), mask, lengths)
        given = {} if mask is None else {"mask": data.feeds[mask]}
        given |= {} if lengths is None else {"lengths": data.feeds[lengths]}
        operands = (data[x].swapaxes(1, 2) for x in (q, k, v))
        want = reference(*operands, softcap=self.softcap, causal=self.causal, **given)
        if self.order != "bhsd":
            want = want.swapaxes(1, 2)
        if self.order == "bsm":
            want = want.reshape(batch, queries, heads * value_size)
        return data.case(str(self), nest.output, want, sizes=sizes if self.symbolic else {})

    def nest(self, profile: str, q: Map, k: Map, v: Map, mask: Source | None, lengths: Source | None) -> Attention:
        """The template with its parameters chosen."""
        _, heads, kv_heads, queries, keys, size, value_size = self.extents
        wide = "float32" if self.dtype == "float16" else self.dtype
        lanes = lanes_of(profiles()[profile], wide)
        known = (UNKNOWN,) * 3 if self.symbolic else (self.extents[0], queries, keys)
        batch, queries, keys = known  # type: ignore[assignment]
        kind = "none" if mask is None else "full"
        problem = Problem(
            batch, kv_heads, heads // kv_heads, queries, keys, size, value_size, wide, self.dtype, kind, self.causal
        )
        chosen = self.blocking or Blocking.of(problem.candidates(profiles()[profile])[0])
        few = problem.few(lanes) if self.symbolic else None
        return Attention(
            q,
            k,
            v,
            mask=mask,
            lengths=lengths,
            rules=Rules(1 / math.sqrt(size), self.softcap, self.causal),
            blocking=chosen,
            few=few,
            lanes=lanes,
            accumulator=wide,
            order=self.order,
        )


def heads_first(x: Source) -> Map:
    """``[batch, heads, sequence, size]`` view of memory with the heads behind the sequence."""
    batch, steps, heads, size = x.shape
    return Map((batch, heads, steps, size), x.dtype, lambda b, h, s, d: x[b, s, h, d])


def small(profile: str, *, rows: int = 6, blocks: int = 2, tiles: int = 2, packed: bool = True) -> Blocking:
    """Few rows and keys, so that small operands have many tiles, blocks and tasks."""
    panel = (2 if packed else 1) * lanes_of(profiles()[profile], "float32")
    return Blocking(rows, -(-rows // 2) if packed else rows, 2 if packed else 1, blocks * panel, rows * tiles, packed)


def own_choice() -> list[Layer]:
    """Sizes with and without tails, in the template's own blocking."""
    return [
        Layer((1, 2, 2, 16, 16, 64, 64)),
        Layer((2, 3, 3, 50, 50, 64, 64), order="bsm"),
        Layer((1, 2, 1, 77, 77, 32, 32), causal=True, order="bshd"),
        Layer((1, 1, 1, 128, 128, 80, 80)),
        Layer((1, 1, 1, 33, 700, 20, 13)),
        Layer((1, 1, 1, 5, 3, 256, 256)),
        Layer((1, 1, 1, 1, 1, 1, 1)),
        Layer((1, 4, 2, 1, 300, 40, 24)),
        Layer((2, 2, 2, 1, 600, 64, 64), causal=True),
        Layer((1, 2, 2, 19, 40, 24, 24), dtype="float64"),
        Layer((1, 2, 2, 19, 40, 24, 24), dtype="float16"),
        Layer((1, 2, 2, 19, 40, 24, 24), softcap=1.5),
    ]


def many_blocks(profile: str) -> list[Layer]:
    """Statistics carried over blocks of keys, several tasks to a head, tails of rows."""
    made = small(profile)
    return [
        Layer((2, 2, 2, 31, 200, 20, 40), made),
        Layer((1, 2, 2, 12, 128, 16, 16), made),
        Layer((1, 6, 2, 17, 100, 16, 16), made, causal=True),
        Layer((2, 2, 2, 29, 90, 24, 33), made, mask=(2, 1, 1, 90)),
        Layer((2, 2, 1, 29, 90, 24, 33), made, mask=(1, 2, 29, 90), mask_dtype="float32"),
        Layer((2, 2, 2, 29, 150, 24, 33), made, lengths=(150, 37)),
        Layer((2, 2, 2, 29, 150, 24, 33), made, lengths=(13, 0), causal=True, softcap=2.0),
        Layer((1, 4, 2, 3, 150, 24, 33), small(profile, packed=False), mask=(1, 4, 3, 150), causal=True),
    ]


MASKS: list[tuple[int, ...]] = [(2, 4, 9, 35), (1, 4, 1, 35), (2, 1, 9, 35), (1, 1, 9, 30), (2, 1, 1, 33), (1, 1, 1, 1)]
"""Masks broadcast along different axes; some end before the keys do."""


def masks() -> list[Layer]:
    """Flags and numbers, with heads that share keys and without."""
    return [
        Layer((2, 4, heads, 9, 35, 16, 16), mask=mask, mask_dtype=dtype, causal=causal)
        for mask in MASKS
        for dtype, heads, causal in (("bool", 4, False), ("float32", 2, True))
    ]


def symbolic(profile: str) -> list[Layer]:
    """Sizes known only when the kernel runs: the same kernel over all of them."""
    made = small(profile, rows=9)
    sizes = [(1, 1), (2, 5), (4, 40), (5, 33), (9, 64), (10, 100), (14, 7), (23, 130), (40, 1)]
    return [
        Layer((2, 4, 2, queries, keys, 16, 24), made, causal=causal, symbolic=True)
        for queries, keys in sizes
        for causal in (False, True)
    ]


def cases(layers: Sequence[Layer], profile: str) -> list[Case]:
    return [layer.case(profile) for layer in layers]


@pytest.mark.parametrize("profile", PROFILES)
def test_shapes(profile: str) -> None:
    check(cases([*own_choice(), *many_blocks(profile)], profile), profile)


@pytest.mark.parametrize("profile", PROFILES)
def test_masks(profile: str) -> None:
    check(cases(masks(), profile), profile)


@pytest.mark.parametrize("profile", PROFILES)
def test_sizes_known_at_run_time(profile: str) -> None:
    first: dict[bool, Case] = {}
    made = []
    for layer in symbolic(profile):
        case = layer.case(profile)
        same = first.setdefault(layer.causal, case)
        feeds = dict(zip(same.feeds, case.feeds.values(), strict=True))
        made.append(dataclasses.replace(case, outputs=same.outputs, feeds=feeds))
    check(made, profile)


def test_every_candidate_gives_the_same() -> None:
    extents = (1, 2, 2, 45, 210, 24, 24)
    problem = Problem(1, 2, 1, 45, 210, 24, 24, "float32", "float32", "none", False)
    blockings = [Blocking.of(c) for c in problem.candidates(profiles()[WIDEST])]
    assert len(blockings) > 4
    check([Layer(extents, blocking).case(WIDEST) for blocking in blockings], WIDEST)


# -- numbers at the edge ---------------------------------------------------------------------------------------


def edge(change: dict[str, tuple[int, float]], mask: np.ndarray | None = None) -> tuple[Case, np.ndarray]:
    """One head of one feature whose scores are the keys, carried over three blocks; what it gives."""
    data = Arrays()
    keys = 3 * small(WIDEST).keys
    q, k = data.constant(np.ones((1, 1, 4, 1), "float32")), data.source((1, 1, keys, 1))
    v = data.source((1, 1, keys, 2))
    for name, (at, value) in change.items():
        data.feeds[k if name == "k" else v][0, 0, at] = value
    extra = None if mask is None else data.constant(mask)
    views = [Map(x.shape, x.dtype, lambda *at, x=x: x[at]) for x in (q, k, v)]
    nest = Layer((1, 1, 1, 4, keys, 1, 2), small(WIDEST)).nest(WIDEST, *views, extra, None)
    given = {} if mask is None else {"mask": mask}
    with np.errstate(invalid="ignore"):
        want = reference(*(data[x] for x in (q, k, v)), **given)
    return data.case("edge", nest.output, want), want


def test_nan_reaches_its_rows() -> None:
    case, want = edge({"k": (40, math.nan)})
    assert np.isnan(want).all()
    check([case], WIDEST)


def test_scores_far_apart_and_infinite() -> None:
    large, _ = edge({"k": (70, 1e38)})
    low, _ = edge({"k": (3, -math.inf)})
    check([large, low], WIDEST)


def test_the_lowest_number_as_a_mask_is_no_closed_key() -> None:
    """Where a whole row has it, the standard's softmax weighs all keys equally."""
    keys = 3 * small(WIDEST).keys
    mask = np.zeros((1, 1, 4, keys), "float32")
    mask[0, 0, 1] = np.finfo("float32").min
    mask[0, 0, 2, 5:] = np.finfo("float32").min
    case, want = edge({}, mask)
    np.testing.assert_allclose(want[0, 0, 1], case.feeds[list(case.feeds)[2]][0, 0].mean(axis=0), atol=1e-6)
    check([case], WIDEST)


def test_rows_without_an_open_key_are_zero() -> None:
    keys = 3 * small(WIDEST).keys
    for dtype, closed in (("bool", False), ("float32", -math.inf)):
        mask = np.full((1, 1, 4, keys), dtype == "bool").astype(dtype)
        mask[0, 0, 2] = closed
        mask[0, 0, 1, :-3] = closed
        case, want = edge({}, mask)
        assert not want[0, 0, 2].any()
        check([case], WIDEST)


# -- parameters ------------------------------------------------------------------------------------------------


def resident() -> int:
    """Bytes of memory this process has used at most since the count was last set back."""
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def test_memory_does_not_grow_with_the_square_of_the_sequence() -> None:
    """One head over 8,192 steps: a matrix of scores would be 256 MiB."""
    steps, size = 8192, 16
    data = Arrays()
    q, k, v = (data.source((1, steps, 1, size)) for _ in range(3))
    nest = Layer((1, 1, 1, steps, steps, size, size)).nest(WIDEST, *map(heads_first, (q, k, v)), None, None)
    compiled = compile_kernels([[nest.output]], profiles()[WIDEST])
    want = np.zeros((1, 1, steps, size), "float32")
    case = Case("long", [nest.output], dict(data.feeds), [want])
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        pytest.skip(f"the peak of memory cannot be set back here: {error}")
    before = resident()
    (got,) = compiled.run(case, Memory(guard=False))
    assert resident() - before < 32 << 20
    rows = [0, 777, steps - 1]
    ends = [data[q][:, rows].swapaxes(1, 2), *(data[x].swapaxes(1, 2) for x in (k, v))]
    np.testing.assert_allclose(got[:, :, rows], reference(*ends), atol=1e-5)


def test_candidates_fit_the_problem() -> None:
    for queries, keys in [(1, 7), (FEW, 100), (FEW + 1, 100), (1500, 1500), (UNKNOWN, UNKNOWN)]:
        problem = Problem(1, 4, 1, queries, keys, 64, 64, "float32", "float32", "none", False)
        for profile in profiles().values():
            lanes = lanes_of(profile, "float32")
            for candidate in problem.candidates(profile):
                made = Blocking.of(candidate)
                assert made.keys % (made.vectors * lanes) == 0
                assert made.chunk % made.rows == 0
                assert made.height * made.vectors + made.vectors < profile.registers
                assert made.rows % made.height == 0 or not made.packed
                assert made.packed == (queries == UNKNOWN or queries > FEW)
                assert candidate.cycles > 0
