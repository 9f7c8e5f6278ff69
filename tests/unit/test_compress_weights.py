"""Embedding tables and recurrent weights in integers: in the model, in the artifact, and in what both compute."""

from __future__ import annotations

import pathlib

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mmopt
from mmopt.errors import LoadError, UserError
from mmopt.ir.module import Module
from mmopt.ir.verify import verify
from mmopt.pipeline.base import PassContext
from mmopt.runtime.encoded import Encoded
from mmopt.runtime.weights import map_weights, write_weights
from mmopt.transforms.quantize import CompressWeights, QuantizeWeights
from tests.canonical import evaluate, module_from
from tests.unit.test_rewrite import weights

WORDS, WIDTH, HIDDEN = 500, 64, 48


def reader(kind: str = "LSTM") -> Module:
    """Words are looked up and read by a bidirectional recurrence."""
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind]
    shapes = {"t": (WORDS, WIDTH), "w": (2, gates * HIDDEN, WIDTH), "r": (2, gates * HIDDEN, HIDDEN)}
    shapes["b"] = (2, 2 * gates * HIDDEN)
    declared = ", ".join(f"float[{','.join(map(str, shape))}] {name}" for name, shape in shapes.items())
    body = f"""e = Gather(t, i) x = Transpose<perm=[1,0,2]>(e)
    h, y = {kind}<hidden_size={HIDDEN}, direction="bidirectional">(x, w, r, b)"""
    module = module_from(f"g (int64[3,7] i, {declared}) => (float[2,3,{HIDDEN}] y) {{ {body} }}", opset=21)
    for number, node in enumerate(module.graph):
        node.name = f"{node.op_type}_{number}"
    module = weights(module, **shapes)
    for seed, name in enumerate(shapes):
        data = np.random.default_rng(seed).standard_normal(shapes[name]).astype(np.float32)
        module.graph.initializers[name].const_value = ir.tensor(data / np.float32(1 if name == "t" else 8), name=name)
    return module


def words(seed: int = 0) -> dict[str, np.ndarray]:
    return {"i": np.random.default_rng(seed).integers(-WORDS, WORDS, (3, 7))}


