"""Parameters and arithmetic against formulas worked out by hand and against torch's counter."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from mmopt.analysis.cost import analyze_cost
from mmopt.errors import UserError
from tests.unit.tower_models import FLOAT, INT64, WIDTH, Net


def macs(net: Net, **binding: int) -> object:
    return analyze_cost(net.module(), binding).macs


def test_products_of_matrices() -> None:
    net = Net()
    x = net.input("x", FLOAT, 2, 5, 6)
    net.output(net.op("MatMul", x, net.weight(6, 7)))
    assert macs(net) == 2 * 5 * 6 * 7
    net = Net()
    net.output(net.op("Gemm", net.input("x", FLOAT, 6, 3), net.weight(7, 6), net.weight(7), transA=1, transB=1))
    assert macs(net) == 3 * 6 * 7
    net = Net()
    a, b = net.input("a", FLOAT, 2, 3, 5), net.input("b", FLOAT, 2, 4, 5)
    net.output(net.op("Einsum", a, b, equation="bik,bjk->bij"))
    assert macs(net) == 2 * 3 * 4 * 5
    net = Net()
    net.output(net.op("Einsum", net.input("a", FLOAT, 2, 3, 5), net.weight(5, 7), equation="...k, kn -> ...n"))
    assert macs(net) == 2 * 3 * 5 * 7


def test_convolutions() -> None:
    net = Net()
    x = net.input("x", FLOAT, 1, 6, 9, 9)
    net.output(net.op("Conv", x, net.weight(8, 3, 3, 3), group=2, strides=[2, 2]))
    assert macs(net) == (8 * 4 * 4) * (3 * 3 * 3)
    net = Net()
    net.output(net.op("ConvTranspose", net.input("x", FLOAT, 1, 6, 5, 5), net.weight(6, 4, 2, 2), strides=[2, 2]))
    assert macs(net) == (6 * 5 * 5) * (4 * 2 * 2)


def test_recurrence_counts_all_gates_steps_and_directions() -> None:
    net = Net()
    steps, batch, features, hidden = 7, 2, 5, 4
    x = net.input("x", FLOAT, steps, batch, features)
    net.output(net.op("GRU", x, net.weight(2, 3 * hidden, features), net.weight(2, 3 * hidden, hidden),
                      hidden_size=hidden, direction="bidirectional"))  # fmt: skip
    assert macs(net) == steps * batch * 2 * 3 * hidden * (features + hidden)


def test_attention_in_one_node() -> None:
    net = Net(opset=23)
    q, k = net.input("q", FLOAT, 2, 3, 5, 8), net.input("k", FLOAT, 2, 3, 7, 8)
    net.output(net.op("Attention", q, k, k))
    assert macs(net) == 2 * (2 * 3 * 5 * 7 * 8)


def test_flops_are_twice_the_macs_and_the_rest() -> None:
    net = Net()
    net.output(net.op("Relu", net.linear(net.input("x", FLOAT, 2, 6), 6, 7)))
    report = analyze_cost(net.module())
    assert report.flops == 2 * (2 * 6 * 7) + 2 * 7 + 2 * 7
    assert [c.flops for c in report.nodes.values()] == [2 * 2 * 6 * 7, 14, 14]


def test_moving_data_is_free() -> None:
    net = Net()
    x = net.op("Transpose", net.input("x", FLOAT, 4, 6), perm=[1, 0])
    net.output(net.op("Reshape", x, net.ints(2, 12)))
    assert analyze_cost(net.module()).flops == 0


def test_symbols_stay_until_they_are_bound() -> None:
    net = Net()
    net.output(net.attention(x := net.embed(net.input("x", INT64, "b", "s")), x))
    report = analyze_cost(net.module())
    assert report.symbols == ("b", "s")
    assert str(report.macs) == f"{2 * WIDTH}*b*s*s + {4 * WIDTH * WIDTH}*b*s"
    assert analyze_cost(net.module(), {"b": 2, "s": 3}).macs == 2 * WIDTH * 18 + 4 * WIDTH * WIDTH * 6
    with pytest.raises(UserError, match="did you mean 's'"):
        analyze_cost(net.module(), {"seq": 3})


def scan_over(length: int | str) -> Net:
    inner = Net()
    inner.output(inner.op("MatMul", inner.input("row", FLOAT, 1, 6), inner.weight(6, 4)), "out")
    net = Net()
    net.output(net.op("Scan", net.input("x", FLOAT, length, 1, 6), body=inner.graph, num_scan_inputs=1))
    return net


def test_bodies_count_as_often_as_they_run() -> None:
    assert macs(scan_over(5)) == 5 * 24
    assert str(macs(scan_over("t"))) == "24*t"


def test_loop_with_known_and_unknown_trips() -> None:
    def build(trips: int | None) -> Net:
        net = Net()
        x = net.input("x", FLOAT, 1, 4)
        count = net.input("n", INT64) if trips is None else net.constant(trips)
        inner = Net()
        inner.input("i", INT64)
        keep, carried = inner.input("keep", ir.DataType.BOOL), inner.input("carried", FLOAT, 1, 4)
        inner.output(inner.op("Identity", keep), "go_on", ir.DataType.BOOL)
        inner.output(inner.op("MatMul", carried, inner.weight(4, 4)), "next")
        net.output(net.op("Loop", count, net.constant(True), x, body=inner.graph))
        return net

    assert macs(build(3)) == 3 * 16
    report = analyze_cost(build(None).module())
    assert (report.macs, len(report.unknown)) == (0, 1)


def test_only_the_costliest_branch_counts() -> None:
    net = Net()
    x = net.input("x", FLOAT, 1, 4)
    small, large = Net(), Net(seed=1)
    small.output(small.op("Relu", x), "a")
    large.output(large.op("MatMul", x, large.weight(4, 4)), "b")
    net.output(net.op("If", net.input("c", ir.DataType.BOOL), then_branch=small.graph, else_branch=large.graph))
    assert macs(net) == 16
    assert analyze_cost(net.module()).flops == 32


def test_what_is_a_parameter() -> None:
    net = Net()
    x = net.linear(net.embed(net.input("x", INT64, 2, 5)), WIDTH, 3)
    scale = net.constant(np.array([0.1, 0.2, 0.3], np.float32))
    quantized = net.op("DequantizeLinear", net.constant(np.ones((3, 3), np.int8)), scale, axis=0)
    x = net.op("MatMul", net.op("Mul", x, net.constant(np.float32(2))), quantized)
    x = net.op("Add", x, net.constant(np.full((5, 3), -1e9, np.float32)))
    net.output(net.op("Reshape", x, net.ints(-1, 3)))
    report = analyze_cost(net.module())
    assert sorted(report.parameters.values()) == [3, 9, 3 * WIDTH, 50 * WIDTH]
    assert report.total_parameters == 12 + 53 * WIDTH


def test_unknown_shapes_are_named() -> None:
    net = Net()
    y = net.op("Mystery", net.input("x", FLOAT, 2, 3), domain="own")
    net.graph.opset_imports["own"] = 1
    net.output(net.op("MatMul", y, net.weight(3, 4)))
    report = analyze_cost(net.module())
    assert report.unknown == tuple(n.name for n in net.graph)


@pytest.mark.slow
def test_against_torch() -> None:
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    from mmopt.ir.module import Module

    layers = [torch.nn.Conv2d(3, 8, 3, 2), torch.nn.ReLU(), torch.nn.Conv2d(8, 12, 3, groups=4), torch.nn.Flatten()]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(12 * 13 * 13, 10)).eval()
    x = torch.zeros(2, 3, 32, 32)
    with FlopCounterMode(display=False) as counter:
        model(x)
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    report = analyze_cost(Module(program.model))
    assert 2 * report.macs == counter.get_total_flops()
    assert report.total_parameters == sum(p.numel() for p in model.parameters())
