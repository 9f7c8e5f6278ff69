"""The torch models of the zoo: joins against numpy, weights, and exports in onnxruntime against torch."""

from __future__ import annotations

import pathlib

import numpy as np
import onnx
import onnxruntime as ort
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from benchmarks.zoo import ZOO, TorchModel, onnx_export  # noqa: E402
from benchmarks.zoo import __main__ as command_line  # noqa: E402
from benchmarks.zoo.fusion import JOINS, FusionNet, TrimodalNet  # noqa: E402
from benchmarks.zoo.inputs import Inputs  # noqa: E402
from benchmarks.zoo.networks import small  # noqa: E402
from mmopt.errors import UserError  # noqa: E402

SMALL = [name for name in ZOO if name.startswith("fusion-") or name == "siamese"]
LARGE = [name for name, model in ZOO.items() if isinstance(model, TorchModel) and name not in SMALL]
PUBLISHED_PARAMETERS = {"clip-vit-b32": 151_277_313, "bert-base": 109_482_240, "resnet-50": 25_557_032}
BATCHES = (1, 3)


@pytest.mark.parametrize("kind", JOINS)
def test_join_computes_its_formula(kind: str) -> None:
    torch.manual_seed(0)
    join = JOINS[kind](8, 3)
    x = np.random.default_rng(0).normal(size=(3, 5, 8)).astype(np.float32)
    joined = join(list(torch.from_numpy(x))).detach().numpy()
    np.testing.assert_allclose(joined, _join_in_numpy(kind, join, x), rtol=1e-5, atol=1e-6)


def _join_in_numpy(kind: str, join: torch.nn.Module, x: np.ndarray) -> np.ndarray:
    parameters = {name: value.detach().numpy() for name, value in join.named_parameters()}
    if kind == "sum":
        return x.sum(0)
    if kind == "alignment":
        return np.tanh(x).prod(0)
    if kind == "weighted":
        return np.tensordot(_softmax(parameters["weights"]), x, 1)
    hidden = np.tanh(x @ parameters["score.0.weight"].T + parameters["score.0.bias"])
    return (_softmax(hidden @ parameters["score.2.weight"].T + parameters["score.2.bias"]) * x).sum(0)


def _softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum(0)


def test_decision_averages_the_probabilities_of_each_modality() -> None:
    net, arguments = _small_net("decision")
    features = [encoder(x) for encoder, x in zip(net.encoders.values(), arguments, strict=True)]
    votes = [head(x).detach().numpy() for head, x in zip(net.heads[0], features, strict=True)]
    expected = np.mean([_softmax(vote.T).T for vote in votes], 0)
    np.testing.assert_allclose(net(*arguments).detach().numpy(), expected, rtol=1e-5)


def test_deep_joins_at_half_depth_too() -> None:
    net, arguments = _small_net("deep")
    before = net(*arguments)
    with torch.no_grad():
        net.shallow_join.weight.mul_(2)
    assert (net(*arguments) - before).abs().max() > 1e-4


def test_every_modality_moves_every_output() -> None:
    for fusion in (*JOINS, "concat", "decision", "deep"):
        net, arguments = _small_net(fusion)
        before = net(*arguments)
        for i in range(3):
            changed = list(arguments)
            changed[i] = changed[i].flip(0)
            assert (net(*changed) - before).abs().max() > 1e-7, (fusion, i)


def test_unknown_fusion_is_refused_with_a_suggestion() -> None:
    with pytest.raises(UserError, match=r"unknown fusion 'concatt'\n.*'concat'"):
        small("concatt", {"class": 2})


def _small_net(fusion: str) -> tuple[FusionNet, list[torch.Tensor]]:
    torch.manual_seed(0)
    net = small(fusion, {"class": 4}).eval()
    assert isinstance(net, TrimodalNet)
    return net, [torch.from_numpy(array) for array in ZOO["fusion-sum"].inputs(3).values()]


