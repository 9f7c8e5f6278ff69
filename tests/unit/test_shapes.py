"""Shape inference: symbolic sizes, shape arithmetic, control flow, functions, and annotations that lie."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from mmopt.analysis.dims import evaluate
from mmopt.analysis.shapes import annotate, infer_shapes, input_shapes
from mmopt.pipeline.base import PassContext
from mmopt.transforms.canonicalize import InferShapes
from tests.canonical import SIZES, check, inputs_for, module_from
from tests.canonical import evaluate as run


def shapes_of(text: str, **options: object) -> dict[str, str]:
    """Inferred shape of every value the nodes of a model make, as text."""
    module = module_from(text, **options)  # type: ignore[arg-type]
    facts = infer_shapes(module.model)
    values = [output for node in module.graph.all_nodes() for output in node.outputs]
    return {str(v.name): _text(facts.shape(v)) for v in values}


def _text(shape: tuple[object, ...] | None) -> str:
    return "?" if shape is None else "[" + ", ".join("?" if d is None else str(d) for d in shape) + "]"


DYNAMIC = {
    "heads": (
        "g (float[batch,seq,12] x) => (float[a,b,c,d] y) <int64[1] h = {3}, int64[1] k = {4}> {"
        "  s = Shape(x) b = Slice<>(s, z, o) t = Slice(s, o, two)"
        "  n = Concat<axis = 0>(b, t, h, k) y = Reshape(x, n) }",
        "y",
        "[batch, seq, 3, 4]",
    ),
    "gathered": (
        "g (float[batch,seq] x) => (float[a] y) {"
        "  s = Shape(x) b = Gather(s, zero) t = Gather(s, one) p = Mul(b, t)"
        "  u = Unsqueeze(p, z) y = Reshape(x, u) }",
        "y",
        "[batch*seq]",
    ),
    "doubled": (
        "g (float[batch,seq] x) => (float[a] y) {"
        "  s = Shape(x) t = Gather(s, one) d = Add(t, t) u = Unsqueeze(d, z) y = ConstantOfShape(u) }",
        "y",
        "[2*seq]",
    ),
    "range": (
        "g (float[batch,seq] x) => (int64[a] y) { s = Shape(x) t = Gather(s, one) y = Range(zero, t, one) }",
        "y",
        "[seq]",
    ),
    "halves": (
        "g (float[batch,seq] x) => (float[a,b] y) {"
        "  s = Shape(x) t = Gather(s, one) d = Div(t, two0) u = Unsqueeze(d, z) y = Slice(x, z, u, o) }",
        "y",
        "[batch, seq//2]",
    ),
    "cast-and-scaled": (
        "g (float[batch,seq] x) => (float[a] y) <float f = {2.0}> {"
        "  s = Shape(x) t = Gather(s, one) c = Cast<to = 1>(t) m = Mul(c, f) w = Floor(m) i = Cast<to = 7>(w)"
        "  u = Unsqueeze(i, z) y = ConstantOfShape(u) }",
        "y",
        "[2*seq]",
    ),
    "minus-one": (
        "g (float[batch,seq,4] x) => (float[a,b] y) <int64[2] t = {-1, 4}> { y = Reshape(x, t) }",
        "y",
        "[batch*seq, 4]",
    ),
    "cut-last": (
        "g (float[batch,seq] x) => (float[a,b] y) <int64[1] m = {-1}> { y = Slice(x, z, m, o) }",
        "y",
        "[batch, Max(0, seq - 1)]",
    ),
    "conv": (
        "g (float[batch,3,seq] x) => (float[a,b,c] y) <float[2,3,3] w = {"
        + ",".join(["0.5"] * 18)
        + "}> { y = Conv<strides = [2], pads = [1, 1]>(x, w) }",
        "y",
        "[batch, 2, (seq + 1)//2]",
    ),
    "same-by-where": (
        "g (float[batch,seq] x) => (float[a,b] y) <int64[2] m = {-1, -1}> {"
        "  s = Shape(x) e = Equal(s, m) k = Where(e, m, s) y = Expand(x, k) }",
        "y",
        "[batch, seq]",
    ),
    "clipped-positions": (
        "g (float[batch,seq,2] x) => (float[a,b,c] y) <float[1,4,2] p = {1.0,1.0,1.0,1.0,1.0,1.0,1.0,1.0}> {"
        "  s = Shape<start = 1, end = 2>(x) q = Slice(p, z, s, o) y = Add(x, q) }",
        "y",
        "[batch, seq, 2]",
    ),
}

_COMMON = "int64 zero = {0}, int64 one = {1}, int64 two0 = {2}, int64[1] z = {0}, int64[1] o = {1}, int64[1] two = {2}"


def _with_constants(text: str) -> str:
    if "<int64" in text or "<float[" in text or "<float f" in text:
        head, brace, rest = text.partition(" {")
        return (
            f"{head[:-1]}, {_COMMON}>{brace}{rest}"
            if head.endswith(">")
            else text.replace("> {", f", {_COMMON}> {{", 1)
        )
    return text.replace(" {", f" <{_COMMON}> {{", 1)


@pytest.mark.parametrize(("text", "value", "want"), DYNAMIC.values(), ids=DYNAMIC)
def test_follows_shape_arithmetic(text: str, value: str, want: str) -> None:
    text = _with_constants(text.replace("Slice<>", "Slice"))
    assert shapes_of(text)[value] == want
    # The oracle: onnxruntime makes exactly this shape.
    module = module_from(text)
    sizes = {**SIZES, "seq": 4}
    actual = run(module, inputs_for(module, sizes=sizes))["y"].shape
    shape = infer_shapes(module.model).shape(module.graph.outputs[0])
    assert shape is not None
    assert tuple(evaluate(dim, sizes) for dim in shape if dim is not None) == actual


def test_branches_agree_where_they_can() -> None:
    text = (
        "g (float[batch,4] x, bool c) => (float[a,b] y) { y = If (c) <"
        " then_branch = t () => (float[p,q] p) { p = Relu(x) },"
        " else_branch = e () => (float[r,s] r) { r = Concat<axis = 1>(x, x) }> }"
    )
    shapes = shapes_of(text)
    assert shapes["y"] == "[batch, ?]"
    assert shapes["p"] == "[batch, 4]"
    assert shapes["r"] == "[batch, 8]"


LOOP = (
    "g (float[batch] x, int64 n) => (float[a] y, float[b,c] z) <bool t = {{1}}> {{"
    " y, z = Loop(n, t, x) <body = b (int64 i, bool c, float[s] h) => (bool d, float[u] k, float[v] o) {{"
    "  d = Identity(c) k = {step} o = Relu(h) }}> }}"
)


def test_loop_keeps_a_shape_that_its_body_keeps() -> None:
    shapes = shapes_of(LOOP.format(step="Neg(h)"))
    assert shapes["y"] == "[batch]"
    assert shapes["z"] == "[?, batch]"
    assert shapes["o"] == "[batch]"


def test_loop_widens_a_shape_that_grows_and_disbelieves_annotations_inside() -> None:
    module = module_from(LOOP.format(step="Concat<axis = 0>(h, x)"))
    body = next(graph for graph in module.model.graphs() if graph is not module.graph)
    body.outputs[2].shape = ir.Shape([2])
    facts = infer_shapes(module.model)
    assert _text(facts.shape(module.graph.outputs[0])) == "[?]"
    annotate(module.model, facts)
    assert str(body.outputs[2].shape) == "[None]"


def test_scan_slices_inputs_and_stacks_outputs() -> None:
    text = (
        "g (float[4] h, float[seq,4] x) => (float[a] y, float[b,c] z) {"
        " y, z = Scan<num_scan_inputs = 1, body = b (float[p] s, float[q] e) => (float[r] n, float[t] o) {"
        "  n = Add(s, e) o = Relu(n) }>(h, x) }"
    )
    shapes = shapes_of(text)
    assert shapes["y"] == "[4]"
    assert shapes["z"] == "[seq, 4]"
    assert shapes["n"] == "[4]"


def test_calls_of_local_functions_are_followed() -> None:
    module = module_from(
        "g (float[batch,6] x) => (float[a,b] y) { y = my.twice<axis = 1>(x) }\n"
        '<domain: "my", opset_import: ["" : 18]>\n'
        "twice<axis>(a) => (b) { b = Concat<axis : int = @axis>(a, a) }",
        domains=', "my" : 1',
    )
    assert _text(infer_shapes(module.model).shape(module.graph.outputs[0])) == "[batch, 12]"


def test_input_sizes_without_a_name_get_one() -> None:
    module = module_from("g (float[batch,?] x, float[?] x_d1) => (float[a,b] y) { y = Relu(x) }".replace("?", "q"))
    module.graph.inputs[0].shape = ir.Shape(["batch", None])
    module.graph.inputs[1].shape = ir.Shape([None])
    shapes = [_text(shape) for shape in input_shapes(module.model).values()]
    assert shapes == ["[batch, x_d1]", "[x_d1_d0]"]
    assert _text(infer_shapes(module.model).shape(module.graph.outputs[0])) == "[batch, x_d1]"


def test_overridable_initializer_is_not_constant() -> None:
    module = module_from("g (float[2,3] x, int64[2] s = {3, 2}) => (float[a,b] y) { y = Reshape(x, s) }")
    assert _text(infer_shapes(module.model).shape(module.graph.outputs[0])) == "[?, ?]"


def test_large_weights_are_not_read() -> None:
    def unread() -> ir.TensorProtocol:
        raise AssertionError("a weight was read")

    module = module_from("g (float[batch,4] x) => (float[a,b] y) <float[4,9] w> { y = MatMul(x, w) }")
    weight = module.graph.node(0).inputs[1]
    assert weight is not None
    weight.const_value = ir.LazyTensor(unread, dtype=ir.DataType.FLOAT, shape=ir.Shape([4, 9]), name="w")
    module.graph.register_initializer(weight)
    assert _text(infer_shapes(module.model).shape(module.graph.outputs[0])) == "[batch, 9]"


def test_unknown_operator_is_believed_and_known_ones_are_not() -> None:
    module = module_from(
        "g (float[batch,4] x) => (float[a,b] y) <float[7,8] u, float[5] r>"
        " { u = other.Magic(x) r = Relu(u) s = Relu(x) y = Neg(r) }",
        domains=', "other" : 1',
    )
    module.graph.node(2).outputs[0].shape = ir.Shape([99])
    facts = infer_shapes(module.model)
    outputs = {str(o.name): _text(facts.shape(o)) for node in module.graph for o in node.outputs}
    assert outputs == {"u": "[7, 8]", "r": "[7, 8]", "s": "[batch, 4]", "y": "[7, 8]"}


STALE = "g (float[batch,4] x) => (float[batch,4] y) <float[2,4] a, float[7] b> { a = Relu(x) b = Exp(a) y = Neg(b) }"


def test_stale_annotations_are_corrected_with_a_remark() -> None:
    module = module_from(STALE)
    context = check(InferShapes(), module)
    assert [str(node.outputs[0].shape) for node in module.graph] == ["[batch,4]"] * 3
    assert ["'a'" in r.message or "'b'" in r.message for r in context.remarks] == [True, True]


def test_annotation_fills_what_inference_cannot_know() -> None:
    module = module_from("g (float[3,4] x) => (int64[a,b] y) <int64[2,hits] i> { i = NonZero(x) y = Neg(i) }")
    assert infer_shapes(module.model).shape(module.graph.node(0).outputs[0]) == (2, None)
    InferShapes().run(module, PassContext())
    assert str(module.graph.node(0).outputs[0].shape) == "[2,hits]"


def test_inputs_and_outputs_keep_what_they_say() -> None:
    module = module_from("g (float[batch,4] x) => (float[q,r] y) { a = Relu(x) y = Neg(a) }")
    check(InferShapes(), module)
    assert str(module.graph.outputs[0].shape) == "[q,r]"


def test_malformed_node_makes_its_output_unknown_and_nothing_else() -> None:
    module = module_from("g (float[3,4] x) => (float[a] y) { a = Transpose<perm = [0, 7]>(x) y = Relu(x) }")
    facts = infer_shapes(module.model)
    assert facts.shape(module.graph.node(0).outputs[0]) is None
    assert facts.shape(module.graph.node(1).outputs[0]) == (3, 4)


def test_numbers_that_would_overflow_are_not_followed() -> None:
    text = "g (float[seq] x) => (int64[1] y) <int64[1] c = {9223372036854775807}> { y = Add(c, c) }"
    module = module_from(text)
    assert infer_shapes(module.model).elements(module.graph.outputs[0]) == (None,)
