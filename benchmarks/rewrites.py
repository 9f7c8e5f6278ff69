"""How many nodes rewriting leaves of each reference model: mmopt beside onnxslim, onnxsim and onnxruntime.

``python -m benchmarks.rewrites FOLDER [--models bert-base,…] [--json FILE]``

FOLDER holds exports (``NAME/b1.onnx``), which are made when missing. Constants are not counted, nodes of bodies of
control flow are, and a fused function counts as one node, as a fused operator of onnxruntime does. No times.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import tempfile
from collections.abc import Callable, Sequence

import onnx
import onnx_ir as ir

import mmopt
from benchmarks.models import chosen
from benchmarks.zoo import ZOO
from mmopt.errors import MmoptError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0; 1 when mmopt leaves more nodes of a model than a peer; the exit code of an error.
    """
    parser = argparse.ArgumentParser(prog="benchmarks.rewrites", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=pathlib.Path, metavar="FOLDER", help="where exports are, or are put")
    parser.add_argument("--models", default="", metavar="NAMES", help="some of the reference models (default: all)")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the counts here")
    options = parser.parse_args(arguments)
    try:
        return _run(options)
    except MmoptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _run(options: argparse.Namespace) -> int:
    rows: dict[str, dict[str, int | None]] = {}
    print(f"| model | exported | {' | '.join(OPTIMIZERS)} |\n|{' --- |' * (len(OPTIMIZERS) + 2)}")
    for name in chosen(options.models, ZOO, "--models"):
        if missing := ZOO[name].missing():
            print(f"{name}: skipped, {missing} is missing", file=sys.stderr)
            continue
        source = ZOO[name].export(options.folder / name, batch=1)
        rows[name] = {"exported": nodes(ir.load(source)), **{o: _attempt(f, source) for o, f in OPTIMIZERS.items()}}
        cells = ("–" if count is None else str(count) for count in rows[name].values())
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    behind = [name for name, row in rows.items() if _behind(row)]
    print(f"{len(rows) - len(behind)} of {len(rows)} models: mmopt leaves the fewest nodes", end="")
    print(f"; not of {', '.join(behind)}" if behind else "")
    return 1 if behind else 0


def _behind(row: dict[str, int | None]) -> bool:
    ours = row["mmopt"]
    return ours is None or any(count is not None and count < ours for count in row.values())


def _attempt(optimizer: Callable[[pathlib.Path], int], source: pathlib.Path) -> int | None:
    """What the optimizer leaves, or ``None`` where it fails."""
    try:
        return optimizer(source)
    except Exception as error:
        if isinstance(error, MmoptError):
            raise
        print(f"{optimizer.__name__}: {source}: {str(error).splitlines()[0]}", file=sys.stderr)
        return None


def nodes(model: ir.Model) -> int:
    """Nodes of the graph and of the bodies in it, without constants; calls of functions count as one."""
    return sum(node.op_type != "Constant" for graph in _graphs(model) for node in graph)


def _graphs(model: ir.Model) -> list[ir.Graph]:
    inside = {id(graph) for function in model.functions.values() for graph in (function.graph, *function.subgraphs())}
    return [graph for graph in model.graphs() if id(graph) not in inside]


def by_onnxslim(source: pathlib.Path) -> int:
    """Nodes that onnxslim leaves."""
    import onnxslim

    return nodes(ir.from_proto(onnxslim.slim(onnx.load(source))))


def by_onnxsim(source: pathlib.Path) -> int:
    """Nodes that onnxsim leaves."""
    import onnxsim

    return nodes(ir.from_proto(onnxsim.simplify(onnx.load(source))[0]))


def by_onnxruntime(source: pathlib.Path) -> int:
    """Nodes that onnxruntime's optimizer leaves at the better of its two highest levels.

    The highest one also changes layouts, which adds nodes.
    """
    import onnxruntime

    levels = onnxruntime.GraphOptimizationLevel
    counts = []
    for level in (levels.ORT_ENABLE_EXTENDED, levels.ORT_ENABLE_ALL):
        with tempfile.TemporaryDirectory(prefix="mmopt-rewrites-") as folder:
            settings = onnxruntime.SessionOptions()
            settings.graph_optimization_level = level
            settings.optimized_model_filepath = str(pathlib.Path(folder) / "optimized.onnx")
            settings.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
            onnxruntime.InferenceSession(source, settings, providers=["CPUExecutionProvider"])
            counts.append(nodes(ir.load(settings.optimized_model_filepath)))
    return min(counts)


def by_mmopt(source: pathlib.Path) -> int:
    """Nodes that ``-O2`` leaves."""
    return nodes(mmopt.optimize(mmopt.load(source), validate="off").module.model)


OPTIMIZERS: dict[str, Callable[[pathlib.Path], int]] = {
    "onnxslim": by_onnxslim,
    "onnxsim": by_onnxsim,
    "onnxruntime": by_onnxruntime,
    "mmopt": by_mmopt,
}


if __name__ == "__main__":
    sys.exit(main())
