"""Cuts every graph of a long list at 30 % in every group that can be cut, and shows that slicing is masking.

``python -m benchmarks.pruning FOLDER [--graphs vgg,bert-base,…] [--share 0.3] [--no-peer] [--write] [--json FILE]``

Torch-Pruning (``pip install torch-pruning``) runs on the same networks at the same share, each in a process of its own,
with magnitudes as the criterion, told which layers make the outputs and how many heads projections have. Of its
networks it is checked that they run and keep the shapes of their outputs, not what they compute. Graphs are exported to
``FOLDER`` unless they are there. ``--write`` puts the table into docs/pruning.md. Exit code 1 when a graph misses the
bound.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import json
import multiprocessing
import pathlib
import queue
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

import mmopt
from benchmarks.zoo import ZOO
from benchmarks.zoo.architectures import ARCHITECTURES
from benchmarks.zoo.model import TorchModel
from mmopt.analysis.axes import Group, find_groups
from mmopt.errors import MmoptError, UserError, did_you_mean
from mmopt.ir.evaluate import ReferenceRunner
from mmopt.ir.module import Module, initializer_bytes
from mmopt.transforms.prune.masking import mask_units
from mmopt.transforms.prune.proof import difference
from mmopt.transforms.prune.slicing import slice_units

BOUND = 1e-5
PAGE = pathlib.Path(__file__).resolve().parents[1] / "docs" / "pruning.md"
BEGIN, END = "<!-- graphs: begin -->", "<!-- graphs: end -->"
HEADER = (
    "| graph | groups cut | weights left | largest difference | Torch-Pruning |\n| --- | ---: | ---: | ---: | --- |"
)
PEER_LIMIT = 60
_PROJECTIONS = frozenset({"q_proj", "k_proj", "v_proj", "query", "key", "value", "q", "k", "v"})


@dataclasses.dataclass(frozen=True)
class Row:
    """What came of one graph.

    Attributes:
        name: Name of the graph.
        cut: Groups that were cut, all of them at once.
        groups: All groups, those that inputs, outputs or operators freeze included.
        left: Share of the bytes of weights that is left.
        error: Largest difference between sliced and masked, as a fraction of the largest magnitude.
        moved: Largest difference between masked and original, likewise: what a mask that does nothing would not show.
        seconds: Time for all of it.
        frozen: Reasons why groups were not cut, inputs and outputs aside.
        peer: What Torch-Pruning made of the network.
    """

    name: str
    cut: int
    groups: int
    left: float
    error: float
    moved: float
    seconds: float
    frozen: tuple[str, ...]
    peer: str

    def line(self) -> str:
        """A row of the table."""
        counts, left = (f"{self.cut} of {self.groups}", f"{self.left:.0%}") if self.groups else ("–", "–")
        error = f"{self.error:.0e}" if self.error else "0"
        return f"| {self.name} | {counts} | {left} | {error} | {self.peer} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0; 1 when a graph misses the bound; the exit code of an error.
    """
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except MmoptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _run(options: argparse.Namespace) -> int:
    rows, names = [], _chosen(options.graphs)
    # First, while this process has no threads yet that the others would be without.
    peers = {} if options.no_peer else {name: _peer(name, options.share) for name in names}
    for name in names:
        source = ZOO[name] if name in ZOO else ARCHITECTURES[name]
        if missing := source.missing():
            print(f"{name}: skipped, {missing} is missing", file=sys.stderr)
            continue
        rows.append(cut_graph(name, options.folder, options.share, peers.get(name, "")))
        print(rows[-1].line(), flush=True)
    missed = [row.name for row in rows if not row.error <= BOUND]
    print(
        f"{len(rows)} graphs, {sum(row.cut for row in rows)} groups cut; above {BOUND:g}: {', '.join(missed) or 'none'}"
    )
    if options.json:
        record = {"schema_version": 1, "share": options.share, "rows": [dataclasses.asdict(row) for row in rows]}
        options.json.write_text(json.dumps(record, indent=1))
    if options.write:
        _write(rows)
    return 1 if missed else 0


def cut_graph(name: str, folder: pathlib.Path, share: float, peer: str = "") -> Row:
    """Cut one graph in all of its groups at once, and compare."""
    started = time.perf_counter()
    module, inputs = _load(name, folder)
    groups = find_groups(module)
    keep = choose_units(groups, share)
    sliced, masked = module.clone(), module.clone()
    slice_units(sliced, groups, keep)
    mask_units(masked, groups, keep)
    with ReferenceRunner() as runner:
        got, want, original = (runner.run(m, inputs) for m in (sliced, masked, module))
    frozen = {group.frozen for group in groups} - {""}
    return Row(
        name=name,
        cut=len(keep),
        groups=len(groups),
        left=initializer_bytes(sliced.model) / max(initializer_bytes(module.model), 1),
        error=max(difference(got[output], want[output]) for output in want),
        moved=max(difference(want[output], original[output]) for output in want),
        seconds=time.perf_counter() - started,
        frozen=tuple(sorted(reason for reason in frozen if not reason.startswith(("the input", "the output")))),
        peer=peer,
    )


def choose_units(groups: Sequence[Group], share: float, seed: int = 0) -> dict[str, list[int]]:
    """Random units to keep of every group that can be cut; at least one goes, and one stays."""
    random = np.random.default_rng(seed)
    keep = {}
    for group in groups:
        if not group.frozen:
            count = max(1, group.units - max(1, round(share * group.units)))
            keep[group.name] = sorted(random.choice(group.units, count, replace=False).tolist())
    return keep