def sizes(module: Module) -> int:
    tensors = (value.const_value for value in module.graph.initializers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


class TestPass:
    @pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
    @pytest.mark.parametrize(("bits", "block", "bound"), [(8, 0, 0.02), (4, 32, 0.3), (8, 16, 0.02)])
    def test_any_runtime_reads_it(self, kind: str, bits: int, block: int, bound: float) -> None:
        module = reader(kind)
        before = sizes(module)
        context = PassContext()
        assert CompressWeights(bits=bits, block=block).run(module, context)  # type: ignore[arg-type]
        assert [problem for problem in verify(module) if problem.severity == "error"] == []
        got, want = evaluate(module, words())["y"], evaluate(reader(kind), words())["y"]
        assert np.sqrt(((got - want) ** 2).mean() / (want**2).mean()) < bound
        assert sizes(module) < before * (0.36 if bits == 8 else 0.25)
        assert any("3 weights" in remark.message for remark in context.remarks)

    def test_only_what_is_asked_for(self) -> None:
        module = reader()
        assert CompressWeights(kinds=("Gather",)).run(module, PassContext())
        assert module.graph.initializers["w"].dtype == ir.DataType.FLOAT
        module = reader()
        assert CompressWeights(exclude=("Gather*",)).run(module, PassContext())
        assert module.graph.initializers["t"].dtype == ir.DataType.FLOAT
        assert not CompressWeights(include=("nothing",)).run(reader(), PassContext())

    def test_other_kinds_are_refused(self) -> None:
        with pytest.raises(UserError, match="MatMul keeps no table"):
            CompressWeights(kinds=("MatMul",)).run(reader(), PassContext())

    def test_an_old_opset_is_left_alone(self) -> None:
        module = reader()
        module.model.opset_imports[""] = 17
        context = PassContext()
        assert not CompressWeights().run(module, context)
        assert "too old" in context.remarks[0].message


class TestArtifact:
    @pytest.mark.parametrize(("kind", "bits"), [("LSTM", 8), ("LSTM", 4), ("GRU", 4)])
    def test_small_on_disk_and_as_exact_as_the_model(self, kind: str, bits: int, tmp_path: pathlib.Path) -> None:
        module = reader(kind)
        float_bytes = sizes(module)
        pass_ = CompressWeights(bits=bits, block=32 if bits == 4 else 0)  # type: ignore[arg-type]
        result = mmopt.optimize(module, passes=[pass_], validate="off")
        mmopt.compile(result.module, output=tmp_path / "a.mmopt", tolerance=1e-4)
        size = (tmp_path / "a.mmopt" / "weights.safetensors").stat().st_size
        assert size < float_bytes * (0.36 if bits == 8 else 0.26)
        reference = reader(kind)
        assert pass_.run(reference, PassContext())
        want = evaluate(reference, words())["y"]
        got = mmopt.load_artifact(tmp_path / "a.mmopt").run(words())["y"]
        np.testing.assert_allclose(got, want, atol=1e-5)


class TestEncoded:
    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.sampled_from([4, 8]), st.integers(0, 2), st.data())
    def test_what_is_written_is_read_back(self, shape: list[int], bits: int, axis: int, data: st.DataObject) -> None:
        random = np.random.default_rng(data.draw(st.integers(0, 1000)))
        low, high = (-8, 8) if bits == 4 else (-128, 128)
        integers = random.integers(low, high, shape).astype(np.int8)
        shared = [1 if n == axis else size for n, size in enumerate(shape)]
        scales = np.broadcast_to(random.random(shared).astype(np.float32), shape)
        encoded = Encoded.of(integers, scales, bits)
        np.testing.assert_array_equal(encoded.decoded(), integers * scales)
        joined = Encoded.joined(*encoded.parts())
        np.testing.assert_array_equal(joined.integers, integers)
        np.testing.assert_array_equal(joined.decoded(), integers * scales)

    def test_a_scale_for_a_block_is_kept_once(self) -> None:
        scales = np.arange(1, 13, dtype=np.float32).reshape(3, 4).repeat(32, axis=1)
        encoded = Encoded.of(np.ones((3, 128), np.int8), scales, 4)
        assert encoded.scales.shape == (3, 4)
        assert encoded.nbytes == 3 * 64 + 3 * 4 * 4

    def test_the_file_holds_integers(self, tmp_path: pathlib.Path) -> None:
        integers = np.random.default_rng(0).integers(-8, 8, (64, 64)).astype(np.int8)
        encoded = Encoded.of(integers, np.full((64, 64), 0.25, np.float32), 4)
        others = {"a": np.arange(5.0), "w": encoded.decoded(), "z": np.arange(3)}
        write_weights(others, tmp_path / "w.safetensors", {"w": encoded})
        assert (tmp_path / "w.safetensors").stat().st_size < 64 * 64
        read = map_weights(tmp_path / "w.safetensors")
        assert set(read) == set(others)
        for name, array in others.items():
            np.testing.assert_array_equal(read[name], array)

    def test_parts_that_do_not_fit_are_an_error(self, tmp_path: pathlib.Path) -> None:
        scales = np.arange(1, 5, dtype=np.float32)[:, None].repeat(8, axis=1)
        encoded = Encoded.of(np.ones((4, 8), np.int8), scales, 8)
        path = tmp_path / "w.safetensors"
        write_weights({"w": encoded.decoded()}, path, {"w": encoded})
        path.write_bytes(path.read_bytes().replace(b"[4, 8]", b"[8, 4]"))
        with pytest.raises(LoadError, match="do not fit"):
            map_weights(path)


def test_filters_are_small_on_disk_too(tmp_path: pathlib.Path) -> None:
    text = "float[1,32,20,20] x, float[64,32,5,5] w, float[64] b"
    module = module_from(f"g ({text}) => (float[1,64,16,16] z) {{ y = Conv(x, w, b) z = Exp(y) }}", opset=21)
    module = weights(module, w=(64, 32, 5, 5), b=(64,))
    x = {"x": np.random.default_rng(0).standard_normal((1, 32, 20, 20)).astype(np.float32) / 8}
    pass_ = QuantizeWeights(bits=4, kinds=("Conv",))
    result = mmopt.optimize(module, passes=[pass_], validate="off")
    mmopt.compile(result.module, output=tmp_path / "a.mmopt", inputs=x)
    assert (tmp_path / "a.mmopt" / "weights.safetensors").stat().st_size < 64 * 32 * 25 * 4 * 0.15
    assert pass_.run(module, PassContext())
    got, want = mmopt.load_artifact(tmp_path / "a.mmopt").run(x)["z"], evaluate(module, x)["z"]
    np.testing.assert_allclose(got, want, rtol=1e-4)
