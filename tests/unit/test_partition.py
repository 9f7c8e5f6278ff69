"""Which engine runs which node, and what crosses between them."""

from __future__ import annotations

import pathlib

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import mmopt
from mmopt.errors import UnsupportedError
from mmopt.ir.expand import contradiction, instantiate, standard_body
from mmopt.lowering.grouping import Group, absorbed, grouped, reads
from tests.native import compiled

HEAD = '<ir_version: 9, opset_import: ["" : 18]>'
RANDOM = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def graph_of(text: str) -> ir.Graph:
    return ir.from_proto(onnx.parser.parse_model(text)).graph


SEQUENCE = f"""{HEAD}
g (float[N,4] x) => (float[M,4] y, float[4,N] z) {{
  w = Constant<value = float[4,4] {{{", ".join(str(n / 10) for n in range(16))}}}>()
  e = MatMul(x, w)
  t = Transpose<perm = [1, 0]>(e)
  s = SequenceConstruct(e, x)
  c = ConcatFromSequence<axis = 0>(s)
  q = MatMul(c, w)
  shape = Shape(q)
  y = Reshape(q, shape)
  z = Tanh(t)
}}"""


def test_native_code_around_a_sequence() -> None:
    found = compiled(SEQUENCE, {"x": floats(5, 4)}, {"x": floats(1, 4)})
    assert found.kinds == ["native", "onnxruntime", "native"]
    assert any(note.startswith("main: SequenceConstruct") and "no lowering" in note for note in found.notes)


def test_every_node_that_falls_back_is_named_with_its_reason() -> None:
    notes = compiled(SEQUENCE, {"x": floats(5, 4)}).notes
    assert len(notes) == 2
    assert "'SequenceConstruct" in notes[0]
    assert "ConcatFromSequence" in notes[1]


def test_cheap_nodes_between_two_foreign_ones_go_with_them() -> None:
    found = compiled(
        f"""{HEAD}
        g (float[N,4] x) => (float[M,4] y) {{
          s = SequenceConstruct(x, x)
          c = ConcatFromSequence<axis = 0>(s)
          r = Relu(c)
          a = Add(r, r)
          u = SequenceConstruct(a, x)
          y = ConcatFromSequence<axis = 0>(u)
        }}""",
        {"x": floats(5, 4)},
    )
    assert found.kinds == ["onnxruntime"]
    assert any("2 nodes run with them" in note and "Relu" in note for note in found.notes)


def test_sizes_reach_a_native_part_as_sizes() -> None:
    """The reshape in the last part needs its target at compile time; the nodes that work it out are in the first."""
    found = compiled(
        f"""{HEAD}
        g (float[N,2,6] x) => (float[N,12] y) {{
          w = Constant<value = float[6,6] {{{", ".join(str(n / 36) for n in range(36))}}}>()
          n = Shape<start = 0, end = 1>(x)
          k = Constant<value = int64[1] {{12}}>()
          target = Concat<axis = 0>(n, k)
          e = MatMul(x, w)
          s = SequenceConstruct(e, e)
          i = Constant<value = int64 {{1}}>()
          c = SequenceAt(s, i)
          q = MatMul(c, w)
          y = Reshape(q, target)
        }}""",
        {"x": floats(3, 2, 6)},
        {"x": floats(1, 2, 6)},
    )
    assert found.kinds == ["native", "onnxruntime", "native"]


def test_a_foreign_body_gets_what_it_captures() -> None:
    found = compiled(
        f"""{HEAD}
        g (float[N,4] x, bool c) => (float[M,4] y) {{
          w = Constant<value = float[4,4] {{{", ".join(str(n / 10) for n in range(16))}}}>()
          e = MatMul(x, w)
          s = If (c) <then_branch = a () => (seq(float[N,4]) p) {{ p = SequenceConstruct(e) }},
                      else_branch = b () => (seq(float[N,4]) q) {{ q = SequenceConstruct(e, e, w) }}>
          y = ConcatFromSequence<axis = 0>(s)
        }}""",
        {"x": floats(5, 4), "c": np.array(True)},
        {"x": floats(5, 4), "c": np.array(False)},
    )
    assert found.kinds == ["native", "onnxruntime"]


