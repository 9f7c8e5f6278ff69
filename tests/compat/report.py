"""Tables and the verdict over all records."""

from __future__ import annotations

import collections
import datetime
import importlib.metadata
from collections.abc import Sequence
from typing import Any

from tests.compat.judge import CRASHED, ERROR, FALLBACK, NATIVE, PARTLY, REFUSED, RIGHT, STATUSES, WRONG

NATIVE_SHARE = 0.85
"""Least share of models that run without any onnxruntime."""

Record = dict[str, Any]


def totals(records: Sequence[Record]) -> dict[str, int]:
    """Models by status."""
    counted = collections.Counter(str(r["status"]) for r in records)
    return {status: counted[status] for status in STATUSES}


def by_family(records: Sequence[Record]) -> dict[str, dict[str, int]]:
    """Models by status, for each row of the table."""
    groups: dict[str, list[Record]] = collections.defaultdict(list)
    for record in records:
        groups[str(record["family"])].append(record)
    return {name: totals(groups[name]) for name in sorted(groups, key=str.lower)}


def failures(records: Sequence[Record]) -> list[str]:
    """What keeps the suite from being passed; empty when it is."""
    problems = []
    for status in (WRONG, ERROR, CRASHED):
        problems += [f"{r['name']}: {status}: {r.get('reason', '')[:200]}" for r in records if r["status"] == status]
    problems += [
        f"{r['name']}: onnxruntime runs it, mmopt does not: {r['reason'][:200]}"
        for r in records
        if r["status"] == REFUSED and r.get("onnxruntime") == "right"
    ]
    native = sum(r["status"] == NATIVE for r in records)
    if native < NATIVE_SHARE * len(records):
        problems.append(f"{native} of {len(records)} models run natively, less than {NATIVE_SHARE:.0%}")
    return problems


def as_json(records: Sequence[Record]) -> dict[str, Any]:
    """All results."""
    packages = ("onnx", "onnxruntime", "apache-tvm", "numpy")
    return {
        "schema_version": 1,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "models": len(records),
        "totals": totals(records),
        "passed": not failures(records),
        "failures": failures(records),
        "operators": by_family(records),
        "results": sorted(records, key=lambda r: str(r["name"])),
    }


def table(records: Sequence[Record]) -> str:
    """A Markdown table by operator."""
    head = ["operator", "models", *STATUSES]
    lines = [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
    rows = [*by_family(records).items(), ("**all**", totals(records))]
    for name, counts in rows:
        cells = [str(sum(counts.values())), *(str(counts[s] or "") for s in STATUSES)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def page(records: Sequence[Record]) -> str:
    """The documentation page."""
    counts = totals(records)
    right = sum(counts[s] for s in RIGHT)
    onnx, ort = (importlib.metadata.version(name) for name in ("onnx", "onnxruntime"))
    reasons = collections.Counter(
        (str(r["family"]), note) for r in records if r["status"] in (PARTLY, FALLBACK) for note in _short(r)
    )
    refused = sorted(f"- `{r['name']}`: {_line(r['reason'])}" for r in records if r["status"] == REFUSED)
    return "\n".join(
        [
            "# Operators",
            "",
            f"What becomes of the {len(records)} models of the operator conformance suite of onnx {onnx}, each optimized",
            f"at `-O2`, compiled to an artifact and run, with onnxruntime {ort} for what has no native code. Generated",
            "by `python -m tests.compat --docs docs/operators.md`; do not edit.",
            "",
            f"{counts[NATIVE]} run without any onnxruntime, {counts[PARTLY]} partly and {counts[FALLBACK]} wholly in it:",
            f"{right} give the expected outputs. {counts[REFUSED]} are refused.",
            "",
            "`native`: no onnxruntime. `partly`: some nodes in it. `fallback`: all nodes in it. `refused`: an error names",
            "the node and the reason. `wrong`, `error` and `crashed` are bugs.",
            "",
            table(records),
            "",
            "## Why models fall back",
            "",
            "| operator | reason | models |",
            "| --- | --- | ---: |",
            *(f"| {family} | {reason} | {count} |" for (family, reason), count in sorted(reasons.items())),
            "",
            "## Refused models",
            "",
            *(refused or ["None."]),
            "",
        ]
    )


def _short(record: Record) -> list[str]:
    return sorted({_line(note.split(": ", 2)[-1]) for note in record.get("notes", ())})


def _line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")[:160]
