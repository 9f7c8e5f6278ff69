"""The differentiable form as a graph: names, parts, bodies, functions, roundings, and weights on their way back."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from mmopt.errors import UnsupportedError, UserError  # noqa: E402
from mmopt.ir.evaluate import ReferenceRunner  # noqa: E402
from mmopt.ir.module import Module  # noqa: E402
from mmopt.training import parameter_names, to_fx, update_weights  # noqa: E402
from mmopt.training.tensors import feed, from_numpy, to_numpy  # noqa: E402

X = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)


def _module(body: str, outputs: str = "float[3, k] y", inputs: str = "float[3, 4] x", more: str = "") -> Module:
    text = f'<ir_version: 10, opset_import: ["" : 21, "my" : 1]>\ng ({inputs}) => ({outputs}) {{ {body} }}\n{more}'
    return Module(ir.serde.deserialize_model(onnx.parser.parse_model(text)))


def _with(module: Module, **constants: Any) -> Module:
    """Give the undefined names of the graph and its bodies their constants."""
    nodes = list(module.graph.all_nodes())
    values = {str(v.name): v for node in nodes for v in node.inputs if v is not None and v.producer() is None}
    for name, given in constants.items():
        tensor = given if isinstance(given, ir.TensorProtocol) else ir.tensor(np.asarray(given), name=name)
        values[name].const_value, values[name].type = tensor, ir.TensorType(tensor.dtype)
        module.graph.register_initializer(values[name])
    return module


def _square(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((4, 4)).astype(np.float32)


def _agrees(module: Module, inputs: dict[str, Any]) -> Any:
    graph = to_fx(module)
    with ReferenceRunner(threads=1) as runner:
        want = runner.run(module, inputs)
    got = graph(**feed(graph, inputs))
    for name, expected in want.items():
        np.testing.assert_allclose(to_numpy(got[name]), expected, rtol=1e-5, atol=1e-6)
    return graph


def test_parameters_have_the_names_of_initializers() -> None:
    """Also where one is the start of another, or an attribute of every module; those get a name of their own."""
    module = _module("a = MatMul(x, p)\n b = MatMul(a, q)\n c = MatMul(b, r)\n d = MatMul(c, s)\n y = MatMul(d, t)")
    module = _with(module, p=_square(1), q=_square(2), r=_square(3), s=_square(4), t=_square(5))
    new = {"p": "enc.layers.0.weight", "q": "enc.layers", "r": "forward", "s": 'odd "name"', "t": "onnx::MatMul_7"}
    for old, name in new.items():
        value = module.graph.initializers.pop(old)
        value.name = name
        module.graph.register_initializer(value)
    graph = _agrees(module, {"x": X})
    names = parameter_names(graph)
    assert sorted(names.values()) == sorted(new.values())
    assert {names[path] for path in names if path == names[path]} == {"enc.layers.0.weight", "onnx::MatMul_7"}
    with torch.no_grad():
        for parameter in graph.parameters():
            parameter.mul_(0.5)
    before = {name: v.const_value.numpy().copy() for name, v in module.graph.initializers.items()}
    assert update_weights(module, graph)
    for name, array in before.items():
        np.testing.assert_array_equal(module.graph.initializers[name].const_value.numpy(), array / 2)


def test_names_of_inputs_need_not_be_python() -> None:
    module = _module("y = Relu(x)")
    module.graph.inputs[0].name = "input.1"
    graph = to_fx(module)
    assert graph.meta["inputs"] == {"input_0": "input.1"}
    np.testing.assert_array_equal(to_numpy(graph(**feed(graph, {"input.1": X}))["y"]), np.maximum(X, 0))


def test_a_tied_weight_is_one_parameter_and_stays_one() -> None:
    module = _with(_module("a = MatMul(x, w)\n b = Transpose(w)\n y = MatMul(a, b)"), w=_square())
    graph = _agrees(module, {"x": X})
    assert [name for name, _ in graph.named_parameters()] == ["w"]
    graph(x=torch.tensor(X))["y"].sum().backward()
    w = torch.tensor(_square(), requires_grad=True)
    (torch.tensor(X) @ w @ w.t()).sum().backward()
    torch.testing.assert_close(graph.w.grad, w.grad)
    torch.optim.SGD(graph.parameters(), 0.1).step()
    update_weights(module, graph)
    assert len(module.graph.initializers) == 1
    assert len(list(module.graph.initializers["w"].uses())) == 2


def test_integers_are_buffers_and_their_tensors_stay() -> None:
    module = _with(_module("y = Gather<axis = 1>(x, i)"), i=np.array([0, 2]))
    graph = _agrees(module, {"x": X})
    assert not list(graph.parameters())
    assert [name for name, _ in graph.named_buffers()] == ["i"]
    assert not update_weights(module, graph)


def test_modules_that_share_weights_are_not_written_to() -> None:
    module = _with(_module("y = MatMul(x, w)"), w=_square())
    twin, kept = module.clone(), _square()
    graph = to_fx(module)
    with torch.no_grad():
        graph.w.zero_()
    assert update_weights(module, graph)
    assert not module.graph.initializers["w"].const_value.numpy().any()
    np.testing.assert_array_equal(twin.graph.initializers["w"].const_value.numpy(), kept)


@pytest.mark.parametrize("dtype", [ir.DataType.BFLOAT16, ir.DataType.FLOAT16])
def test_narrow_weights_come_back_narrow(dtype: ir.DataType) -> None:
    """A weight stored in few bits and widened by a Cast, the form that rounding to narrow formats leaves."""
    module = _module("wide = Cast<to = 1>(w)\n y = MatMul(x, wide)")
    module = _with(module, w=ir.Tensor(_square().astype(dtype.numpy()), dtype=dtype, name="w"))
    graph = _agrees(module, {"x": X})
    graph(x=torch.tensor(X))["y"].square().sum().backward()
    assert graph.w.grad is not None
    assert graph.w.grad.abs().max() > 0
    with torch.no_grad():
        graph.w.mul_(2)
    update_weights(module, graph)
    tensor = module.graph.initializers["w"].const_value
    assert tensor.dtype == dtype
    np.testing.assert_array_equal(
        tensor.numpy().astype(np.float32), 2 * _square().astype(dtype.numpy()).astype(np.float32)
    )


def test_a_pair_of_casts_passes_gradients_on() -> None:
    module = _module("a = Cast<to = 16>(x)\n b = Cast<to = 1>(a)\n y = Mul(b, b)")
    graph = to_fx(module)
    x = torch.tensor(X, requires_grad=True)
    graph(x=x)["y"].sum().backward()
    rounded = X.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_allclose(x.grad.numpy(), (2 * rounded).astype(ml_dtypes.bfloat16).astype(np.float32), rtol=1e-2)


def test_a_part_of_the_graph() -> None:
    """Other tensors as outputs, and others as inputs; what is not needed is left out."""
    module = _with(
        _module("a = MatMul(x, p)\n b = Tanh(a)\n c = MatMul(b, q)\n y = Relu(c)"), p=_square(1), q=_square(2)
    )
    whole = to_fx(module, ["y", "b", "a"])(x=torch.tensor(X))
    assert list(whole) == ["y", "b", "a"]
    part = to_fx(module, ["c"], ["b"])
    assert [name for name, _ in part.named_parameters()] == ["q"]
    made = part(b=whole["b"].detach())["c"]
    torch.testing.assert_close(made.relu(), whole["y"])
    torch.testing.assert_close(to_fx(module, ["p"], ["b"])(b=whole["b"])["p"], torch.tensor(_square(1)))
    with pytest.raises(UserError, match="no tensor 'd' in the main graph"):
        to_fx(module, ["d"])


BRANCHES = """
    y = If (flag) <
        then_branch = left () => (float[3, 4] l) {
            w = Constant<value = float[4] {1.0, 2.0, 3.0, 4.0}>() l = Mul(x, w)
        },
        else_branch = right () => (float[3, 4] r) {
            w2 = Constant<value = float[4] {5.0, 6.0, 7.0, 8.0}>() h = MatMul(x, p) r = Add(h, w2)
        }
    >
