"""Discovery over the reference models, and the page that lists what it finds."""

from __future__ import annotations

import dataclasses
import os
import pathlib

import numpy as np
import onnx_ir as ir
import pytest

from benchmarks import towers as benchmark
from benchmarks.zoo import ZOO
from mmopt.analysis.towers import analyze_towers, extract_entry_points
from mmopt.ir.module import Module
from mmopt.pipeline.base import PassContext
from mmopt.transforms.canonicalize.canonicalize import Canonicalize
from tests.unit.test_towers import clip, siamese, voted
from tests.unit.tower_models import run

KEPT = os.environ.get("MMOPT_ZOO", "")
"""A folder where exported models are kept between runs; empty for none."""


@pytest.fixture(name="folder")
def _folder(tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(KEPT) if KEPT else tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", ZOO)
def test_structure_of_reference_models(name: str, dynamic: bool, folder: pathlib.Path) -> None:
    model = ZOO[name]
    if missing := model.missing():
        pytest.skip(f"{missing} is missing")
    module = Module(ir.load(model.export(folder, dynamic=dynamic)))
    report = analyze_towers(module)
    assert benchmark.differences(report, model.expected_towers) == []
    if len(report.towers) > 1:
        _check_cut(module, model.inputs(2 if dynamic else 1, seed=5))
    if not dynamic:
        Canonicalize().run(module, PassContext())
        assert benchmark.differences(analyze_towers(module), model.expected_towers) == []


def _check_cut(module: Module, feeds: dict[str, np.ndarray]) -> None:
    entries = extract_entry_points(module, analyze_towers(module))
    between = dict(feeds)
    for name, entry in entries.items():
        if name != "fuse":
            between.update(run(entry, feeds))
    parts = run(entries["fuse"], between)
    for name, array in run(module, feeds).items():
        np.testing.assert_allclose(parts[name], array, rtol=1e-5, atol=1e-6, err_msg=name)


def test_page_has_a_row_for_every_model() -> None:
    page = benchmark.PAGE.read_text()
    rows = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ")]
    assert [row for row in rows if row in ZOO] == list(ZOO)
    assert benchmark.replaced(page, "x").count(benchmark.HEADER) == 0


def test_differences_are_named() -> None:
    expected = dataclasses.replace(
        ZOO["siamese"].expected_towers,
        modalities={"left": "image", "right": "image"},
        towers={"a": ("left",), "b": ("right",)},
    )
    report = analyze_towers(siamese(False))
    assert benchmark.differences(report, expected) == []
    wrong = dataclasses.replace(expected, fusion=("concat",), shared_weights=False, modalities={})
    assert [line.split()[0] for line in benchmark.differences(report, wrong)] == ["modalities", "fusion", "shared"]


def test_rows() -> None:
    line = benchmark.row("clip", analyze_towers(clip(), {"captions": 1, "images": 1, "seq": 4}))
    assert "**text**: `ids`, `mask`, 688," in line
    assert line.endswith("| text 48, image 48 | similarity | feature | yes | 2 + `fuse` |")
    assert "decision" in benchmark.row("votes", analyze_towers(voted("logits")))


def test_unknown_model() -> None:
    assert benchmark.main(["somewhere", "--models", "clip-vit-b3"]) == 2
