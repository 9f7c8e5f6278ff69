"""Accuracy after quantization: mmopt's passes beside onnxruntime's static quantization and NNCF, on trained networks.

``python -m benchmarks.quantization FOLDER [--data ../shared/data] [--networks digits,polarity,minilm] [--json FILE]``

FOLDER holds the networks of ``benchmarks.trained``, which are made when missing. Every method gets the same calibration
samples and is judged by onnxruntime on the same test samples: accuracy, or how far cosine similarities of embeddings
move; with 95 % intervals of the difference from the float network, and of differences from peers in score and in
squared error of the outputs, by resampling the test samples (paired bootstrap). Results are kept in
``FOLDER/quantized``; ``--reuse`` takes them from there.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from benchmarks.models import chosen
from benchmarks.quantizing import budgets, judging
from benchmarks.quantizing.methods import METHODS, Arrays
from benchmarks.trained import NETWORKS, prepare
from mmopt.bench import machine
from mmopt.errors import MmoptError

FLOAT = "float"
OURS = "mmopt w8a8"
SAMPLES = ("scores", "losses")
"""What a row says of each sample."""


def judge(name: str, folder: pathlib.Path, methods: Sequence[str], *, reuse: bool) -> list[dict[str, Any]]:
    """Quantize one network by every method and measure it."""
    calibration, test = (dict(np.load(folder / f"{name}.{part}.npz")) for part in ("calibration", "test"))
    labels = test.pop("labels", None)
    source = folder / f"{name}.onnx"
    plain = judging.outputs(source, test)
    rows = [_row(name, FLOAT, plain, plain, labels, ir.load(source))]
    for method in methods:
        slug = re.sub(r"[^a-z0-9]+", "-", f"{name} {method}".lower())
        kept = folder / "quantized" / slug
        if not (reuse and kept.with_suffix(".json").exists()):
            print(f"{name}: {method} …", file=sys.stderr, flush=True)
            _keep(kept, _measure(name, method, source, (calibration, test), plain, labels))
        rows.append(_kept(kept))
    return rows


def _measure(
    name: str, method: str, source: pathlib.Path, data: tuple[Arrays, Arrays], plain: Any, labels: Any
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="mmopt-quantization-") as scratch:
        target = pathlib.Path(scratch) / "quantized.onnx"
        try:
            METHODS[method](source, data[0], target)
            found = judging.outputs(target, data[1])
        except Exception as error:  # a peer may fail in any way; its row says so
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            return {"network": name, "method": method, "failed": reason}
        return _row(name, method, found, plain, labels, ir.load(target))


def _row(name: str, method: str, found: Any, plain: Any, labels: Any, model: ir.Model) -> dict[str, Any]:
    scores, before = (judging.scores(outputs, plain, labels) for outputs in (found, plain))
    change, low, high = judging.interval(scores, before)
    layers, products = judging.coverage(model)
    changed = None if labels is None else float((found.argmax(axis=1) != plain.argmax(axis=1)).mean())
    return {
        "network": name,
        "method": method,
        "score": float(scores.mean()),
        "change": change,
        "low": low,
        "high": high,
        "changed": changed,
        "error": judging.relative_error(found, plain),
        "bytes": judging.nbytes(model),
        "layers": layers,
        "products": products,
        "scores": scores,
        "losses": judging.losses(found, plain),
    }


def _keep(path: pathlib.Path, row: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    if "failed" not in row:
        np.savez(path.with_suffix(".npz"), **{key: row[key] for key in SAMPLES})
    path.with_suffix(".json").write_text(json.dumps(_summary(row)))


def _kept(path: pathlib.Path) -> dict[str, Any]:
    row: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
    return row if "failed" in row else {**row, **np.load(path.with_suffix(".npz"))}


def _summary(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what it says of each sample."""
    return {key: value for key, value in row.items() if key not in SAMPLES}


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The rows in Markdown."""
    lines = [
        "| network | method | in integers | score | change (95 %) | decides otherwise | error | weights |",
        f"|{' --- |' * 8}",
    ]
    sizes = {row["network"]: row["bytes"] for row in rows if row["method"] == FLOAT}
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['network']} | {row['method']} | failed: {row['failed']} | | | | | |")
            continue
        changed = "" if row["changed"] is None else f"{row['changed']:.2%}"
        share = row["bytes"] / sizes[row["network"]]
        lines.append(
            f"| {row['network']} | {row['method']} | {row['layers']} + {row['products']} | {row['score']:.3f} "
            f"| {row['change']:+.3f} ({row['low']:+.3f} … {row['high']:+.3f}) | {changed} | {row['error']:.2%} "
            f"| {row['bytes'] / 1e6:.2f} MB, {share:.3f}× |"
        )
    return lines


def against_peers(rows: Sequence[dict[str, Any]], ours: str) -> list[str]:
    """How ``ours`` differs from every peer on the same samples, in Markdown."""
    lines = [
        "| network | peer | score of ours less the peer's (95 %) | squared error of ours beside the peer's (95 %) |",
        f"|{' --- |' * 4}",
    ]
    for mine in (row for row in rows if row["method"] == ours and "scores" in row):
        for row in rows:
            if row["network"] != mine["network"] or "scores" not in row or row["method"].startswith(("mmopt", FLOAT)):
                continue
            mean, low, high = judging.interval(mine["scores"], row["scores"])
            share, least, most = judging.ratio(mine["losses"], row["losses"])
            lines.append(
                f"| {row['network']} | {row['method']} | {mean:+.3f} ({low:+.3f} … {high:+.3f}) "
                f"| {share:.2g}× ({least:.2g} … {most:.2g}) |"
            )
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0; the exit code of an error.
    """
    options = _parser().parse_args(arguments)
    if options.budgets:
        return _budgets(options)
    try:
        rows = []
        methods = chosen(options.methods, METHODS, "--methods")
        for name in chosen(options.networks, NETWORKS, "--networks"):
            prepare(name, options.folder, options.data)
            rows += judge(name, options.folder, methods, reuse=options.reuse)
    except MmoptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print("\n".join([*table(rows), "", f"{options.ours} beside its peers:", "", *against_peers(rows, options.ours)]))
    if options.json is not None:
        plain = [_summary(row) for row in rows]
        content = {"schema_version": 2, "kind": "mmopt-quantization", "machine": machine.facts(), "rows": plain}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


def _budgets(options: argparse.Namespace) -> int:
    try:
        rows = []
        for name in chosen(options.networks, NETWORKS, "--networks"):
            prepare(name, options.folder, options.data)
            rows += budgets.compare(name, options.folder)
    except MmoptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print("\n".join(budgets.table(rows)))
    if options.json is not None:
        content = {"schema_version": 1, "kind": "mmopt-budgets", "machine": machine.facts(), "rows": rows}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quantization", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("folder", type=pathlib.Path, metavar="FOLDER")
    parser.add_argument("--data", type=pathlib.Path, default=pathlib.Path("../shared/data"), metavar="FOLDER")
    parser.add_argument("--networks", default="", metavar="NAMES", help="with commas; default: all")
    parser.add_argument("--methods", default="", metavar="NAMES", help="with commas; default: all")
    parser.add_argument("--ours", default=OURS, metavar="NAME", help="compared with peers (%(default)s)")
    parser.add_argument("--reuse", action="store_true", help="take results that FOLDER has")
    parser.add_argument("--budgets", action="store_true", help="compare presets at equal sizes instead")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the rows here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