def test_weights_are_the_same_every_time_and_leave_the_generator_alone() -> None:
    state = torch.random.get_rng_state()
    first, second = _torch_model("fusion-concat").build(), _torch_model("fusion-concat").build()
    assert torch.equal(state, torch.random.get_rng_state())
    for (name, one), two in zip(first.module.state_dict().items(), second.module.state_dict().values(), strict=True):
        assert torch.equal(one, two), name


def test_no_bias_is_zero_and_no_norm_the_identity() -> None:
    module = _torch_model("fusion-concat").build().module
    assert not module.training
    assert all((p != 0).all() for p in module.parameters() if p.ndim == 1)
    norms = [m for m in module.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms
    for norm in norms:
        assert norm.weight.ne(1).all()
        assert norm.running_mean.abs().max() > 1e-3
        assert norm.running_var.ne(1).all()


@pytest.mark.parametrize("name", SMALL)
def test_small_exports_compute_what_torch_does(name: str, tmp_path: pathlib.Path) -> None:
    _check_exports(_torch_model(name), tmp_path, static=BATCHES if name == "fusion-concat" else ())


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_small_static_exports_compute_what_torch_does(name: str, tmp_path: pathlib.Path) -> None:
    _check_exports(_torch_model(name), tmp_path, static=BATCHES)


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_large_exports_compute_what_torch_does(name: str, tmp_path: pathlib.Path) -> None:
    model = _torch_model(name)
    if missing := model.missing():
        pytest.skip(f"not installed: {missing}")
    _check_exports(model, tmp_path, static=BATCHES)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), PUBLISHED_PARAMETERS.items())
def test_known_architectures_have_the_published_size(name: str, count: int) -> None:
    model = _torch_model(name)
    if missing := model.missing():
        pytest.skip(f"not installed: {missing}")
    assert sum(p.numel() for p in model.build().module.parameters()) == count


@pytest.mark.slow
def test_minilm_finds_related_sentences_nearer() -> None:
    from benchmarks.zoo import sentences

    model = _torch_model("all-minilm-l6")
    if missing := model.missing():
        pytest.skip(f"not installed: {missing}")
    texts = ["How do I reset my password?", "I forgot my login details.", "The soup needs more salt."]
    arrays = {name: torch.from_numpy(array) for name, array in sentences.tokenize(texts).items()}
    embedding = model.build().module(**arrays).numpy()
    likeness = embedding @ embedding.T
    np.testing.assert_allclose(np.diag(likeness), 1, atol=1e-5)
    assert likeness[0, 1] > 0.4 > 0.2 > likeness[0, 2]


def test_export_is_kept_until_the_builder_changes(tmp_path: pathlib.Path) -> None:
    model = _torch_model("siamese")
    path = model.export(tmp_path)
    written = path.stat().st_mtime_ns
    assert model.export(tmp_path).stat().st_mtime_ns == written
    path.with_name("b1.onnx.digest").write_text("of an older builder")
    assert model.export(tmp_path).stat().st_mtime_ns > written
    assert sorted(p.name for p in path.parent.iterdir()) == ["b1.onnx", "b1.onnx.digest"]


