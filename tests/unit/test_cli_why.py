"""``mmopt inspect --why``: the reason why a pattern was not recognised, by node and by name."""

from __future__ import annotations

import json
import pathlib

import onnx_ir as ir
import pytest
from typer.testing import CliRunner

from mmopt.cli.inspecting_why import matching
from mmopt.cli.main import app
from mmopt.errors import UserError
from mmopt.ir.module import Remark
from tests.canonical import module_from

NEAR_MISS = """
g (float[2, 5, 4] q, float[2, 5, 4] k, float[2, 5, 3] v) => (float[2, 5, 3] y, float[2, 5, 5] w)
{ kt = Transpose<perm=[0, 2, 1]>(k) s = MatMul(q, kt) w = Softmax<axis=-1>(s) y = MatMul(w, v) }
"""


@pytest.fixture
def model(tmp_path: pathlib.Path) -> pathlib.Path:
    module = module_from(NEAR_MISS, opset=23)
    for number, node in enumerate(module.graph):
        node.name = f"{node.op_type.lower()}{number}"
    ir.save(module.model, tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


@pytest.mark.parametrize("wanted", ["softmax2", "SOFTMAX", "attention", "raise-attention"])
def test_says_what_stopped_attention(model: pathlib.Path, wanted: str, tmp_path: pathlib.Path) -> None:
    found = tmp_path / "why.json"
    result = CliRunner().invoke(app, ["inspect", str(model), "--why", wanted, "--json", str(found)])
    assert result.exit_code == 0, result.output
    assert "weights are needed elsewhere" in result.output
    remarks = json.loads(found.read_text())["remarks"]
    assert {"node": "softmax2", "kind": "missed", "pass": "raise-attention"}.items() <= remarks[0].items()


def test_says_what_became_of_a_node(model: pathlib.Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(model), "--why", "matmul3"])
    assert result.exit_code == 0, result.output
    assert "MatMul" in result.output


def test_what_nobody_knows_is_an_error(model: pathlib.Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(model), "--why", "sofmax2"])
    assert isinstance(result.exception, UserError)
    assert "softmax2" in result.exception.hint


def test_an_artifact_has_no_passes(tmp_path: pathlib.Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(tmp_path), "--why", "attention"])
    assert isinstance(result.exception, UserError)
    assert "artifact" in result.exception.what


def test_a_node_is_nearer_than_a_part_of_a_name() -> None:
    remarks = [Remark("p", "missed", "a", "x"), Remark("p", "missed", "ab", "y"), Remark("p", "missed", "ab", "y")]
    assert matching(remarks, "a") == remarks[:1]
    assert matching(remarks, "A") == remarks[:2]
    assert matching(remarks, "Y") == [remarks[1]]
