"""``make demo``: it works from end to end, and wrong answers make it fail."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.demo import MODEL, SENTENCES, compare_answers
from benchmarks.zoo import ZOO
from mmopt.errors import VerifyError

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def embeddings() -> np.ndarray:
    rows = np.random.default_rng(0).standard_normal((len(SENTENCES), 8)).astype(np.float32)
    rows[1] = rows[0] + 0.01
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_names_the_nearest_sentence(embeddings: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    compare_answers(embeddings, embeddings)

    first = capsys.readouterr().out.splitlines()[1]
    assert first.startswith(SENTENCES[0])
    assert SENTENCES[1] in first
    assert first.endswith(f"{embeddings[0] @ embeddings[1]:.4f}")


@pytest.mark.parametrize("wrong", [1e-3, np.nan])
def test_answers_that_differ_make_it_fail(embeddings: np.ndarray, wrong: float) -> None:
    other = embeddings.copy()
    other[3, 0] += wrong

    with pytest.raises(VerifyError, match="differs"):
        compare_answers(other, embeddings)


@pytest.mark.slow
def test_the_whole_demo(tmp_path: pathlib.Path) -> None:
    if missing := ZOO[MODEL].missing():
        pytest.skip(f"{missing} is missing")
    command = [sys.executable, "-m", "benchmarks.demo", "-o", str(tmp_path), "--time", "0.5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)

    assert done.returncode == 0, done.stderr
    assert done.stdout.count("$ mmopt") == 3
    nearest = {line[: len(SENTENCES[0])]: line for line in done.stdout.splitlines()}
    assert SENTENCES[1] in nearest[SENTENCES[0]]
    report = json.loads((tmp_path / "bench.json").read_text())
    assert {contender["label"] for contender in report["contenders"]} == {"minilm", "onnxruntime"}
    assert (tmp_path / "minilm.mmopt" / "manifest.json").is_file()
