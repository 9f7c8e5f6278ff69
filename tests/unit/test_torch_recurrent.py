"""Recurrent layers from PyTorch: whole, right at any length and batch size, and torch left as it was found."""

from __future__ import annotations

import contextlib
import itertools
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

import mmopt
from mmopt.errors import LoadError
from mmopt.frontends import torch_recurrent
from mmopt.frontends.torch import load_torch

torch = pytest.importorskip("torch", reason="torch is not installed")

pytestmark = pytest.mark.filterwarnings("ignore:The tensor attributes")
FEATURES, HIDDEN = 6, 5
CELLS: dict[str, dict[str, Any]] = {
    "LSTM": {},
    "GRU": {},
    "RNN": {},
    "RNN relu": {"nonlinearity": "relu"},
}


class Layers(torch.nn.Module):
    """Every kind of cell on the same sequence, then an LSTM on what the first gives: shapes must flow through."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.cells = torch.nn.ModuleList(
            getattr(torch.nn, name.split()[0])(FEATURES, HIDDEN, **special, **options)
            for name, special in CELLS.items()
        )
        width = HIDDEN * (2 if options.get("bidirectional") else 1)
        self.last = torch.nn.LSTM(width, 3, batch_first=options["batch_first"])

    def forward(self, x: Any, state: Any = None) -> Any:
        results = []
        for cell in self.cells:
            states = (state, 2 * state) if isinstance(cell, torch.nn.LSTM) and state is not None else state
            results.append(cell(x, states))
        return results, self.last(results[0][0])[0]


def arguments(model: Layers, batch: int, steps: int, with_state: bool) -> dict[str, Any]:
    cell = model.cells[0]
    generator = torch.Generator().manual_seed(100 * batch + steps)
    leading = (batch, steps) if cell.batch_first else (steps, batch)
    result = {"x": torch.randn(*leading, FEATURES, generator=generator)}
    if with_state:
        rows = cell.num_layers * (2 if cell.bidirectional else 1)
        result["state"] = torch.randn(rows, batch, HIDDEN, generator=generator)
    return result


def session(module: mmopt.Module) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    data = ir.to_proto(module.model).SerializeToString()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


PAIRWISE = {
    (1, False, False, False, True),
    (1, True, True, True, True),
    (2, False, True, True, True),
    (2, True, False, True, True),
    (2, True, True, False, False),
}
"""Settings of which every two come together; the others are slow."""
GRID = itertools.product((1, 2), (False, True), (False, True), (False, True), (True, False))


@pytest.mark.parametrize(
    ("layers", "bidirectional", "batch_first", "with_state", "bias"),
    [pytest.param(*settings, marks=() if settings in PAIRWISE else pytest.mark.slow) for settings in GRID],
)
def test_layers_stay_whole_and_right_at_any_length(
    layers: int, bidirectional: bool, batch_first: bool, with_state: bool, bias: bool
) -> None:
    torch.manual_seed(0)
    options = {"num_layers": layers, "bidirectional": bidirectional, "batch_first": batch_first, "bias": bias}
    model = Layers(**options).eval()
    axes = {0: "batch", 1: "steps"} if batch_first else {0: "steps", 1: "batch"}
    shapes = {"x": axes, "state": {1: "batch"}} if with_state else {"x": axes}
    module = mmopt.load(model, arguments(model, 2, 7, with_state), dynamic_shapes=shapes)
    operators = [node.op_type for node in module.graph]
    assert [operators.count(name) for name in ("LSTM", "GRU", "RNN")] == [layers + 1, layers, 2 * layers]
    runner = session(module)
    for batch, steps in ((1, 1), (3, 11), (2, 7), (4, 2)):
        feeds = arguments(model, batch, steps, with_state)
        with torch.no_grad():
            expected = torch.utils._pytree.tree_leaves(model(**feeds))
        actual = runner.run(None, {name: value.numpy() for name, value in feeds.items()})
        assert len(actual) == len(expected)
        for ours, theirs in zip(actual, expected, strict=True):
            np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-4, atol=1e-5)


class Sequence(torch.nn.Module):
    """One layer, and a linear map of its steps to take a shape from what torch says of it."""

    def __init__(self, cell: type, **options: Any) -> None:
        super().__init__()
        self.layer = cell(FEATURES, HIDDEN, batch_first=True, **options)

    def forward(self, x: Any) -> Any:
        return self.layer(x)[0].flatten(1)


STEPS = {"x": {0: "batch", 1: "steps"}}
CELL_TYPES = (torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN)


def sequence(batch: int, steps: int) -> Any:
    return torch.randn(batch, steps, FEATURES, generator=torch.Generator().manual_seed(steps))


@pytest.mark.parametrize("cell", CELL_TYPES)
def test_a_kernel_cached_by_an_export_before_changes_nothing(cell: type) -> None:
    torch.manual_seed(0)
    model = Sequence(cell).eval()
    with torch.no_grad():
        torch.export.export(model, (sequence(2, 7),)).run_decompositions()
    runner = session(load_torch(model, (sequence(2, 7),), dynamic_shapes=STEPS))
    for batch, steps in ((1, 1), (3, 9)):
        expected = model(sequence(batch, steps)).detach().numpy()
        actual = runner.run(None, {"x": sequence(batch, steps).numpy()})[0]
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cell", CELL_TYPES)
def test_exported_program_with_a_dynamic_batch(cell: type) -> None:
    torch.manual_seed(0)
    model = Sequence(cell).eval()
    program = torch.export.export(model, (sequence(2, 7),), dynamic_shapes={"x": {0: torch.export.Dim.DYNAMIC}})
    module = load_torch(program)
    assert sum(node.op_type == cell.__name__ for node in module.graph) == 1
    actual = session(module).run(None, {"x": sequence(5, 7).numpy()})[0]
    np.testing.assert_allclose(actual, model(sequence(5, 7)).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_layer_that_is_called_as_a_function() -> None:
    class Functional(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.r = (torch.nn.Parameter(torch.randn(3 * HIDDEN, n)) for n in (FEATURES, HIDDEN))

        def forward(self, x: Any) -> Any:
            state = x.new_zeros(1, x.shape[0], HIDDEN)
            return torch.gru(x, state, [self.w, self.r], False, 1, 0.0, False, False, True)[0]

    torch.manual_seed(0)
    model = Functional().eval()
    runner = session(load_torch(model, (sequence(2, 7),), dynamic_shapes=STEPS))
    actual = runner.run(None, {"x": sequence(3, 4).numpy()})[0]
    np.testing.assert_allclose(actual, model(sequence(3, 4)).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_projected_lstm_is_refused_by_its_path() -> None:
    with pytest.raises(LoadError, match=r"layer: an LSTM with proj_size has no ONNX form"):
        load_torch(Sequence(torch.nn.LSTM, proj_size=2).eval(), (sequence(2, 7),))


def tables() -> list[dict[Any, Any]]:
    operators = [getattr(torch.ops.aten, name).input for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")]
    return [dict(torch._decomp.decomposition_table), *(dict(operator.py_kernels) for operator in operators)]


def caches() -> list[dict[Any, Any]]:
    return [getattr(torch.ops.aten, name).input._dispatch_cache for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")]


def test_everything_is_put_back() -> None:
    before = tables()
    with torch_recurrent.symbolic_length(torch) as asked:
        assert tables() != before
        dims = {"x": {1: torch.export.Dim.DYNAMIC}}
        torch.export.export(Sequence(torch.nn.LSTM).eval(), (sequence(2, 7),), dynamic_shapes=dims)
        assert asked == {"aten.lstm.input": 1}
        assert any(caches())
    assert tables() == before
    assert not any(caches())
    with (
        pytest.raises(ZeroDivisionError),
        torch_recurrent.symbolic_length(torch),
        torch_recurrent.symbolic_length(torch),
    ):
        _ = 1 / 0
    assert tables() == before
    with pytest.raises(LoadError):
        load_torch(Sequence(torch.nn.LSTM).eval(), (torch.ones(2, 7, FEATURES + 1),), dynamic_shapes=STEPS)
    assert tables() == before


def test_two_threads_put_back_what_the_first_found() -> None:
    before = tables()
    inside, leave = threading.Event(), threading.Event()

    def first() -> None:
        with torch_recurrent.symbolic_length(torch):
            inside.set()
            leave.wait(10)

    def second() -> None:
        inside.wait(10)
        threading.Timer(0.05, leave.set).start()
        with torch_recurrent.symbolic_length(torch):
            assert leave.is_set()

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert tables() == before


def _without_kernel(patch: pytest.MonkeyPatch) -> None:
    patch.delitem(torch.ops.aten.gru.input.py_kernels, torch._C.DispatchKey.CompositeImplicitAutograd)


def _without_decomposition(patch: pytest.MonkeyPatch) -> None:
    patch.delitem(torch._decomp.decomposition_table, torch.ops.aten.rnn_relu.input)


def _with_a_fixed_table(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch._decomp, "decomposition_table", types.MappingProxyType(torch._decomp.decomposition_table))


def _with_other_arguments(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.ops.aten.lstm.input, "_schema", torch.ops.aten.lstm.data._schema)


def _without_operator(patch: pytest.MonkeyPatch) -> None:
    patch.delattr(torch.ops.aten.rnn_tanh, "input")


def _deaf(patch: pytest.MonkeyPatch) -> None:
    """As a torch that looks for kernels elsewhere: what is put into its tables has no effect."""
    patch.setattr(torch_recurrent, "_replaced", lambda table, entries: contextlib.nullcontext())


@pytest.fixture
def clean_caches() -> Iterator[None]:
    yield
    for cache in caches():
        cache.clear()


@pytest.mark.usefixtures("clean_caches")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_without_kernel, "aten.gru.input has no kernel in Python"),
        (_without_decomposition, "aten.rnn_relu.input has no decomposition"),
        (_with_a_fixed_table, "no table of decompositions that can be changed"),
        (_with_other_arguments, "aten.lstm.input takes other arguments"),
        (_without_operator, "rnn_tanh"),
        (_deaf, "without asking their kernels"),
    ],
)
def test_unknown_torch_is_an_error(
    change: Callable[[pytest.MonkeyPatch], None], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Sequence(torch.nn.LSTM).eval()
    program = torch.export.export(model, (sequence(2, 7),))
    change(monkeypatch)
    for source in (model, program):
        with pytest.raises(LoadError, match=reason) as caught:
            load_torch(source, (sequence(2, 7),))
        assert torch.__version__ in caught.value.what
        assert "ONNX file" in caught.value.hint


def test_unknown_torch_does_not_matter_without_recurrent_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    _without_operator(monkeypatch)
    module = load_torch(torch.nn.Linear(FEATURES, 2).eval(), (sequence(2, 7),))
    assert [value.name for value in module.graph.outputs] == ["output"]
