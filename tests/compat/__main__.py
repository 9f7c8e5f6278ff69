"""``python -m tests.compat``: the whole suite, in parallel, resumable."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import sys
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]


def main() -> int:
    """Run, write the results, print the table; 1 when the suite is not passed."""
    options = _options()
    for name in ("OMP_NUM_THREADS", "TVM_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    from tests.compat.cases import all_cases
    from tests.compat.farm import code_digest, run_cases, warm_up
    from tests.compat.report import as_json, failures, page, table

    cases = [case for case in all_cases() if re.search(options.only, case.name)]
    code = code_digest(ROOT)
    journal = options.output.with_suffix(".jsonl")
    journal.parent.mkdir(parents=True, exist_ok=True)
    known = _known(journal, code, options.any_code)
    keys = {case.name: case.digest for case in cases}
    todo = [c for c in cases if _again(known.get((c.name, c.digest)), options.again)]
    print(f"{len(cases)} models, {len(cases) - len(todo)} known", file=sys.stderr)
    warm_up()
    started = time.monotonic()
    with journal.open("a", encoding="utf-8") as file:
        for number, record in enumerate(run_cases(todo, options.jobs, options.timeout), 1):
            record.update(model=keys[record["name"]], code=code)
            known[record["name"], record["model"]] = record
            file.write(json.dumps(record) + "\n")
            file.flush()
            _show(record, number, len(todo), time.monotonic() - started)
    records = [known[case.name, case.digest] for case in cases]
    options.output.write_text(json.dumps(as_json(records), indent=1) + "\n", encoding="utf-8")
    if options.docs:
        options.docs.write_text(page(records), encoding="utf-8")
    print(table(records))
    problems = failures(records)
    for problem in problems:
        print(problem)
    print(f"{'FAILED' if problems else 'passed'}: results in {options.output}")
    return 1 if problems else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.compat", description=__doc__)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("-o", "--output", type=pathlib.Path, default=ROOT / "build" / "compat.json", help="results")
    parser.add_argument("--docs", type=pathlib.Path, help="write the page docs/operators.md here")
    parser.add_argument("--only", default="", metavar="REGEX", help="models whose name matches")
    parser.add_argument("--timeout", type=float, default=180.0, help="seconds a model may take")
    parser.add_argument("--any-code", action="store_true", help="keep results of other versions of the code")
    parser.add_argument("--again", default="", metavar="REGEX", help="run those again whose known status matches")
    return parser.parse_args()


def _known(journal: pathlib.Path, code: str, any_code: bool) -> dict[tuple[str, str], dict[str, Any]]:
    """Results of earlier runs; the last one of a model counts."""
    if not journal.exists():
        return {}
    records = []
    for line in journal.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:  # the last line of a killed run
            continue
    return {(r["name"], r["model"]): r for r in records if any_code or r["code"] == code}


def _again(record: dict[str, Any] | None, pattern: str) -> bool:
    return record is None or bool(pattern and re.search(pattern, record["status"]))


def _show(record: dict[str, Any], number: int, count: int, seconds: float) -> None:
    left = seconds / number * (count - number)
    line = (
        f"[{number}/{count}, {left / 60:.0f} min left] {record['status']:9} {record['name']} {record['seconds']:.1f} s"
    )
    if record["status"] in ("wrong", "error", "crashed"):
        line += f": {' '.join(str(record['reason']).split())[:160]}"
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
