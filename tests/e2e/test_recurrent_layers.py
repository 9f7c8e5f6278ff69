"""Recurrent layers from PyTorch to an artifact: one artifact, right at any length and batch size."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pytest

import mmopt

torch = pytest.importorskip("torch", reason="torch is not installed")

FEATURES, HIDDEN = 6, 5


class Layers(torch.nn.Module):
    """Two layers of each kind in both directions, from given initial states, one kind after the other."""

    def __init__(self) -> None:
        super().__init__()
        options = {"num_layers": 2, "bidirectional": True, "batch_first": True}
        self.lstm = torch.nn.LSTM(FEATURES, HIDDEN, **options)
        self.gru = torch.nn.GRU(2 * HIDDEN, HIDDEN, **options)
        self.rnn = torch.nn.RNN(2 * HIDDEN, HIDDEN, **options)

    def forward(self, x: Any, state: Any) -> dict[str, Any]:
        x, (hidden, cell) = self.lstm(x, (state, 2 * state))
        x, update = self.gru(x, state)
        x, last = self.rnn(x)
        return {"steps": x, "hidden": hidden, "cell": cell, "update": update, "last": last}


def arguments(batch: int, steps: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(100 * batch + steps)
    shapes = {"x": (batch, steps, FEATURES), "state": (4, batch, HIDDEN)}
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The tensor attributes")
def test_one_artifact_serves_every_length(tmp_path: pathlib.Path) -> None:
    torch.manual_seed(0)
    model = Layers().eval()
    axes = {"x": {0: "batch", 1: "steps"}, "state": {1: "batch"}}
    module = mmopt.load(model, arguments(2, 7), dynamic_shapes=axes)
    compiled = mmopt.optimize(module).module
    mmopt.compile(compiled, output=tmp_path / "layers.mmopt")
    session = mmopt.load_artifact(tmp_path / "layers.mmopt", threads=2)
    assert session.manifest.notes == []  # nothing fell back
    for batch, steps in ((1, 1), (3, 11), (2, 7), (5, 2)):
        feeds = arguments(batch, steps)
        with torch.no_grad():
            expected = model(**{name: torch.from_numpy(value) for name, value in feeds.items()})
        outputs = session.run(feeds)
        assert set(outputs) == set(expected)
        for name, value in expected.items():
            np.testing.assert_allclose(outputs[name], value.numpy(), rtol=1e-4, atol=1e-5, err_msg=name)
