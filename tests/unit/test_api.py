"""The Python interface: load, optimize, compile, verify, and what it refuses."""

from __future__ import annotations

import pathlib

import numpy as np
import onnx_ir as ir
import pytest

import mmopt
from mmopt.building import build_artifact
from mmopt.errors import LoadError, UserError, VerifyError
from mmopt.ir.fingerprint import fingerprint
from mmopt.loading import fix_shapes, load_samples
from tests.small_models import two_layers, two_towers


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return two_layers(tmp_path_factory.mktemp("api") / "m.onnx")


def test_every_public_name_exists() -> None:
    for name in mmopt.__all__:
        assert getattr(mmopt, name).__name__ == name
    assert set(dir(mmopt)) == set(mmopt.__all__)
    with pytest.raises(AttributeError, match="no attribute 'optimise'"):
        mmopt.optimise  # noqa: B018


def test_the_four_calls(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    module = mmopt.load(model)
    before = fingerprint(module.model)
    result = mmopt.optimize(module, target="cpu", level=2)
    assert fingerprint(module.model) == before, "the module that is given stays as it is"
    assert len(list(result.module.graph)) < len(list(module.graph))
    assert result.report.ok
    built = mmopt.compile(result.module, target="cpu", output=tmp_path / "m.mmopt", reference=module)
    assert built.native
    assert built.checks["main"].ok
    session = mmopt.load_artifact(built.path, threads=2)
    x = np.random.default_rng(0).standard_normal((5, 16)).astype(np.float32)
    assert session.run({"x": x})["y"].shape == (5, 4)
    check = mmopt.verify(session, module, inputs={"x": x})
    assert check.ok
    assert check.inputs_from == "given"
    assert 0 <= check.outputs["y"].max_abs_error < 1e-4


def test_verify_checks_every_set_of_inputs(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """On an empty batch everything agrees; the second of two sets tells the models apart."""
    other = two_layers(tmp_path / "o.onnx", activation="Abs")
    alike, apart = {"x": np.zeros((0, 16), np.float32)}, {"x": np.ones((1, 16), np.float32)}
    assert mmopt.verify(other, model, inputs=alike).ok
    found = mmopt.verify(other, model, inputs=[alike, apart])
    assert not found.ok
    assert found.sets == 2
    with pytest.raises(VerifyError, match="output 'y'"):
        found.check()


def test_given_passes_run_and_wrong_ones_are_rolled_back(model: pathlib.Path) -> None:
    @mmopt.module_pass
    def swap_operands(module: mmopt.Module, context: mmopt.PassContext) -> bool:
        node = next(node for node in module.graph if node.op_type == "MatMul")
        node.op_type = "Sub"
        return True

    result = mmopt.optimize(mmopt.load(model), level=0, passes=[swap_operands()])
    assert [record.name for record in result.report.failed] == ["swap-operands"]
    assert any(node.op_type == "MatMul" for node in result.module.graph)


def test_settings_come_from_the_call_then_the_recipe(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('schema_version = 1\nvalidate = "off"\nseed = 7\n[[phase]]\npasses = ["remove-no-ops"]\n')
    module = mmopt.load(model)
    said = mmopt.optimize(module, recipe=recipe).report
    assert (said.validate, said.seed, [record.name for record in said.passes]) == ("off", 7, ["remove-no-ops"])
    assert mmopt.optimize(module, recipe=recipe, validate="end").report.validate == "end"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"level": 9}, "no level 9"),
        ({"precision": "int2"}, "precision 'int2'"),
        ({"passes": ["fold-constant"]}, "did you mean 'fold-constants'"),
        ({"recipe": "o8"}, "no recipe 'o8'"),
        ({"inputs": {"x": np.zeros((1, 15), np.float32)}}, "do not run"),
    ],
)
def test_wrong_arguments(model: pathlib.Path, arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        mmopt.optimize(mmopt.load(model), **arguments)


def test_load_takes_models_in_memory_and_modalities(model: pathlib.Path) -> None:
    module = mmopt.load(ir.load(model), modalities={"x": "image"}, shapes={"x": (2, 16)})
    assert module.modalities == {"x": mmopt.Modality.IMAGE}
    assert [int(dim) for dim in module.graph.outputs[0].shape] == [2, 4]
    with pytest.raises(UserError, match="did you mean 'x'"):
        mmopt.load(model, modalities={"xx": "image"})
    with pytest.raises(LoadError, match="no such file"):
        mmopt.load("absent")


def test_fixed_shapes_reach_what_shares_their_symbols(tmp_path: pathlib.Path) -> None:
    module = mmopt.load(two_towers(tmp_path / "t.onnx"))
    fix_shapes(module, {"left": (3, 6)})
    assert [int(dim) for dim in module.graph.inputs[1].shape] == [3, 6]
    assert [int(dim) for dim in module.graph.outputs[0].shape] == [3, 3]
    with pytest.raises(UserError, match="'batch' would be 1 and 2"):
        fix_shapes(mmopt.load(tmp_path / "t.onnx"), {"left": (1, 6), "right": (2, 6)})


def test_compile_refuses_what_disagrees_and_writes_nothing(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    reference = mmopt.load(two_layers(tmp_path / "o.onnx", activation="Abs"))
    module = mmopt.load(model)
    output = tmp_path / "m.mmopt"
    with pytest.raises(VerifyError, match="no artifact was written"):
        mmopt.compile(module, output=output, reference=reference)
    assert not output.exists()
    built = mmopt.compile(module, output=output, reference=reference, allow_mismatch=True)
    assert not built.checks["main"].ok
    assert output.exists()


def test_an_artifact_for_another_machine_is_written_unverified(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    import dataclasses

    from mmopt.backends.profile import load_profile

    profile = dataclasses.replace(load_profile("x86-64-v3"), name="dream", features=("avx9000",))
    built = build_artifact(mmopt.load(model), profile, tmp_path / "m.mmopt")
    assert built.checks == {}
    assert "cannot run here" in built.unverified
    with pytest.raises(mmopt.MmoptError, match="avx9000"):
        mmopt.load_artifact(tmp_path / "m.mmopt")


def test_calibration_samples(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    module = mmopt.load(model)
    for number in range(2):
        np.savez(tmp_path / f"{number}.npz", x=np.full((3, 1, 16), number, np.float32))
    samples = load_samples(tmp_path, module)
    assert samples["x"].shape == (6, 1, 16)
    assert samples["x"][:, 0, 0].tolist() == [0, 0, 0, 1, 1, 1]
    for arrays, message in [
        ({"y": np.zeros((3, 1, 16), np.float32)}, "no input 'y'"),
        ({"x": np.zeros((3, 1, 16))}, "dtype float64"),
        ({"x": np.zeros((0, 1, 16), np.float32)}, "no samples"),
    ]:
        np.savez(tmp_path / "bad.npz", **arrays)
        with pytest.raises(UserError, match=message):
            load_samples(tmp_path / "bad.npz", module)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no \.npz"):
        load_samples(tmp_path / "empty", module)