"""


def test_branches_run_on_the_values_at_hand_and_their_weights_train() -> None:
    module = _with(_module(BRANCHES, inputs="float[3, 4] x, bool flag"), p=_square())
    graph = to_fx(module)
    assert sorted(parameter_names(graph).values()) == ["p", "w", "w2"]
    for flag in (True, False):
        _agrees(module, {"x": X, "flag": np.array(flag)})
        graph.zero_grad()
        graph(x=torch.tensor(X), flag=torch.tensor(flag))["y"].sum().backward()
        reached = {name for name, p in graph.named_parameters() if p.grad is not None and p.grad.any()}
        assert reached == ({"w"} if flag else {"p", "w2"})
    with torch.no_grad():
        for parameter in graph.parameters():
            parameter.add_(1)
    assert update_weights(module, graph)
    _agrees(module, {"x": X, "flag": np.array(False)})
    again = to_fx(module)
    torch.testing.assert_close(again.get_parameter("w2"), torch.tensor([6.0, 7, 8, 9]))


LOOP = """
    y, rows = Loop (n, , x) <
        body = step (int64 i, bool c, float[3, 4] s) => (bool again, float[3, 4] t, float[3] row) {
            again = Identity(c) m = MatMul(s, w) t = Tanh(m)
            k = Constant<value_ints = [1]>() row = ReduceSum<keepdims = 0>(t, k)
        }
    >
