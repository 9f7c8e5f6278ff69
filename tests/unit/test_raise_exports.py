"""Small real architectures, exported by both torch exporters at several opsets: every module is found, none falsely.

``python -m tests.unit.test_raise_exports`` prints the table of what is found.
"""

from __future__ import annotations

import collections
import pathlib
import tempfile

import numpy as np
import pytest

import mmopt
from mmopt.ir.evaluate import ReferenceRunner
from mmopt.ir.module import Module
from mmopt.pipeline.base import PassContext
from mmopt.pipeline.recipe import load_recipe
from tests.exported_models import ARCHITECTURES, SPELLINGS, export, unsupported
from tests.raising import close


def raised(module: Module) -> Module:
    """``module`` after the passes of ``-O2`` up to those that raise."""
    result = module.clone()
    for phase in load_recipe("o2").phases:
        for pass_ in phase.passes:
            pass_.run(result, PassContext())
        if phase.name == "raise":
            return result
    raise AssertionError("the recipe has no phase that raises")


def feeds_for(module: Module) -> dict[str, np.ndarray]:
    """Seeded inputs; masks of ones and zeros that keep the first token."""
    random, feeds = np.random.default_rng(0), {}
    for value in module.graph.inputs:
        shape = [d if isinstance(d, int) else 2 if axis == 0 else 7 for axis, d in enumerate(value.shape or ())]
        if value.dtype is not None and value.dtype.is_integer():
            ids = random.integers(3, 50, shape)
            if "mask" in str(value.name):
                ids = (random.random(shape) < 0.7).astype(np.int64)
                ids[:, 0] = 1
            feeds[str(value.name)] = ids
        else:
            feeds[str(value.name)] = random.standard_normal(shape).astype(np.float32)
    return feeds


def found(name: str, spelling: tuple[str, int, str, bool], folder: pathlib.Path) -> dict[str, int]:
    """How many of each operator of interest raising finds, checked against onnxruntime on the export."""
    path = folder / f"{name}.onnx"
    export(name, *spelling, path)
    module = mmopt.load(path)
    feeds = feeds_for(module)
    result = raised(module)
    with ReferenceRunner(threads=1) as runner:
        want, got = runner.run(module, feeds), runner.run(result, feeds)
    assert got.engine == "onnxruntime", got.reason
    close(want, got)
    counts = collections.Counter(node.op_type for node in result.graph.all_nodes())
    assert "Softmax" not in counts
    kinds = ("Attention", "LayerNormalization", "RMSNormalization", "Gelu", "RotaryEmbedding", "LSTM", "GRU", "RNN")
    return {kind: counts[kind] for kind in kinds if counts[kind]}


@pytest.mark.slow
@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: f"{s[0]}-{s[1]}-{s[2]}{'-dynamic' if s[3] else ''}")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_module_is_found(name: str, spelling: tuple[str, int, str, bool], tmp_path: pathlib.Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    if reason := unsupported(name, *spelling):
        pytest.skip(reason)
    assert found(name, spelling, tmp_path) == ARCHITECTURES[name].expected()


def _report() -> None:
    columns = [f"{exporter} {opset} {kind}{' dynamic' * dynamic}" for exporter, opset, kind, dynamic in SPELLINGS]
    print(f"| architecture | {' | '.join(columns)} |")
    print(f"|{' --- |' * (len(SPELLINGS) + 1)}")
    for name, architecture in ARCHITECTURES.items():
        cells = []
        for spelling in SPELLINGS:
            if unsupported(name, *spelling):
                cells.append("–")
                continue
            with tempfile.TemporaryDirectory() as folder:
                got = found(name, spelling, pathlib.Path(folder))
            expected = architecture.expected()
            cells.append(", ".join(f"{kind} {got.get(kind, 0)}/{n}" for kind, n in expected.items()))
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    _report()