def test_export_that_fails_leaves_no_model(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(module: object, arrays: object, outputs: object, shapes: object, path: pathlib.Path) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(onnx_export, "write", fail)
    with pytest.raises(OSError, match="disk full"):
        _torch_model("siamese").export(tmp_path)
    assert list((tmp_path / "siamese").iterdir()) == []


def test_command_line_exports(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["export", "siamese", "-o", str(tmp_path), "--batch", "2"]) == 0
    path = pathlib.Path(capsys.readouterr().out.strip())
    assert path == tmp_path / "siamese" / "b2.onnx"
    shapes = [_dims(value) for value in onnx.load(str(path)).graph.input]
    assert shapes == [[2, 3, 32, 32]] * 2


class Recurrent(torch.nn.Module):
    """Two stacked recurrent layers; the first one's shape decides how the second is translated."""

    def __init__(self, cell: type[torch.nn.RNNBase], **options: object):
        super().__init__()
        self.layer = cell(6, 5, num_layers=2, batch_first=True, bidirectional=True, **options)
        self.last = cell(10, 4, batch_first=True, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.layer(x)[0])[0][:, -1]


@pytest.mark.filterwarnings("ignore:The tensor attributes")
@pytest.mark.parametrize(
    ("cell", "options", "operator"),
    [
        (torch.nn.LSTM, {}, "LSTM"),
        (torch.nn.GRU, {}, "GRU"),
        (torch.nn.RNN, {}, "RNN"),
        (torch.nn.RNN, {"nonlinearity": "relu", "bias": False}, "RNN"),
    ],
)
def test_recurrent_layers_stay_whole_and_of_any_length(
    cell: type, options: dict[str, object], operator: str, tmp_path: pathlib.Path
) -> None:
    torch.manual_seed(0)
    module = Recurrent(cell, **options).eval()
    example = np.random.default_rng(0).normal(size=(2, 7, 6)).astype(np.float32)
    torch.export.export(module, (torch.from_numpy(example),))  # fills the operator's cache of kernels
    dims = {"x": {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("steps", min=1)}}
    path = tmp_path / "model.onnx"
    onnx_export.write(module, {"x": example}, ["y"], dims, path)
    assert [node.op_type for node in onnx.load(str(path)).graph.node].count(operator) == 3
    for batch, steps in ((1, 1), (3, 11), (2, 7)):
        x = np.random.default_rng(1).normal(size=(batch, steps, 6)).astype(np.float32)
        expected = module(torch.from_numpy(x)).detach().numpy()
        np.testing.assert_allclose(_run(path, {"x": x})[0], expected, rtol=1e-4, atol=1e-5)


def _check_exports(model: TorchModel, folder: pathlib.Path, static: tuple[int, ...]) -> None:
    """Static exports at their batch; the dynamic one at two batches and lengths."""
    module = model.build().module
    shorter = {name: max(1, size - 3) for name, size in model.sizes.items()}
    dynamic = model.export(folder, dynamic=True)
    _check_signature(model, dynamic)
    for batch, sizes in ((1, {}), (3, shorter)):
        _compare(module, dynamic, model.inputs(batch, seed=7, **sizes))
    dynamic.with_name("dyn.onnx.data").unlink(missing_ok=True)
    for batch in static:
        path = model.export(folder, batch=batch)
        _compare(module, path, model.inputs(batch, seed=7))
        path.with_name(f"{path.name}.data").unlink(missing_ok=True)


def _check_signature(model: TorchModel, path: pathlib.Path) -> None:
    graph = onnx.load(str(path), load_external_data=False).graph
    assert {value.name for value in graph.input} == set(model.expected_towers.modalities)
    assert tuple(value.name for value in graph.output) == model.outputs
    for value in graph.input:
        symbols = {axis: dim for axis, dim in enumerate(_dims(value)) if isinstance(dim, str)}
        assert symbols == dict(model.axes[value.name])


def _dims(value: onnx.ValueInfoProto) -> list[int | str]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def _compare(module: torch.nn.Module, path: pathlib.Path, arrays: Inputs) -> None:
    with torch.no_grad():
        outputs = module(**{name: torch.from_numpy(array) for name, array in arrays.items()})
    expected = [value.numpy() for value in (outputs if isinstance(outputs, tuple) else (outputs,))]
    actual = _run(path, arrays)
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.shape == theirs.shape
        assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()


def _run(path: pathlib.Path, arrays: Inputs) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [np.asarray(value) for value in session.run(None, arrays)]


def _torch_model(name: str) -> TorchModel:
    model = ZOO[name]
    assert isinstance(model, TorchModel)
    return model