"""


def test_loops_carry_states_and_gradients() -> None:
    module = _module(LOOP, "float[3, 4] y, float[k, 3] rows", "float[3, 4] x, int64 n")
    module = _with(module, w=_square() / 2)
    graph = _agrees(module, {"x": X, "n": np.array(3)})
    made = graph(x=torch.tensor(X), n=torch.tensor(3))
    made["y"].sum().backward()
    w, s = torch.tensor(_square() / 2, requires_grad=True), torch.tensor(X)
    for _ in range(3):
        s = torch.tanh(s @ w)
    s.sum().backward()
    torch.testing.assert_close(graph.w.grad, w.grad)


SCAN = """
    last, all = Scan (start, x) <num_scan_inputs = 1,
        body = step (float[4] s, float[4] r) => (float[4] t, float[4] u) { p = Mul(s, w) t = Add(p, r) u = Tanh(t) }
    >
"""


def test_scans_carry_states_and_gradients() -> None:
    module = _module(SCAN, "float[4] last, float[3, 4] all", "float[4] start, float[3, 4] x, float[4] w")
    inputs = {"start": X[0], "x": X, "w": _square()[0]}
    graph = _agrees(module, inputs)
    doubles = [torch.tensor(inputs[name].astype(np.float64), requires_grad=True) for name in inputs]
    assert torch.autograd.gradcheck(lambda *a: tuple(graph(*a).values()), doubles)


FUNCTION = """
<domain: "my", opset_import: ["" : 21]>
Twice <factor> (a, b) => (c) { f = Constant<value_float: float = @factor>() d = MatMul(a, b) e = Relu(d) c = Mul(e, f) }
"""


def test_functions_are_expanded() -> None:
    body = "h = my.Twice<factor = 2.0>(x, w)\n y = my.Twice<factor = 3.0>(h, w)"
    module = _with(_module(body, more=FUNCTION), w=_square())
    graph = _agrees(module, {"x": X})
    assert [name for name, _ in graph.named_parameters()] == ["w"]


def test_quantization_passes_gradients_inside_its_range() -> None:
    """y = s·(clip(round(x/s)) − 0): dy/dx is 1 inside, 0 outside; dy/ds is round(x/s) − x/s inside, ±limit outside."""
    module = _module("q = QuantizeLinear(x, s, z)\n y = DequantizeLinear(q, s, z)")
    module = _with(module, s=np.float32(0.01), z=np.int8(0))
    graph = _agrees(module, {"x": X})
    x = torch.tensor(X, requires_grad=True)
    graph(x=x)["y"].sum().backward()
    inside = np.abs(X / 0.01) < 127.5
    assert 0 < inside.sum() < inside.size
    np.testing.assert_array_equal(x.grad.numpy(), inside.astype(np.float32))
    exact = X / np.float32(0.01)
    limits = np.where(exact > 0, 127, -128)
    want = np.where(inside, np.rint(exact) - exact, limits).sum()
    np.testing.assert_allclose(graph.s.grad.item(), want, rtol=1e-3)


def test_integers_are_true_ones_where_something_else_reads_them() -> None:
    """A quantized tensor as an output, shifted as an integer, and moved about."""
    body = "q = QuantizeLinear(x, s, z)\n r = Transpose(q)\n w = Cast<to = 6>(r)\n"
    body += "two = Constant<value = int32 {2}>()\n v = Div(w, two)"
    module = _with(_module(body, "uint8[4, 3] r, int32[4, 3] v"), s=np.float32(0.01), z=np.uint8(128))
    graph = _agrees(module, {"x": X})
    made = graph(x=torch.tensor(X))
    assert (made["r"].dtype, made["v"].dtype) == (torch.uint8, torch.int32)


def test_refusals_name_what_is_in_the_way() -> None:
    text = _module("y = Identity(x)", "string[3] y", "string[3] x")
    with pytest.raises(UnsupportedError, match="no tensors of STRING"):
        to_fx(text)
    old = _module("y = Relu(x)")
    old.model.opset_imports[""] = 11
    with pytest.raises(UnsupportedError, match="at opset 11"):
        to_fx(old)


def test_only_the_module_it_came_from_takes_weights_back() -> None:
    module = _with(_module("y = MatMul(x, w)"), w=_square())
    other = _with(_module("y = MatMul(x, w)"), w=_square()[:, :2].copy())
    with pytest.raises(UserError, match=r"w: the parameter \[4, 4\] is \[4, 2\] in the module"):
        update_weights(other, to_fx(module))
    with pytest.raises(UserError, match="is not in the module"):
        update_weights(_module("y = Relu(x)"), to_fx(module))


@pytest.mark.parametrize(
    "name", ["float32", "int4", "uint4", "bfloat16", "float8_e4m3fn", "uint16", "bool", "complex64"]
)
def test_arrays_and_back(name: str) -> None:
    """Every type that torch has or that fits into another."""
    dtype = np.dtype(getattr(ml_dtypes, name, None) or name)
    array = np.array([0, 1, 2, 3]).astype(dtype)
    back = to_numpy(from_numpy(array), ir.DataType.from_numpy(dtype))
    assert back.dtype == dtype
    assert back.tobytes() == array.tobytes()
