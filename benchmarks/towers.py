"""Tower discovery over the reference models, against the structure each must show; keeps the table of docs/towers.md.

``python -m benchmarks.towers FOLDER [--models clip-vit-b32,…] [--write]``

Models are exported to ``FOLDER/NAME`` unless they are there already. Without ``--write`` the table in the page must be
the one that discovery gives now. Exit code 1 when a structure or the table differs.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import sys
from collections.abc import Iterable, Sequence

import onnx_ir as ir

from benchmarks.zoo import ZOO, Structure, ZooModel
from mmopt.analysis.dims import Size
from mmopt.analysis.tower_report import TowerReport
from mmopt.analysis.towers import analyze_towers
from mmopt.errors import MmoptError, UserError, did_you_mean
from mmopt.ir.module import Module

PAGE = pathlib.Path(__file__).resolve().parents[1] / "docs" / "towers.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
HEADER = "| model | towers: inputs, parameters, MACs | projectors | fusion | level | own weights | entry points |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0; 1 when something differs; the exit code of an error.
    """
    options = _parser().parse_args(arguments)
    try:
        return _run(options.folder, _chosen(options.models), write=options.write)
    except MmoptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _run(folder: pathlib.Path, names: list[str], *, write: bool) -> int:
    rows: dict[str, str] = {}
    wrong = 0
    for name in names:
        if missing := ZOO[name].missing():
            print(f"{name}: skipped, {missing} is missing", file=sys.stderr)
            continue
        report = discover(ZOO[name], folder)
        for line in (found := differences(report, ZOO[name].expected_towers)):
            print(f"{name}: {line}", file=sys.stderr)
        wrong += len(found)
        rows[name] = row(name, report)
        print(rows[name], flush=True)
    page = PAGE.read_text()
    kept = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith("| ")}
    if write:
        PAGE.write_text(replaced(page, table(line for name in ZOO if (line := rows.get(name, kept.get(name, ""))))))
    elif stale := [line for line in rows.values() if line not in kept.values()]:
        print(f"{PAGE.name} is out of date for {len(stale)} models; run again with --write", file=sys.stderr)
        wrong += len(stale)
    return 1 if wrong else 0


def discover(model: ZooModel, folder: pathlib.Path, *, dynamic: bool = False) -> TowerReport:
    """Export a model, unless it is there, and analyze it.

    Args:
        model: The model.
        folder: Where models are kept.
        dynamic: Take the export with symbolic sizes; else the one of batch 1.
    """
    return analyze_towers(Module(ir.load(model.export(folder, dynamic=dynamic))))


def differences(report: TowerReport, expected: Structure) -> list[str]:
    """What a report says otherwise than expected, one line each."""
    towers = {tower.inputs for tower in report.towers}
    compared = {
        "modalities": ({n: r.modality.value for n, r in report.inputs.items()}, dict(expected.modalities)),
        "towers": (sorted(towers), sorted(expected.towers.values())),
        "fusion": (tuple(f.kind for f in report.fusions), expected.fusion),
        "level": (report.level, expected.level),
        "shared weights": (bool(report.shared), expected.shared_weights),
    }
    return [f"{what} {found}, expected {wanted}" for what, (found, wanted) in compared.items() if found != wanted]


def row(name: str, report: TowerReport) -> str:
    """The line of a model in the table."""
    towers = "; ".join(
        f"**{t.name}**: {', '.join(f'`{n}`' for n in (*t.inputs, *t.auxiliary))}, "
        f"{_count(t.part.parameters)}, {_count(t.part.macs)}"
        for t in report.towers
    )
    projectors = ", ".join(f"{p.tower} {_count(p.part.parameters)}" for p in report.projectors) or "–"
    kinds = ", ".join(f.kind for f in report.fusions) or "–"
    shared = f"shared by {' and '.join(report.shared[0].towers)}" if report.shared else "yes"
    entries = "–" if report.uncut else f"{len(report.towers)} + `fuse`"
    return f"| {name} | {towers} | {projectors} | {kinds} | {report.level or '–'} | {shared} | {entries} |"


def _count(number: Size | None) -> str:
    if not isinstance(number, int):
        return "?"
    for unit, name in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return str(number)


def table(rows: Iterable[str]) -> str:
    """The whole table."""
    return "\n".join([HEADER, re.sub(r"[^|]+", " --- ", HEADER), *rows])


def replaced(page: str, content: str) -> str:
    """The page with another table."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{content}\n{END}{after}"


def _chosen(names: str) -> list[str]:
    chosen = [name for name in names.split(",") if name] or list(ZOO)
    for name in chosen:
        if name not in ZOO:
            raise UserError(f"there is no model {name!r}", where="--models", hint=did_you_mean(name, ZOO))
    return chosen


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.towers", description="Tower discovery over the zoo.")
    parser.add_argument("folder", type=pathlib.Path, metavar="FOLDER", help="where exported models are kept")
    parser.add_argument("--models", default="", metavar="NAME,…", help="some models only")
    parser.add_argument("--write", action="store_true", help="rewrite the table in docs/towers.md")
    return parser


if __name__ == "__main__":
    sys.exit(main())
