"""Rules of operators: values against onnxruntime and the conformance suite, gradients against finite differences."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import warnings
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from mmopt.errors import UnsupportedError  # noqa: E402
from mmopt.frontends.opset import to_working_opset  # noqa: E402
from mmopt.ir.evaluate import ReferenceRunner  # noqa: E402
from mmopt.ir.module import Module  # noqa: E402
from mmopt.training import to_fx  # noqa: E402
from mmopt.training.registry import rules  # noqa: E402
from mmopt.training.tensors import feed, to_numpy  # noqa: E402
from tests.compat.cases import all_cases  # noqa: E402
from tests.operators import numbers  # noqa: E402

Arrays = dict[str, Any]


def module_of(body: str, outputs: str, inputs: Arrays, *, opset: int = 23) -> Module:
    """A module of the nodes in ``body``, ONNX's text form."""
    names = {
        "float32": "float",
        "float64": "double",
        "int64": "int64",
        "int32": "int32",
        "uint8": "uint8",
        "bool": "bool",
    }
    stated = ", ".join(f"{names[str(a.dtype)]}[{','.join(map(str, a.shape))}] {n}" for n, a in inputs.items())
    text = f'<ir_version: 10, opset_import: ["" : {opset}]>\ng ({stated}) => ({outputs}) {{ {body} }}'
    model = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text), data_prop=True)
    return Module(ir.serde.deserialize_model(model))


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


X, IMAGE, SEQUENCE = numbers(2, 3, 4), numbers(2, 4, 7, 6), numbers(5, 2, 3)
POSITIVE = numbers(2, 3, 4, low=0.3)
LENGTHS = np.array([5, 3], np.int32)


def _recurrent(gates: int, directions: int = 1, *, bias: bool = True) -> Arrays:
    made = {"x": SEQUENCE, "w": numbers(directions, gates * 4, 3, seed=1, low=-1, high=1)}
    made["r"] = numbers(directions, gates * 4, 4, seed=2, low=-1, high=1)
    return {**made, "b": numbers(directions, 2 * gates * 4, seed=3)} if bias else made


