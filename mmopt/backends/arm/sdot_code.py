"""The text of micro-kernels of NEON's dot products of bytes.

A lane takes four neighbours in depth, and an instruction can pick one group of four of a register for all lanes. So of
each row of A up to 32 bytes are loaded by one instruction, and of B four registers by another; both move their
pointers on, so that little but dot products is executed. LLVM finds neither form by itself, so steps are written in
assembly. Sums are in registers that LLVM chooses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from mmopt.backends.arm.dot import LANES, VECTOR_BYTES
from mmopt.backends.cpu.dot_code import Vectors

REGISTERS = 32
RUN = 4
"""Registers of B that one instruction loads."""

GROUP = 4
"""Bytes that a lane takes."""


def _registers(first: int, count: int) -> str:
    """A list of neighbouring registers of bytes."""
    return "{" + ", ".join(f"v{first + n}.16b" for n in range(count)) + "}"


def _escaped(lines: Iterable[str]) -> str:
    """Instructions as they look in assembly, as a string of LLVM's language."""
    return "\n".join("\t" + line.replace(" ", "\t", 1) for line in lines).replace("\t", "\\09").replace("\n", "\\0A")


@dataclasses.dataclass(frozen=True)
class _Row:
    """How a step of a row of A comes into registers.

    Attributes:
        step: Bytes of the step, at most 32.
        first: The first register.
    """

    step: int
    first: int

    def loads(self, pointer: str) -> Iterator[str]:
        """Instructions that load the step and move ``pointer`` on. Nothing behind the step is read."""
        first, rest = self.first, self.step - VECTOR_BYTES
        if rest == VECTOR_BYTES:
            yield f"ldp q{first}, q{first + 1}, [{pointer}], #{self.step}"
        elif rest >= 0:  # the second register takes the end of the step, with some of what the first has
            yield f"ldr q{first}, [{pointer}], #{rest or VECTOR_BYTES}"
            if rest:
                yield f"ldr q{first + 1}, [{pointer}], #{VECTOR_BYTES}"
        else:
            yield f"ldr {'d' if self.step >= 8 else 's'}{first}, [{pointer}], #{min(8, self.step)}"
            if self.step == 12:
                yield f"ld1 {{v{first}.s}}[2], [{pointer}], #4"

    def group(self, number: int) -> str:
        """Where group ``number`` of the step is."""
        if number < LANES:
            return f"v{self.first}.4b[{number}]"
        begin = self.step - VECTOR_BYTES
        return f"v{self.first + 1}.4b[{(number * GROUP - begin) // GROUP}]"


class NeonDots(Vectors):
    """Sums in vector registers; A is taken group by group, B in runs of registers."""

    rolled = True

    def start(self) -> list[tuple[str, str]]:
        return [*super().start(), ("ptr", "%b")]

    def enter(self, a: str) -> list[tuple[str, str]]:
        return [("ptr", row) for row in self._rows(a, "%as")]

    def finish(self, sums: Sequence[str]) -> None:
        super().finish(sums[:-1])

    def step(self, a: str, b: str, sums: Sequence[str]) -> list[str]:
        kernel, width = self.kernel, self.dot.step // VECTOR_BYTES + (self.dot.step % VECTOR_BYTES > 0)
        count = kernel.rows * kernel.vectors
        types = [self.sum_type] * count + ["ptr"] * (1 + kernel.rows)
        free = REGISTERS - RUN - kernel.rows * width
        rows = [_Row(self.dot.step, free + r * width) for r in range(kernel.rows)]
        used = ",".join(f"~{{v{n}}}" for n in range(free, REGISTERS))
        kinds = ["w" if kind != "ptr" else "r" for kind in types]
        constraints = ",".join([f"={kind}" for kind in kinds] + [str(n) for n in range(len(types))])
        arguments = ", ".join(f"{kind} {value}" for kind, value in zip(types, sums, strict=True))
        text = _escaped(self._lines(rows, count))
        result = f"{{ {', '.join(types)} }}"
        made = self.w.let(f'call {result} asm sideeffect "{text}", "{constraints},{used},~{{memory}}"({arguments})')
        return [self.w.let(f"extractvalue {result} {made}, {n}") for n in range(len(types))]

    def _lines(self, rows: Sequence[_Row], count: int) -> Iterator[str]:
        """Instructions of a step; operands are sums, the pointer to B, and one for each row."""
        vectors, groups = self.kernel.vectors, self.dot.step // GROUP
        for r, row in enumerate(rows):
            yield from row.loads(f"${count + 1 + r}")
        total, first = groups * vectors, REGISTERS - RUN
        for number in range(total):
            if number % RUN == 0:
                run = min(RUN, total - number)
                yield f"ld1 {_registers(first, run)}, [${count}], #{run * VECTOR_BYTES}"
            group, v = divmod(number, vectors)
            for r, row in enumerate(rows):
                yield f"sdot ${r * vectors + v}.4s, v{first + number % RUN}.16b, {row.group(group)}"