def test_outputs_that_are_inputs_or_weights() -> None:
    found = compiled(
        f"{HEAD} g (float[N,4] x) => (float[N,4] x, float[2] k) <float[2] k = {{1.0, 2.0}}> {{}}", {"x": floats(5, 4)}
    )
    assert found.kinds == ["native"]
    np.testing.assert_array_equal(found.outputs[0]["k"], np.array([1, 2], np.float32))


def test_nothing_to_compute() -> None:
    x = floats(2, 3)
    found = compiled(f"{HEAD} g (float[N,3] x) => (float[N,3] x) {{}}", {"x": x})
    assert found.kinds == []
    np.testing.assert_array_equal(found.outputs[0]["x"], x)


def test_an_input_with_a_default_is_that_default() -> None:
    model = onnx.parser.parse_model(
        f"{HEAD} g (float[N,2] x) => (float[N,2] y) <float[2] k = {{1.0, 2.0}}> {{ y = Add(x, k) }}"
    )
    model.graph.input.append(onnx.helper.make_tensor_value_info("k", onnx.TensorProto.FLOAT, [2]))
    assert compiled(model, {"x": floats(3, 2)}).kinds == ["native"]


def test_what_runs_nowhere_is_refused_by_name(tmp_path: pathlib.Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 18, "nowhere" : 1]>'
        " g (float[N,2] x) => (float[N,2] y) { e = Exp(x)  y = nowhere.Magic(e) }"
    )
    model.graph.node[1].name = "the_magic"
    module = mmopt.load(ir.from_proto(model))
    with pytest.raises(UnsupportedError, match=r"Magic 'the_magic'.*no lowering.*onnxruntime refuses") as caught:
        mmopt.compile(module, output=tmp_path / "a.mmopt", entries={})
    assert caught.value.exit_code == 4
    assert not (tmp_path / "a.mmopt").exists()


def test_a_local_function_with_attributes_is_lowered_for_each_call() -> None:
    found = compiled(
        """<ir_version: 9, opset_import: ["" : 18, "my" : 1]>
        g (float[N,4] x, float low) => (float[N,4] y, float[N,4] z) {
          y = my.Leak<slope = 0.5>(x)
          z = my.Leak(x, low)
        }
        <opset_import: ["" : 18], domain: "my">
        Leak <slope: float = 0.25> (a, b) => (c) {
          l = LeakyRelu<alpha: float = @slope>(a)
          c = Clip(l, b)
        }""",
        {"x": floats(3, 4), "low": np.array(0.1, np.float32)},
    )
    assert found.kinds == ["native"]


# -- grouping ----------------------------------------------------------------------------------------------------------

LADDER = f"""{HEAD}
g (float[4] x) => (float[4] y) {{
  a = Exp(x)
  b = Sin(a)
  c = Exp(x)
  d = Sin(c)
  e = Exp(b)
  f = Add(d, e)
  y = Sin(f)
}}"""


def test_as_few_groups_as_the_order_allows() -> None:
    graph = graph_of(LADDER)
    groups = grouped(graph, {n for n in graph if n.op_type == "Sin"})
    assert [(g.native, [n.op_type for n in g.nodes]) for g in groups] == [
        (True, ["Exp", "Exp"]),
        (False, ["Sin", "Sin"]),
        (True, ["Exp", "Add"]),
        (False, ["Sin"]),
    ]
    _check_order(graph, groups)


def _check_order(graph: ir.Graph, groups: list[Group]) -> None:
    done: set[ir.Value] = set(graph.inputs)
    for group in groups:
        for node in group.nodes:
            assert all(v in done or v.const_value is not None for v in reads(node))
            done.update(node.outputs)
    assert sum(len(g.nodes) for g in groups) == len(graph)


def test_random_graphs_are_grouped_in_order() -> None:
    random = np.random.default_rng(1)
    for _ in range(50):
        values = [ir.Value(name="x")]
        nodes = []
        for n in range(20):
            inputs = [values[random.integers(len(values))] for _ in range(2)]
            nodes.append(ir.node("Add", inputs, outputs=[ir.Value(name=f"v{n}")]))
            values.append(nodes[-1].outputs[0])
        graph = ir.Graph(values[:1], values[-1:], nodes=nodes)
        foreign = {n for n in nodes if random.random() < 0.4}
        groups = grouped(graph, foreign)
        _check_order(graph, groups)
        assert all((n not in foreign) == g.native for g in groups for n in g.nodes)
        _check_order(graph, absorbed(groups, graph))


