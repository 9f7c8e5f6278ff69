"""Code quality on NVIDIA GPUs without one: machine code of every reference model.

``python -m benchmarks.cuda [--models bert-base,…] [--targets cuda-sm80,cuda-sm90] [--precision fp32] [--json FILE]``

Every model is optimized and compiled for each target, and what the compiler says of its kernels is read: registers,
shared memory, spills, and the part of a multiprocessor's threads that they can fill. Kernels from the templates for
products, convolutions and attention may not spill, and have to have tensor-core instructions in their machine code.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.console import Console

import mmopt
from benchmarks.models import chosen
from benchmarks.zoo import ZOO, ZooModel
from mmopt.backends.cuda.compiler import tensor_instructions
from mmopt.backends.cuda.pipeline import compiled_kernels, generate
from mmopt.backends.cuda.resources import described, launcher
from mmopt.backends.profile import Profile, load_profile
from mmopt.bench.render import Sheet
from mmopt.errors import MmoptError
from mmopt.ir.module import Module
from mmopt.lowering.compiler import CompileOptions
from mmopt.lowering.partition import partition
from mmopt.lowering.program import ProgramBuilder

SCHEMA_VERSION = 1
TARGETS = ("cuda-sm80", "cuda-sm90")
PRECISIONS = ("fp32", "bf16", "fp16", "int8")
"""Number formats; ranges of int8 come from made-up samples, which decide no kernel."""

TEMPLATES = ("tensor_product", "dequantized_product", "tensor_convolution", "tensor_attention")
"""Templates that multiply on tensor cores."""


@dataclasses.dataclass
class Line:
    """The kernels of one model for one target.

    Attributes:
        model: Name of the model.
        target: Name of the profile.
        seconds: From the optimized model to machine code.
        native: Whether nothing is left to onnxruntime.
        kernels: Kernels on the GPU.
        launches: Launches of one run; 0 where that depends on data.
        templates: Those from templates for tensor cores.
        without: Names of those among them that have no tensor-core instruction.
        spilling: Bytes that those among them spill, by name; those that spill nothing are left out.
        others: The same of all other kernels.
        registers: Most registers of a thread.
        occupancy: Least part of a multiprocessor's threads that blocks of a template's kernel can fill.
        problem: Why there is no machine code, or "".
    """

    model: str
    target: str
    seconds: float = 0.0
    native: bool = True
    kernels: int = 0
    launches: int = 0
    templates: int = 0
    without: list[str] = dataclasses.field(default_factory=list)
    spilling: dict[str, int] = dataclasses.field(default_factory=dict)
    others: dict[str, int] = dataclasses.field(default_factory=dict)
    registers: int = 0
    occupancy: float = 1.0
    problem: str = ""

    @property
    def passes(self) -> bool:
        """Whether there is machine code, whose templates use tensor cores and spill nothing."""
        return not (self.problem or self.without or self.spilling)


def examine(module: Module, model: str, profile: Profile) -> Line:
    """Compile an optimized module, and read its machine code."""
    start = time.perf_counter()
    builder = ProgramBuilder(profile)
    parts = partition(module, "main", builder, CompileOptions())
    made = generate(builder.module(), profile, list(builder.kernels))
    line = Line(model, profile.name, native=all(part.model is None for part in parts))
    if not made.source:
        return line
    compiled = compiled_kernels(made, profile.sm)
    line.seconds = time.perf_counter() - start
    multiply = tensor_instructions(compiled)
    names = (name for name, record in builder.kernels.items() if record["template"] in TEMPLATES)
    of_templates = {made.together.get(name, name) for name in names}
    line.launches = sum(count for order in made.repeatable.values() for count, _ in order)
    mains = {name for name in compiled.resources if launcher(name) in of_templates and _is_main(name, multiply)}
    records = described(compiled.resources, made.source, profile)
    line.kernels, line.templates = len(compiled.resources), len(of_templates)
    line.without = sorted(of_templates - {launcher(name) for name in mains})
    line.registers = max(taken.registers for taken in compiled.resources.values())
    for name, taken in compiled.resources.items():
        if taken.spills:
            (line.spilling if name in mains else line.others)[name] = taken.spills
    line.occupancy = min((r["occupancy"] for n in of_templates for r in records.get(n, ()) if r["shared"]), default=1.0)
    return line


def _is_main(kernel: str, multiply: dict[str, int]) -> bool:
    """Whether ``kernel`` multiplies; others that a template's function launches prepare or finish."""
    return bool(multiply.get(kernel))


