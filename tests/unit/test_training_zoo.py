"""The differentiable form of the reference models: outputs, gradients against torch's own, the way back to ONNX."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import mmopt  # noqa: E402
from benchmarks.zoo import ZOO, TorchModel  # noqa: E402
from mmopt.ir.evaluate import ReferenceRunner  # noqa: E402
from mmopt.ir.module import Module, save_model  # noqa: E402
from mmopt.training import parameter_names, to_fx, update_weights  # noqa: E402
from mmopt.training.tensors import feed, to_numpy  # noqa: E402

FAST = ("fusion-concat",)
SLOW = [name for name in ZOO if name not in FAST]
KINDS = ("static", "dynamic")
FOLDED = {"fusion-weighted": {"join.weights"}, "clip-vit-b32": {"clip.logit_scale"}}
"""Parameters that the exporter computes with, so that the file has only the result: a softmax, and an exponential."""


def _models(*names: str) -> list[Any]:
    return [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in names]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], pathlib.Path]:
    """The file of a model, exported once."""
    folder = tmp_path_factory.mktemp("zoo")

    def export(name: str, kind: str) -> pathlib.Path:
        if missing := ZOO[name].missing():
            pytest.skip(f"{name} cannot be had here: {missing} is missing")
        return ZOO[name].export(folder, batch=1, dynamic=kind == "dynamic")

    return export


def _run(module: Module, inputs: dict[str, Any]) -> dict[str, Any]:
    with ReferenceRunner(threads=1) as runner:
        return dict(runner.run(module, inputs))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", _models(*ZOO))
def test_outputs_and_the_way_back(name: str, kind: str, exported: Callable[..., Any], tmp_path: pathlib.Path) -> None:
    """ONNX → FX → ONNX: the outputs of all three agree; so do names, order and dtypes of what the file holds."""
    module = mmopt.load(exported(name, kind))
    sizes = {"batch": 2} if kind == "dynamic" else {}
    inputs = ZOO[name].inputs(**sizes, seed=3)
    want = _run(module, inputs)
    graph = to_fx(module)
    got = graph(**feed(graph, inputs))
    assert list(got) == list(want)
    for output, expected in want.items():
        np.testing.assert_allclose(to_numpy(got[output]), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())

    clone = module.clone()
    assert not update_weights(clone, graph), "nothing was trained"
    with torch.no_grad():
        for parameter in graph.parameters():
            parameter.mul_(1.001)
    assert update_weights(clone, graph)
    save_model(clone.model, tmp_path / "back.onnx")
    back = mmopt.load(tmp_path / "back.onnx")
    assert _outline(back) == _outline(module)
    changed, trained = _run(back, inputs), graph(**feed(graph, inputs))
    for output, expected in changed.items():
        scale = np.abs(expected).max()
        np.testing.assert_allclose(to_numpy(trained[output]), expected, rtol=1e-4, atol=1e-5 * scale)
    np.testing.assert_array_equal(_run(module, inputs)[next(iter(want))], want[next(iter(want))])


def _outline(module: Module) -> list[tuple[str, str, str]]:
    return [(name, str(v.dtype), str(v.shape)) for name, v in module.graph.initializers.items()]


@pytest.mark.parametrize("name", _models(*(n for n, model in ZOO.items() if isinstance(model, TorchModel))))
def test_gradients_are_those_of_the_torch_module(name: str, exported: Callable[..., Any]) -> None:
    """Of one loss, for every parameter of the network the export was made of."""
    model = ZOO[name]
    assert isinstance(model, TorchModel)
    module = mmopt.load(exported(name, "static"))
    inputs = model.inputs(1, seed=3)
    graph = to_fx(module)
    kept = any(node.op_type == "BatchNormalization" for node in module.graph)
    network = _as_exported(model.build().module, fold=not kept).requires_grad_(True)
    mine = {parameter_names(graph)[path]: parameter for path, parameter in graph.named_parameters()}
    pairs = {key: found for key, p in network.named_parameters() if (found := _counterpart(key, p, mine)) is not None}
    with torch.no_grad():
        for key, (held, view) in pairs.items():
            # The last bit of a folded weight decides the sign of an activation here and there, and with it a gradient.
            network.get_parameter(key).copy_(torch.from_numpy(view(held.detach().numpy()).copy()))
    _loss(graph(**feed(graph, inputs)).values()).backward()
    _loss(_tensors(network(**{key: torch.from_numpy(array) for key, array in inputs.items()}))).backward()
    theirs = {key: p for key, p in network.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    largest = max(float(p.grad.abs().max()) for p in theirs.values())
    assert set(theirs) - set(pairs) == FOLDED.get(name, set())
    for key in set(theirs) & set(pairs):
        held, view = pairs[key]
        want = theirs[key].grad.numpy()
        scale = max(float(np.abs(want).max()), 1e-4 * largest)
        assert np.abs(view(held.grad.numpy()) - want).max() <= 2e-3 * scale, key


def _as_exported(network: Any, *, fold: bool) -> Any:
    """The network with what the exporter does to it: batch norms go into convolutions before them, where these feed
    nothing else, and embeddings have no row without a gradient, which ONNX cannot say."""
    for part in network.modules():
        if isinstance(part, torch.nn.Embedding):
            part.padding_idx = None
        children = list(part.named_children()) if fold and isinstance(part, torch.nn.Sequential) else []
        for (first, conv), (second, norm) in itertools.pairwise(children):
            if isinstance(norm, torch.nn.modules.batchnorm._BatchNorm) and isinstance(
                conv, torch.nn.modules.conv._ConvNd
            ):
                setattr(part, first, torch.nn.utils.fuse_conv_bn_eval(conv, norm))
                setattr(part, second, torch.nn.Identity())
    return network


def _tensors(outputs: Any) -> Iterator[Any]:
    if torch.is_tensor(outputs):
        yield outputs
    else:
        for item in outputs.values() if isinstance(outputs, dict) else outputs:
            yield from _tensors(item)


def _loss(outputs: Any) -> Any:
    """A fixed weighing of all elements of all outputs."""
    total = torch.zeros(())
    for index, output in enumerate(outputs):
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(index))
        total = total + (output * weights).sum() / output.detach().square().mean().sqrt()
    return total


def _counterpart(
    key: str, parameter: Any, mine: dict[str, Any]
) -> tuple[Any, Callable[[np.ndarray], np.ndarray]] | None:
    """What the torch parameter became in the FX form, and how to see it there: as it is, turned, in a stack."""
    value = parameter.detach().numpy()
    named = mine.get(key)
    for candidate in [named] if named is not None else mine.values():
        held = candidate.detach().numpy()
        for view in _views(held.shape, value.shape):
            seen = view(held)
            if np.allclose(seen.flat[:4], value.flat[:4], 1e-5, 1e-6) and np.allclose(seen, value, 1e-5, 1e-6):
                return candidate, view
    return None


def _views(held: tuple[int, ...], wanted: tuple[int, ...]) -> Iterator[Callable[[np.ndarray], np.ndarray]]:
    if held == wanted:
        yield lambda array: array
    if len(wanted) == 2 and held == wanted[::-1]:
        yield lambda array: array.T
    if np.prod(held) == np.prod(wanted) and held != wanted:
        yield lambda array: array.reshape(wanted)
    if len(held) == len(wanted) + 1 and held[0] <= 2 and held[2:] == wanted[1:]:
        for direction, order in itertools.product(range(held[0]), ((0,), (0, 3, 1, 2), (1, 0, 2))):
            for start in range(0, held[1], wanted[0]):
                if start + wanted[0] <= held[1] and wanted[0] % len(order) == 0:
                    yield lambda a, d=direction, o=order, s=start: _gates(a[d][s : s + wanted[0]], o)  # type: ignore[misc]


def _gates(stack: np.ndarray, order: tuple[int, ...]) -> np.ndarray:
    """Gates in torch's order."""
    parts = np.split(stack, len(order))
    return (
        np.concatenate([parts[k] for k in np.argsort(order)])
        if len(order) == 4
        else np.concatenate([parts[k] for k in order])
    )