def test_a_costly_native_group_is_not_absorbed() -> None:
    graph = graph_of(
        f"""{HEAD} g (float[4,4] x) => (float[4,4] y) {{
          a = Sin(x)
          b = MatMul(a, a)
          c = Sin(b)
          d = Shape(c)
          y = Reshape(c, d)
        }}"""
    )
    groups = absorbed(grouped(graph, {n for n in graph if n.op_type == "Sin"}), graph)
    assert [[n.op_type for n in g.nodes] for g in groups] == [["Sin"], ["MatMul"], ["Sin", "Shape", "Reshape"]]


# -- definitions of the standard ---------------------------------------------------------------------------------------


def _node(text: str) -> ir.Node:
    return graph_of(text)[-1]


def test_a_definition_binds_attributes_and_defaults() -> None:
    node = _node(f"{HEAD} g (float[4] x) => (float[4] y) {{ y = Shrink<bias = 0.25>(x) }}")
    body = standard_body(node, 18)
    assert body is not None
    values = {n.attributes["value_float"].as_float() for n in body if "value_float" in n.attributes}
    assert values == {0.25, 0.5}  # lambd is 0.5 by default
    assert not any(a.is_ref() for n in body for a in n.attributes.values())


def test_a_definition_that_depends_on_types() -> None:
    node = _node(f"{HEAD} g (float16[2,3] x, float16[3] w) => (float16[2,3] y) {{ y = LayerNormalization(x, w) }}")
    body = standard_body(node, 18)
    assert body is not None
    assert [o.name for o in body.outputs] == ["Y"]
    assert all(len([v for v in n.inputs if v is not None]) <= 2 for n in body if n.op_type == "Add")
    assert any(n.op_type == "Cast" and n.attributes["to"].as_int() == ir.DataType.FLOAT16 for n in body)


def test_no_definition_for_a_primitive_operator() -> None:
    assert standard_body(_node(f"{HEAD} g (float[4] x) => (float[4] y) {{ y = Exp(x) }}"), 18) is None


def test_an_absent_input_is_absent_in_the_body() -> None:
    node = _node(f"{HEAD} g (float[2,3] x) => (float y) {{ y = ReduceL1<keepdims = 0>(x) }}")
    body = standard_body(node, 18)
    assert body is not None
    reduce = next(n for n in body if n.op_type == "ReduceSum")
    assert [v is None for v in reduce.inputs] == [False, True]
    assert reduce.attributes["keepdims"].as_int() == 0


def test_a_function_without_parameters_is_not_copied() -> None:
    model = ir.from_proto(
        onnx.parser.parse_model(
            """<ir_version: 9, opset_import: ["" : 18, "my" : 1]> g (float[4] x) => (float[4] y) { y = my.F(x) }
            <opset_import: ["" : 18], domain: "my"> F (a) => (b) { b = Exp(a) }"""
        )
    )
    function = next(iter(model.functions.values()))
    assert instantiate(function, model.graph[0]) is function


def test_calls_of_local_functions_in_a_body_are_native() -> None:
    found = compiled(
        """<ir_version: 9, opset_import: ["" : 18, "my" : 1]>
        g (float[4] x, bool c) => (float[4] y) {
          y = If (c) <
            then_branch = a () => (float[4] p) { e = my.Twice(x) p = Exp(e) },
            else_branch = b () => (float[4] q) { q = Neg(x) }>
        }
        <opset_import: ["" : 18], domain: "my">
        Twice (x) => (z) { z = Add(x, x) }""",
        {"x": floats(4), "c": np.array(True)},
    )
    assert found.kinds == ["native"]


def test_contradictions_are_those_of_the_standard() -> None:
    node = _node(f"{HEAD} g (float[2,3] x, float[2,3] w) => (float[1,2,3] y) {{ y = Conv(x, w) }}")
    type_ = ir.TensorType(ir.DataType.FLOAT)
    flat, image = ir.TypeAndShape(type_, ir.Shape([2, 3])), ir.TypeAndShape(type_, ir.Shape([1, 2, None]))
    assert contradiction(node, 18, [flat, image])
    assert not contradiction(node, 18, [image, image])