def compiled_lines(
    models: Iterable[ZooModel], targets: Sequence[str], options: argparse.Namespace, work: pathlib.Path
) -> Iterator[Line]:
    """A line for each model and target."""
    for model in models:
        if model.missing():
            yield Line(model.name, "-", problem=f"{model.missing()} is missing")
            continue
        source = model.export(work, batch=options.batch)
        for target in targets:
            try:
                result = mmopt.optimize(
                    mmopt.load(source),
                    target=target,
                    precision=options.precision,
                    validate=options.validate,
                    samples="random" if options.precision == "int8" else None,
                )
                yield examine(result.module, model.name, load_profile(target))
            except MmoptError as error:
                yield Line(model.name, target, problem=str(error))


COLUMNS = (
    "model",
    "target",
    "kernels",
    "launches",
    "templates",
    "no mma",
    "spilled",
    "elsewhere",
    "registers",
    "occupancy",
    "s",
)


def sheet(lines: Sequence[Line]) -> Sheet:
    """The table."""
    rows = [
        [
            line.model,
            line.target,
            str(line.kernels),
            str(line.launches),
            str(line.templates),
            str(len(line.without)),
            str(sum(line.spilling.values())),
            str(sum(line.others.values())),
            str(line.registers),
            f"{line.occupancy:.0%}",
            f"{line.seconds:.1f}" if not line.problem else line.problem,
        ]
        for line in lines
    ]
    return Sheet("machine code for NVIDIA GPUs", COLUMNS, rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table. Gives 7 when a model does not compile, or a template spills or does not use tensor cores."""
    options = _parser().parse_args(arguments)
    out = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    lines: list[Line] = []
    try:
        models = [ZOO[name] for name in chosen(options.models, tuple(sorted(ZOO)), "--models")]
        with tempfile.TemporaryDirectory(prefix="mmopt-cuda-") as folder:
            work = options.work or pathlib.Path(folder)
            for line in compiled_lines(models, options.targets.split(","), options, work):
                lines.append(line)
                out.print(_told(line), markup=False)
    except MmoptError as error:
        out.print(f"error: {error}", markup=False)
        return error.exit_code
    out.print(sheet(lines).markdown() if options.markdown else sheet(lines).rich())
    if options.json:
        content: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "precision": options.precision}
        content["lines"] = [{**dataclasses.asdict(line), "passes": line.passes} for line in lines]
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0 if all(line.passes for line in lines) else 7


def _told(line: Line) -> str:
    said = f"{line.model}, {line.target}: {line.kernels} kernels in {line.seconds:.1f} s"
    wrong = [line.problem] if line.problem else []
    wrong += [f"no tensor cores in {', '.join(line.without)}"] if line.without else []
    wrong += [f"{name} spills {count} bytes" for name, count in line.spilling.items()]
    return f"{said}: {'; '.join(wrong) or 'ok'}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", default=",".join(sorted(ZOO)), metavar="NAMES", help="with commas (all)")
    parser.add_argument("--targets", default=",".join(TARGETS), metavar="NAMES", help="with commas (%(default)s)")
    parser.add_argument("--precision", default="fp32", choices=PRECISIONS, help="(%(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--validate", default="end", choices=("each", "end", "off"), help="of rewrites (%(default)s)")
    parser.add_argument("--work", type=pathlib.Path, metavar="FOLDER", help="keep exports there")
    parser.add_argument("--markdown", action="store_true", help="print the table for a page")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write everything as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
