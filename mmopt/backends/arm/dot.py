"""Which NEON instructions multiply which numbers.

A vector of the left operand is loaded for each row, and the instruction takes one 32-bit group of it for all lanes: so
kernels go on by a whole vector of depth at a time. Matrix instructions take eight bytes of two rows and two columns,
and do twice as much; see :mod:`mmopt.backends.arm.matrix_code`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

VECTOR_BYTES = 16
LANES = 4
"""Sums of 32 bits in a vector."""

MATRICES = ("smmla", "usmmla", "bfmmla")
"""Instructions that multiply two rows by two columns."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """An instruction and what it takes; see :class:`mmopt.backends.cpu.dot.Dot`.

    Attributes:
        name: Its mnemonic; ``fma`` where operands are widened to float32.
        a: Left operand in memory.
        b: Right operand in memory.
        total: Type of the sums.
        group: Neighbours in depth that one lane takes.
        step: Elements of depth in a vector of the left operand.
        deepest: Elements of depth that a kernel may go on by, if there are more.
        temporaries: Registers needed besides sums and operands.
        shift: What has to be added to the left operand, because ``a`` has another sign than it.
    """

    name: str
    a: str
    b: str
    total: str
    group: int
    step: int
    temporaries: int = 0
    shift: int = 0
    deepest: int = 0


def neon_choice(features: Collection[str], a: str, b: str) -> Choice | None:
    """The best way to multiply ``a`` by ``b``.

    Args:
        features: What the processor has, by Linux's names.
        a: Element type of the left operand.
        b: Element type of the right operand.

    Returns:
        ``None`` for types that are not multiplied in narrow numbers.
    """
    if b == "int8" and a in ("int8", "uint8"):
        return _integers(features, a)
    if (a, b) == ("bfloat16", "bfloat16") and "bf16" in features:
        return Choice("bfmmla", "bfloat16", "bfloat16", "float32", 4, 8)
    if (a, b) in (("bfloat16", "bfloat16"), ("float16", "float16")):  # sums in float16 would lose too much
        return Choice("fma", "float32", b, "float32", 1, 4, temporaries=1)
    if a == "float32" and b in ("float32", "bfloat16", "int8"):
        return Choice("fma", "float32", b, "float32", 1, 4, temporaries=0 if b == "float32" else 1)
    return None


def _integers(features: Collection[str], a: str) -> Choice:
    if "i8mm" in features:
        return Choice("smmla" if a == "int8" else "usmmla", a, "int8", "int32", 8, 16)
    if "asimddp" not in features:
        return Choice("smlal", "int16", "int8", "int32", 1, 8, temporaries=1)
    return Choice("sdot", "int8", "int8", "int32", 4, 16, shift=0 if a == "int8" else -128, deepest=32)


def rows_that_fit(choice: Choice, registers: int, vectors: int) -> int:
    """Rows of the largest kernel: its sums, a vector of the left operand for each row, a row of the right operand.

    A matrix instruction wants pairs of rows; four registers are left for vectors of the right operand and their order.
    Dot products of bytes take two vectors of each row at a time, and four of the right operand.
    """
    if choice.name in MATRICES:
        return min(14, (registers - 4) // (vectors + 1) // 2 * 2)
    if choice.name == "sdot":
        return (registers - 4) // (vectors + 2)
    return max(1, min(14, (registers - vectors - choice.temporaries) // (vectors + 1)))