GRID: list[tuple[str, Arrays]] = [
    *[(f"y = {op}(x)", {"x": POSITIVE}) for op in ("Log", "Sqrt", "Reciprocal", "Exp", "Softplus", "Sigmoid", "Erf")],
    *[(f"y = {op}(x)", {"x": X}) for op in ("Tanh", "Sin", "Cos", "Gelu", "Abs", "Neg", "Mish", "HardSwish", "Relu")],
    ('y = Gelu<approximate = "tanh">(x)', {"x": X}),
    ("y = Elu<alpha = 0.7>(x)", {"x": X}),
    ("y = Selu(x)", {"x": X}),
    ("y = Celu<alpha = 2.0>(x)", {"x": X}),
    ("y = LeakyRelu<alpha = 0.3>(x)", {"x": X}),
    ("y = HardSigmoid<alpha = 0.3>(x)", {"x": X}),
    ("y = ThresholdedRelu<alpha = 0.5>(x)", {"x": X}),
    ("y = PRelu(x, s)", {"x": X, "s": numbers(4, seed=1)}),
    *[(f"y = {op}(x, z)", {"x": X, "z": numbers(3, 1, seed=2, low=0.5)}) for op in ("Add", "Sub", "Mul", "Div")],
    ("y = Pow(x, z)", {"x": POSITIVE, "z": numbers(4, seed=2)}),
    ("y = Max(x, z)", {"x": X, "z": numbers(3, 1, seed=2)}),
    ("y = Mean(x, z)", {"x": X, "z": numbers(3, 1, seed=2)}),
    ("y = Clip(x, l, h)", {"x": X, "l": np.float32(-1) * np.ones((), np.float32), "h": np.ones((), np.float32)}),
    *[
        (f"axes = Constant<value_ints = [0, 2]>()\n y = {op}<keepdims = {keep}>(x, axes)", {"x": POSITIVE})
        for op in (
            "ReduceSum",
            "ReduceMean",
            "ReduceMax",
            "ReduceL2",
            "ReduceLogSumExp",
            "ReduceProd",
            "ReduceSumSquare",
        )
        for keep in (0, 1)
    ],
    ("y = Softmax<axis = 1>(x)", {"x": X}),
    ("y = LogSoftmax(x)", {"x": X}),
    ("a = Constant<value_ints = [-2]>()\n y = CumSum<exclusive = 1>(x, a)", {"x": X}),
    ("k = Constant<value_ints = [2]>()\n y, i = TopK<axis = 1>(x, k)", {"x": X}),
    ("y = MatMul(x, z)", {"x": X, "z": numbers(4, 5, seed=1)}),
    (
        "y = Gemm<transA = 1, alpha = 0.5, beta = 2.0>(x, z, c)",
        {"x": X[0], "z": numbers(3, 5, seed=1), "c": X[0, 0, :1]},
    ),
    ('y = Einsum<equation = "bij,bjk->bik">(x, z)', {"x": X, "z": numbers(2, 4, 3, seed=1)}),
    ("y = Transpose<perm = [2, 0, 1]>(x)", {"x": X}),
    ("s = Constant<value_ints = [0, -1]>()\n y = Reshape(x, s)", {"x": X}),
    ("y = Concat<axis = 1>(x, x)", {"x": X}),
    ("y, z = Split<axis = 2, num_outputs = 2>(x)", {"x": X}),
    ("y = Slice(x, s, e, a, t)", {"x": X, "s": ints(3), "e": ints(-9), "a": ints(2), "t": ints(-2)}),
    *[
        (f'y = Pad<mode = "{mode}">(x, p)', {"x": X, "p": ints(0, 1, 2, 1, 0, 1)})
        for mode in ("constant", "reflect", "edge", "wrap")
    ],
    ("y = Gather<axis = 1>(x, i)", {"x": X, "i": ints(2, -1, 0)}),
    ("y = GatherElements<axis = 1>(x, i)", {"x": X[:1, :, :1], "i": ints(2, -1).reshape(1, 2, 1)}),
    ("y = GatherND<batch_dims = 1>(x, i)", {"x": X, "i": ints(2, -1).reshape(2, 1)}),
    ("y = ScatterElements<axis = 1>(x, i, u)", {"x": X, "i": ints(0, -1).reshape(1, 2, 1), "u": X[:1, :2, :1]}),
    ('y = ScatterND<reduction = "add">(x, i, u)', {"x": X, "i": ints(0, -1).reshape(2, 1), "u": X}),
    ("y = Expand(x, s)", {"x": X[:, :1], "s": ints(2, 3, 1)}),
    ("y = Tile(x, s)", {"x": X, "s": ints(1, 2, 3)}),
    ("y = DepthToSpace<blocksize = 2>(x)", {"x": IMAGE}),
    ("y = Where(c, x, z)", {"c": X > 0, "x": X, "z": numbers(4, seed=1)}),
    (
        "y = Conv<strides = [2, 1], pads = [1, 0, 2, 1], group = 2>(x, w, b)",
        {"x": IMAGE, "w": numbers(6, 2, 3, 2, seed=1), "b": numbers(6, seed=2)},
    ),
    ('y = Conv<auto_pad = "SAME_LOWER", strides = [2]>(x, w)', {"x": X, "w": numbers(5, 3, 2, seed=1)}),
    (
        "y = ConvTranspose<strides = [2, 3], pads = [1, 0, 1, 2], output_padding = [1, 0]>(x, w)",
        {"x": IMAGE, "w": numbers(4, 2, 3, 3, seed=1)},
    ),
    ("y = MaxPool<kernel_shape = [3, 2], strides = [2, 2], pads = [1, 0, 1, 1], ceil_mode = 1>(x)", {"x": IMAGE}),
    ("y = AveragePool<kernel_shape = [3, 2], strides = [2, 2], pads = [1, 0, 1, 1]>(x)", {"x": IMAGE}),
    ("y = GlobalAveragePool(x)", {"x": IMAGE}),
    ("y = LpPool<kernel_shape = [2, 2]>(x)", {"x": IMAGE}),
    ("y = LayerNormalization<axis = 1>(x, s, b)", {"x": X, "s": numbers(3, 4, seed=1), "b": numbers(4, seed=2)}),
    (
        "y = BatchNormalization(x, s, b, m, v)",
        {"x": X, **{n: numbers(3, seed=k, low=0.2) for k, n in enumerate("sbmv")}},
    ),
    ("y = InstanceNormalization(x, s, b)", {"x": IMAGE, "s": numbers(4, seed=1), "b": numbers(4, seed=2)}),
    ("y = GroupNormalization<num_groups = 2>(x, s, b)", {"x": IMAGE, "s": numbers(4, seed=1), "b": numbers(4, seed=2)}),
    ("y = RMSNormalization(x, s)", {"x": X, "s": numbers(4, seed=1)}),
    ("y = LRN<size = 3, alpha = 0.1>(x)", {"x": IMAGE}),
    ("y = LpNormalization<p = 1>(x)", {"x": X}),
    ("y = Attention<is_causal = 1>(x, k, v)", {n: numbers(1, 2, 3, 4, seed=k) for k, n in enumerate("xkv")}),
    (
        "y = Attention<q_num_heads = 4, kv_num_heads = 2>(x, k, v)",
        {"x": numbers(1, 3, 8), "k": numbers(1, 5, 4, seed=1), "v": numbers(1, 5, 4, seed=2)},
    ),
    (
        "y = RotaryEmbedding(x, c, s)",
        {"x": numbers(1, 2, 3, 4), "c": numbers(1, 3, 2, seed=1), "s": numbers(1, 3, 2, seed=2)},
    ),
    ("y, h, c = LSTM<hidden_size = 4>(x, w, r, b)", _recurrent(4)),
    ('y, h, c = LSTM<hidden_size = 4, direction = "bidirectional">(x, w, r, b)', _recurrent(4, 2)),
    ('y, h, c = LSTM<hidden_size = 4, direction = "reverse">(x, w, r, b, l)', {**_recurrent(4), "l": LENGTHS}),
    (
        "y, h, c = LSTM<hidden_size = 4, clip = 0.9>(x, w, r, b, , i, j, p)",
        {**_recurrent(4), "i": numbers(1, 2, 4, seed=5), "j": numbers(1, 2, 4, seed=6), "p": numbers(1, 12, seed=7)},
    ),
    ("y, h = GRU<hidden_size = 4>(x, w, r, b)", _recurrent(3)),
    ('y, h = GRU<hidden_size = 4, linear_before_reset = 1, direction = "bidirectional">(x, w, r, b)', _recurrent(3, 2)),
    ("y, h = GRU<hidden_size = 4, linear_before_reset = 1>(x, w, r, , l)", {**_recurrent(3, bias=False), "l": LENGTHS}),
    ('y, h = RNN<hidden_size = 4, direction = "reverse">(x, w, r, b)', _recurrent(1)),
    ('y = Resize<mode = "linear">(x, , z)', {"x": IMAGE, "z": np.array([1, 1, 1.5, 2], np.float32)}),
    ('y = Resize<mode = "cubic">(x, , , z)', {"x": IMAGE, "z": ints(2, 4, 5, 9)}),
    ("y = GridSample<align_corners = 1>(x, g)", {"x": IMAGE, "g": numbers(2, 3, 3, 2, seed=1, low=-0.9, high=0.9)}),
    ("a = CastLike(x, x)\n y = Mul(a, x)", {"x": X}),
]