def _load(name: str, folder: pathlib.Path) -> tuple[Module, dict[str, Any]]:
    if name in ZOO:
        return mmopt.load(ZOO[name].export(folder)), dict(ZOO[name].inputs(1))
    return mmopt.load(ARCHITECTURES[name].export(folder)), dict(ARCHITECTURES[name].inputs())


# -- the peer ----------------------------------------------------------------------------------------------------------


def _peer(name: str, share: float) -> str:
    """What Torch-Pruning makes of a network, in a few words."""
    if name in ZOO and not isinstance(ZOO[name], TorchModel):
        return "not a torch module"
    if importlib.util.find_spec("torch_pruning") is None:
        return "not installed"
    importlib.import_module("torch_pruning")  # once, before the processes part
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=_report_peer, args=(name, share, results))
    process.start()
    try:
        found = results.get(timeout=PEER_LIMIT)
    except queue.Empty:
        process.kill()
        found = {"problem": f"no end after {PEER_LIMIT} s", "left": None}
    process.join()
    problem = " ".join(found["problem"][:90].replace("|", "/").split())
    if found["left"] is None:
        return f"fails: {problem}"
    if problem:
        return f"does not run: {problem}"
    return "prunes nothing" if found["left"] > 0.999 else f"runs, {found['left']:.0%} left"


def _report_peer(name: str, share: float, results: Any) -> None:
    try:
        results.put(run_peer(name, share))
    except Exception as error:  # whatever it raises is the finding
        results.put({"problem": f"{type(error).__name__}: {error}", "left": None})


def run_peer(name: str, share: float) -> dict[str, Any]:
    """Prune a network with Torch-Pruning, and run it.

    Returns:
        ``left``, the share of parameters that is left, and ``problem``, what is wrong with what came out, or "".
    """
    import torch
    import torch_pruning

    torch.set_num_threads(1)
    if name in ZOO:
        model = ZOO[name]
        if not isinstance(model, TorchModel):
            raise UserError(f"{name} is not a torch module")
        network, example = model.build()[:2]
    else:
        network = ARCHITECTURES[name].build()
        example = {key: torch.from_numpy(array) for key, array in ARCHITECTURES[name].inputs().items()}
    for parameter in network.parameters():
        parameter.requires_grad_(True)
    arguments = tuple(example.values())
    before = sum(p.numel() for p in network.parameters())
    shapes = _shapes(network, arguments)
    pruner = torch_pruning.pruner.BasePruner(
        network,
        arguments,
        torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=share,
        ignored_layers=_output_layers(network, arguments),
        num_heads=_heads(network),
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=share,
    )
    pruner.step()
    left = sum(p.numel() for p in network.parameters()) / before
    try:
        after = _shapes(network, arguments)
    except Exception as error:  # whatever the pruned network raises is the finding
        return {"left": left, "problem": f"{type(error).__name__}: {error}"}
    return {"left": left, "problem": "" if after == shapes else f"outputs of {after} instead of {shapes}"}


def _shapes(network: Any, arguments: tuple[Any, ...]) -> list[tuple[int, ...]]:
    import torch

    with torch.no_grad():
        result = network(*arguments)
    return [tuple(value.shape) for value in (result if isinstance(result, tuple | list) else (result,))]


def _heads(network: Any) -> dict[Any, int]:
    """How many heads the projections of every attention have, as their modules say."""
    import torch

    heads = {}
    for module in network.modules():
        own = [getattr(module, name, None) for name in ("num_heads", "num_attention_heads", "n_heads", "heads")]
        config = getattr(module, "config", None)
        count = next((n for n in own if isinstance(n, int)), getattr(config, "num_attention_heads", None))
        kept = getattr(config, "num_key_value_heads", None) or count
        for name, layer in module.named_children():
            if isinstance(count, int) and isinstance(layer, torch.nn.Linear) and name in _PROJECTIONS:
                heads[layer] = count if name[0] == "q" else kept
    return heads


def _output_layers(network: Any, arguments: tuple[Any, ...]) -> list[Any]:
    """The modules with weights whose result is an output as it is, and the last of all."""
    import torch

    results: list[tuple[Any, Any]] = []
    handles = [
        module.register_forward_hook(lambda m, _, y: results.append((m, y)))
        for module in network.modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d | torch.nn.Conv1d | torch.nn.LayerNorm)
    ]
    with torch.no_grad():
        outputs = network(*arguments)
    for handle in handles:
        handle.remove()
    wanted = {id(value) for value in (outputs if isinstance(outputs, tuple | list) else (outputs,))}
    direct = [module for module, value in results if id(value) in wanted]
    return [*direct, results[-1][0]]


# -- the page ----------------------------------------------------------------------------------------------------------


def _write(rows: Sequence[Row]) -> None:
    page = PAGE.read_text()
    start, stop = page.index(BEGIN) + len(BEGIN), page.index(END)
    table = "\n".join([HEADER, *(row.line() for row in rows)])
    PAGE.write_text(f"{page[:start]}\n{table}\n{page[stop:]}")


def _chosen(names: str | None) -> list[str]:
    known = [*ARCHITECTURES, *ZOO]
    if names is None:
        return known
    for name in names.split(","):
        if name not in known:
            raise UserError(f"there is no graph {name!r}", hint=did_you_mean(name, known))
    return names.split(",")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pruning", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path, metavar="FOLDER", help="where exported graphs are kept")
    parser.add_argument("--graphs", metavar="NAME,…", help="some graphs only")
    parser.add_argument("--share", type=float, default=0.3, help="share of the units of every group that goes")
    parser.add_argument("--no-peer", action="store_true", help="leave Torch-Pruning out")
    parser.add_argument("--write", action="store_true", help="put the table into docs/pruning.md")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write everything that was found")
    return parser


if __name__ == "__main__":
    sys.exit(main())
