"""The benchmark of recurrent layers, on the smallest one."""

from __future__ import annotations

import json
import pathlib

import pytest

from benchmarks import recurrence


def test_contenders_agree_and_are_timed(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--layers", "silero-lstm", "--contenders", "mmopt int8,onnxruntime fp32", "--threads", "1"]
    options += ["--rounds", "1", "--time", "0.01", "--json", str(tmp_path / "r.json")]
    assert recurrence.main([str(tmp_path), *options]) == 0
    written = json.loads((tmp_path / "r.json").read_text())
    assert 0.001 < written["errors"]["silero-lstm"]["mmopt int8"] < 0.03
    assert written["errors"]["silero-lstm"]["onnxruntime fp32"] == 0
    said = capsys.readouterr().out
    assert "mmopt int8" in said
    assert "onnxruntime fp32" in said


def test_an_unknown_layer_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert recurrence.main(["--layers", "bilstm"]) == 2
    assert "bilstm" in capsys.readouterr().err