@pytest.mark.parametrize(("body", "inputs"), GRID, ids=[body.split("= ")[-1][:48] for body, _ in GRID])
def test_values_are_onnxruntimes_and_gradients_are_differences(body: str, inputs: Arrays) -> None:
    """In float32 the values, in float64 the gradients: the rules take either."""
    outputs = body.splitlines()[-1].split("=")[0]
    module = module_of(body, outputs, inputs)
    graph = to_fx(module)
    with ReferenceRunner(threads=1) as runner:
        want = runner.run(module, inputs)
    got = graph(**feed(graph, inputs))
    assert list(got) == list(want)
    for name, expected in want.items():
        np.testing.assert_allclose(to_numpy(got[name]), expected, rtol=2e-5, atol=2e-5, err_msg=name)
    names = [name for name, array in inputs.items() if array.dtype == np.float32 and name not in _FIXED.get(body, "")]
    wide = {name: array.astype(np.float64) if name in names else array for name, array in inputs.items()}
    graph = to_fx(module_of(body, outputs, wide))
    doubles = [torch.tensor(wide[name], requires_grad=True) for name in names]
    rest = feed(graph, {name: array for name, array in wide.items() if name not in names})

    def run(*tensors: Any) -> tuple[Any, ...]:
        made = graph(**dict(zip(names, tensors, strict=True)), **rest)
        return tuple(tensor for tensor in made.values() if tensor.dtype == torch.float64)

    assert torch.autograd.gradcheck(run, doubles, eps=1e-6, atol=1e-5, rtol=1e-4, fast_mode=True)


