"""Models from PyTorch: names, dynamic shapes, module paths, FX passes, and errors that name the user's line."""

from __future__ import annotations

import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from mmopt.errors import LoadError, PassError, UserError
from mmopt.frontends.opset import WORKING_OPSET
from mmopt.frontends.torch import load_callable, load_torch
from mmopt.ir.module import MODULE_PATH_KEY, Module
from mmopt.ir.verify import require_valid

torch = pytest.importorskip("torch")


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(8, 8)
        self.drop = torch.nn.Dropout(0.5)

    def forward(self, x: Any) -> Any:
        return self.drop(torch.relu(self.fc(x)))


class Two(torch.nn.Module):
    """Two inputs, the second optional; returns a dict with a nested tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([Block(), Block()])
        self.head = torch.nn.Linear(8, 3)

    def forward(self, pixel_values: Any, mask: Any = None) -> Any:
        x = pixel_values
        for layer in self.layers:
            x = layer(x)
        if mask is not None:
            x = x * mask
        return {"logits": self.head(x), "hidden": (x, torch.cat([x, x]))}


class Branch(torch.nn.Module):
    def forward(self, x: Any) -> Any:
        if x.sum() > 0:  # the line an error must name
            return x
        return -x


@pytest.fixture(scope="session")
def model() -> Any:
    torch.manual_seed(0)
    return Two().eval()


def run(module: Module, **feeds: np.ndarray) -> list[np.ndarray]:
    require_valid(module)
    data = ir.to_proto(module.model).SerializeToString()
    return onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, feeds)


def x_of(batch: int) -> Any:
    return torch.randn(batch, 8, generator=torch.Generator().manual_seed(batch))


def test_module_with_a_named_dynamic_dimension(model: Any) -> None:
    module = load_torch(model, (x_of(2),), dynamic_shapes={"pixel_values": {0: "batch"}})
    assert module.signature() == (
        (("pixel_values", "FLOAT", "[batch,8]"),),
        (
            ("logits", "FLOAT", "[batch,3]"),
            ("hidden_0", "FLOAT", "[batch,8]"),
            ("hidden_1", "FLOAT", "[2*batch,8]"),
        ),
    )
    assert module.opset == WORKING_OPSET
    for batch in (1, 5):
        x = x_of(batch)
        expected = model(x)
        outputs = run(module, pixel_values=x.numpy())
        np.testing.assert_allclose(outputs[0], expected["logits"].detach(), atol=1e-6)
        np.testing.assert_allclose(outputs[2], expected["hidden"][1].detach(), atol=1e-6)


def test_torch_dims_and_named_inputs(model: Any) -> None:
    batch = torch.export.Dim("n", min=2)
    inputs = {"pixel_values": x_of(2).numpy(), "mask": x_of(2)}
    module = load_torch(model, inputs, dynamic_shapes={"pixel_values": {0: batch}, "mask": {0: batch}})
    assert [value[::2] for value in module.signature()[0]] == [("pixel_values", "[n,8]"), ("mask", "[n,8]")]


def test_module_paths_and_shared_weights(model: Any) -> None:
    module = load_torch(model, (x_of(2),))
    paths = [node.metadata_props.get(MODULE_PATH_KEY, "") for node in module.graph]
    assert paths[:5] == ["layers.0.fc", "layers.0", "layers.1.fc", "layers.1", "head"]
    weight = module.graph.initializers["head.weight"].const_value
    assert np.shares_memory(weight.numpy(), model.head.weight.detach().numpy())


def test_training_mode_is_restored() -> None:
    model = Two().train()
    model.layers[1].eval()
    module = load_torch(model, (x_of(2),))
    assert model.training
    assert model.layers[0].drop.training
    assert not model.layers[1].drop.training
    assert "Dropout" not in {node.op_type for node in module.graph}
    assert any("training mode" in remark.message for remark in module.remarks)


def test_single_and_tuple_outputs_have_names() -> None:
    class Pair(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return x + 1, x * 2

    assert [v.name for v in load_torch(Block().eval(), x_of(2)).graph.outputs] == ["output"]
    assert [v.name for v in load_torch(Pair(), x_of(2)).graph.outputs] == ["output_0", "output_1"]


class Replace:
    """Replace one ATen operator by another: a wrong pass unless the two agree on the inputs."""

    name = "replace"

    def __init__(self, old: Any, new: Any) -> None:
        self.old, self.new = old, new

    def run_fx(self, graph_module: Any) -> Any:
        for node in graph_module.graph.nodes:
            if node.target == self.old:
                node.target = self.new
        return graph_module


class Duplicate:
    """Insert nodes that change nothing: negate twice."""

    def run_fx(self, graph_module: Any) -> Any:
        graph = graph_module.graph
        for node in list(graph.nodes):
            if node.target == torch.ops.aten.relu.default:
                with graph.inserting_after(node):
                    once = graph.call_function(torch.ops.aten.neg.default, (node,))
                with graph.inserting_after(once):
                    twice = graph.call_function(torch.ops.aten.neg.default, (once,))
                node.replace_all_uses_with(twice, delete_user_cb=lambda user, once=once: user is not once)
        return graph_module


class Fails:
    name = "fails"

    def run_fx(self, graph_module: Any) -> Any:
        raise RuntimeError("on purpose")


def test_fx_passes_run_and_wrong_ones_are_undone(model: Any) -> None:
    relu, gelu = torch.ops.aten.relu.default, torch.ops.aten.gelu.default
    module = load_torch(model, (x_of(2),), fx_passes=[Replace(relu, gelu), Duplicate(), Fails()])
    assert [node.op_type for node in module.graph][:4] == ["Gemm", "Relu", "Neg", "Neg"]
    remarks = {remark.source: remark for remark in module.remarks}
    assert remarks["replace"].kind == "missed"
    assert "changed the outputs" in remarks["replace"].message
    assert remarks["Duplicate"].kind == "applied"
    assert "on purpose" in remarks["fails"].message
    np.testing.assert_allclose(
        run(module, pixel_values=x_of(2).numpy())[0], model(x_of(2))["logits"].detach(), atol=1e-6
    )


def test_strict_fx_passes_raise(model: Any) -> None:
    with pytest.raises(PassError, match="FX pass fails: RuntimeError: on purpose"):
        load_torch(model, (x_of(2),), fx_passes=[Fails()], strict=True)


def test_exported_program_and_pt2_file(model: Any, tmp_path: pathlib.Path) -> None:
    program = torch.export.export(model, (x_of(2),), dynamic_shapes={"pixel_values": {0: torch.export.Dim.DYNAMIC}})
    names = {"pixel_values": {0: "rows"}}
    assert load_torch(program, dynamic_shapes=names).signature()[0][0][2] == "[rows,8]"
    path = tmp_path / "m.pt2"
    torch.export.save(program, path)
    with pytest.raises(UserError, match="can run code"):
        load_torch(path)
    module = load_torch(path, dynamic_shapes=names, trust_code=True)
    assert module.signature()[0][0][2] == "[rows,8]"
    np.testing.assert_allclose(
        run(module, pixel_values=x_of(3).numpy())[0], model(x_of(3))["logits"].detach(), atol=1e-6
    )
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(LoadError, match="is not an exported program"):
        load_torch(path, trust_code=True)
    with pytest.raises(LoadError, match="no such file"):
        load_torch(tmp_path / "gone.pt2", trust_code=True)


@pytest.mark.parametrize(
    ("load", "error", "message"),
    [
        (lambda: load_torch(Two()), UserError, "needs example inputs"),
        (lambda: load_torch(Two(), (1, 2, 3)), UserError, "too many positional"),
        (lambda: load_torch(Two(), {"pixels": x_of(2)}), UserError, "pixel_values"),
        (lambda: load_torch(Two(), (x_of(2),), dynamic_shapes={"pixel": {0: "b"}}), UserError, "did you mean"),
        (lambda: load_torch(Two(), (torch.ones(2, 9),)), LoadError, "test_frontend_torch.py"),
        (lambda: load_torch(Two(), (x_of(1),), dynamic_shapes={"pixel_values": {0: "b"}}), LoadError, "is not 1"),
        (lambda: load_torch(Branch(), (x_of(2),)), LoadError, r"if x\.sum\(\) > 0"),
        (lambda: load_torch(42), UserError, "cannot load a int"),
    ],
    ids=["none", "too many", "wrong name", "wrong shape name", "wrong shape", "batch 1", "branch", "no module"],
)
def test_errors_say_what_and_where(load: Callable[[], Module], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load()


CODE = """
import torch

class Scale(torch.nn.Module):
    def forward(self, x):
        return 2 * x

def build():
    return Scale(), (torch.ones(2, 3),), {"x": {0: "batch"}}

def breaks():
    raise ValueError("no weights here")

def returns_one():
    return Scale()
"""


def test_callable(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "user_models_xyz.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    module = load_callable("user_models_xyz:build")
    assert module.signature()[0] == (("x", "FLOAT", "[batch,3]"),)
    assert module.provenance == ["loaded from user_models_xyz:build"]
    assert sys.path == before
    for spec, error, message in [
        ("user_models_xyz", UserError, "not of the form"),
        ("no_such_package_xyz:f", UserError, "no module"),
        ("user_models_xyz:biuld", UserError, "did you mean 'build'"),
        ("user_models_xyz:breaks", LoadError, r"user_models_xyz.py:\d+ .*no weights here"),
        ("user_models_xyz:returns_one", UserError, "returned a Scale"),
    ]:
        with pytest.raises(error, match=message):
            load_callable(spec)


def test_torch_is_imported_only_when_needed() -> None:
    code = "import sys, mmopt.frontends.torch, mmopt.frontends.onnx; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_torch_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"mmopt\[torch\]"):
        load_torch("m.pt2")
