"""Reconstruction of blocks against a reference, judged by onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from mmopt.errors import UserError  # noqa: E402
from mmopt.ir.evaluate import ReferenceRunner  # noqa: E402
from mmopt.ir.module import Module  # noqa: E402
from mmopt.training import Block, layer_blocks, reconstruct  # noqa: E402

WIDTH, ROWS = 24, 32
STEP = np.float32(0.35)

TEXT = """<ir_version: 10, opset_import: ["" : 21]>
g (float[rows, 24] x) => (float[rows, 24] y) {
    a = MatMul(x, w1)
    b = Tanh(a)
    y = MatMul(b, w2)
}"""
QUANTIZED = """<ir_version: 10, opset_import: ["" : 21]>
g (float[rows, 24] x) => (float[rows, 24] y) {
    w1_wide = DequantizeLinear(w1_q, scale, zero)
    w2_wide = DequantizeLinear(w2_q, scale, zero)
    a = MatMul(x, w1_wide)
    b = Tanh(a)
    b_q = QuantizeLinear(b, b_scale, b_zero)
    b_wide = DequantizeLinear(b_q, b_scale, b_zero)
    y = MatMul(b_wide, w2_wide)
}"""


def _module(text: str, **constants: Any) -> Module:
    model = ir.serde.deserialize_model(onnx.parser.parse_model(text))
    values = {str(v.name): v for node in model.graph for v in node.inputs if v is not None and v.producer() is None}
    for name, array in constants.items():
        values[name].const_value = array if isinstance(array, ir.TensorProtocol) else ir.tensor(array, name=name)
        model.graph.register_initializer(values[name])
    return Module(model)


def _weights() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {name: (random.standard_normal((WIDTH, WIDTH)) / 2).astype(np.float32) for name in ("w1", "w2")}


def _quantized(dtype: ir.DataType = ir.DataType.INT4, zero: int = 0) -> Module:
    low, high = (-8, 7) if dtype == ir.DataType.INT4 else (0, 255)
    made = {}
    for name, weight in _weights().items():
        integers = np.clip(np.rint(weight / STEP) + zero, low, high).astype(np.int32)
        made[f"{name}_q"] = ir.Tensor(integers.astype(dtype.numpy()), dtype=dtype, name=f"{name}_q")
    point = ir.Tensor(np.array(zero).astype(dtype.numpy()), dtype=dtype, name="zero")
    parameters = {"scale": STEP, "zero": point, "b_scale": np.float32(1 / 127), "b_zero": np.int8(0)}
    return _module(QUANTIZED, **made, **{n: v if n == "zero" else np.asarray(v) for n, v in parameters.items()})


def _batches(count: int = 9) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(5)
    # Features that go together are what makes rounding one by one a bad choice.
    mix = random.standard_normal((6, WIDTH)).astype(np.float32)
    noise = 0.1 * random.standard_normal((count, ROWS, WIDTH)).astype(np.float32)
    return [{"x": random.standard_normal((ROWS, 6)).astype(np.float32) @ mix / 3 + noise[k]} for k in range(count)]


def _error(module: Module, reference: Module, batches: list[dict[str, np.ndarray]]) -> float:
    with ReferenceRunner(threads=1) as runner:
        pairs = [(runner.run(module, b)["y"], runner.run(reference, b)["y"]) for b in batches]
    return float(np.mean([np.mean((got - want) ** 2) / np.mean(want**2) for got, want in pairs]))


@pytest.mark.parametrize("zero", [0, 100], ids=["int4", "uint8 with zero point"])
def test_learned_rounding_beats_the_nearest(zero: int) -> None:
    """Errors are those onnxruntime finds; every weight is rounded up or down; nothing else changes."""
    reference = _module(TEXT, **_weights())
    dtype = ir.DataType.UINT8 if zero else ir.DataType.INT4
    module, before = _quantized(dtype, zero), _quantized(dtype, zero)
    batches = _batches()
    blocks = layer_blocks(module, reference)
    assert blocks == (Block(("x",), ("a",), ("w1_q",)), Block(("b",), ("y",), ("w2_q",)))
    originals = {f"{name}_q": weight for name, weight in _weights().items()}
    told: list[tuple[int, int, str]] = []
    results = reconstruct(module, reference, blocks, batches, originals=originals, progress=lambda *at: told.append(at))
    assert told == [(0, 2, "a"), (1, 2, "y")]
    assert all(result.kept and result.after < 0.6 * result.before for result in results)
    unseen = batches[8:]
    assert _error(module, reference, unseen) == pytest.approx(results[1].after, rel=1e-3)
    assert _error(module, reference, unseen) < 0.6 * _error(before, reference, unseen)
    for name, weight in _weights().items():
        tensor = module.graph.initializers[f"{name}_q"].const_value
        assert tensor.dtype == dtype
        assert tensor.name == f"{name}_q"
        integers = tensor.numpy().astype(np.int32) - zero
        assert (np.abs(integers - weight / STEP)[np.abs(weight / STEP) < 7] < 1.001).all()
    for name in ("scale", "zero", "b_scale"):
        assert (
            module.graph.initializers[name].const_value.tobytes()
            == before.graph.initializers[name].const_value.tobytes()
        )


def test_without_originals_integers_move_where_that_helps() -> None:
    reference, module = _module(TEXT, **_weights()), _quantized()
    batches = _batches()
    results = reconstruct(module, reference, layer_blocks(module, reference), batches, rate=0.05)
    assert any(result.kept for result in results)
    assert _error(module, reference, batches[8:]) < 0.9 * _error(_quantized(), reference, batches[8:])


def test_float_weights_and_scales_are_trained_as_they_are() -> None:
    """A block of everything between input and output, whose float weights were damaged."""
    reference = _module(TEXT, **_weights())
    noise = {name: w + 0.05 * np.random.default_rng(1).standard_normal(w.shape) for name, w in _weights().items()}
    module = _module(TEXT, **{name: w.astype(np.float32) for name, w in noise.items()})
    start = _error(module, reference, _batches()[8:])
    (result,) = reconstruct(module, reference, [Block((), ("y",), ("w1", "w2"))], _batches(), steps=300, rate=0.01)
    assert result.kept
    assert result.before == pytest.approx(start, rel=1e-3)
    assert _error(module, reference, _batches()[8:]) == pytest.approx(result.after, rel=1e-3)
    assert result.after < 0.3 * start
    quantized = _quantized()
    (scales,) = reconstruct(quantized, reference, [Block(("x",), ("a",), ("scale",))], _batches(), rate=0.01)
    assert scales.kept
    assert quantized.graph.initializers["scale"].const_value.numpy() != STEP


def test_what_does_not_get_better_stays() -> None:
    """A reference equal to the module cannot be approached."""
    module, twin = _module(TEXT, **_weights()), _module(TEXT, **_weights())
    (result,) = reconstruct(module, twin, [Block((), ("y",), ("w1",))], _batches(2), steps=3)
    assert not result.kept
    assert result.before == 0
    assert module.graph.initializers["w1"].const_value.tobytes() == twin.graph.initializers["w1"].const_value.tobytes()


def test_the_same_seed_gives_the_same_bits() -> None:
    def made(seed: int) -> bytes:
        module, reference = _quantized(), _module(TEXT, **_weights())
        originals = {f"{name}_q": weight for name, weight in _weights().items()}
        reconstruct(module, reference, layer_blocks(module, reference), _batches(4), originals=originals, seed=seed)
        return module.graph.initializers["w2_q"].const_value.tobytes()

    assert made(1) == made(1)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (Block(("x",), ("nowhere",), ("w1_q",)), "the module has no tensor 'nowhere'"),
        (Block(("x",), ("w1_wide",), ("w1_q",)), "the reference has no tensor 'w1_wide'"),
        (Block(("x",), ("a",), ("w3",)), "no initializer 'w3'"),
        (Block(("x",), ("a",), ("w2_q",)), "the block does not read 'w2_q'"),
    ],
)
def test_wrong_names_are_refused(block: Block, message: str) -> None:
    with pytest.raises(UserError, match=message):
        reconstruct(_quantized(), _module(TEXT, **_weights()), [block], _batches(1))


def test_wrong_data_is_refused() -> None:
    module, reference = _quantized(), _module(TEXT, **_weights())
    blocks = layer_blocks(module, reference)
    with pytest.raises(UserError, match="no batch"):
        reconstruct(module, reference, blocks, [])
    with pytest.raises(UserError, match=r"the original of 'w1_q' is \[3\]"):
        reconstruct(module, reference, blocks, _batches(1), originals={"w1_q": np.zeros(3)})
    broken = _batches(3)
    broken[0]["x"][:] = np.nan
    broken[1]["x"][:] = np.nan
    with pytest.raises(UserError, match=r"block a, step 0, batch [01]"):
        reconstruct(module, reference, blocks, broken)