_FIXED = {body: ("z",) for body, _ in GRID if "Resize" in body}
"""Inputs that steer: sizes and scales."""


@pytest.mark.slow
def test_conformance_suite() -> None:
    """Every generated model of the suite computes what the standard says, or is refused for a reason it should be."""
    wrong, refused, count = [], {}, 0
    for case in all_cases():
        if case.name.startswith("light/") or case.random or "training_dropout" in case.name:
            continue
        proto, sets = case.content
        try:
            model, _ = to_working_opset(ir.serde.deserialize_model(proto))
            graph = to_fx(Module(model))
        except UnsupportedError as error:
            refused[case.name] = str(error)
            continue
        count += 1
        for given, expected in sets:
            names = [str(value.name) for value in model.graph.inputs]
            if not _agrees(graph, dict(zip(names, given, strict=True)), expected, case):
                wrong.append(case.name)
    assert not wrong, wrong
    assert count > 1800
    accepted = ("has no rule", "at opset", "torch has no", "unknown", "unexpected keyword", "torch cannot round")
    assert all(any(word in reason for word in accepted) for reason in refused.values()), refused


def _agrees(graph: Any, inputs: Arrays, expected: list[Any], case: Any) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = graph(**feed(graph, inputs))
    return all(_same(a, b, case) for a, b in zip(got.values(), expected, strict=False))


def _same(got: Any, want: Any, case: Any) -> bool:
    if isinstance(want, list):
        return len(got) == len(want) and all(_same(a, b, case) for a, b in zip(got, want, strict=True))
    if want is None or got is None:
        return want is None and got is None
    array, want = to_numpy(got), np.asarray(want)
    narrow = want.dtype.kind == "V" or want.dtype == np.float16 or "bf16" in case.name or "fp16" in case.name
    rtol, atol = max(case.rtol, 2e-2 if narrow else 1e-4), max(case.atol, 2e-2 if narrow else 1e-5)
    if array.shape != want.shape:
        return False
    return np.allclose(array.astype(np.complex128), want.astype(np.complex128), rtol, atol, equal_nan=True)


def test_importing_training_does_not_import_torch() -> None:
    """Nor does importing any file of it, or naming its functions."""
    code = """
        import importlib, pkgutil, sys
        import mmopt.training as training
        for found in pkgutil.walk_packages(training.__path__, "mmopt.training."):
            importlib.import_module(found.name)
        for name in training.__all__:
            getattr(training, name)
        sys.exit("torch" in sys.modules)
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False).returncode == 0


def test_rules_take_no_attribute_they_do_not_know() -> None:
    """An attribute of a later operator set is refused at conversion, with the node named."""
    module = module_of("y = Relu(x)", "y", {"x": X})
    next(iter(module.graph)).attributes["slope"] = ir.AttrFloat32("slope", 0.5)
    next(iter(module.graph)).name = "the_relu"
    with pytest.raises(UnsupportedError, match=r"the_relu \(Relu\).*slope"):
        to_fx(module)


def test_an_operator_without_rule_or_definition_is_named() -> None:
    module = module_of("y = Relu(x)", "y", {"x": X})
    node = next(iter(module.graph))
    node.op_type, node.name = "TfIdfVectorizer", "words"
    with pytest.raises(UnsupportedError, match=r"words \(TfIdfVectorizer\)"):
        to_fx(module)


def test_every_rule_is_that_of_an_operator() -> None:
    """A misspelled name would never be used."""
    known = {(schema.domain, schema.name) for schema in onnx.defs.get_all_schemas_with_history()}
    assert set(rules()) <= known
