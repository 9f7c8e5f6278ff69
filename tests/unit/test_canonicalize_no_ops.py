"""Rules that drop or join local nodes: each fires, must not fire on near misses, and keeps every bit."""

from __future__ import annotations

import pytest

from mmopt.transforms.canonicalize import (
    ComposeTransposes,
    ConstantTargets,
    MergeCasts,
    MergeReshapes,
    RemoveNoOps,
    RemoveTrainingLeftovers,
    SimplifyArithmetic,
)
from tests.canonical import check, module_from, ops

X = "float[batch,3,4] x"
Y = "float[batch,3,4] y"


def graph(body: str, inputs: str = X, outputs: str = Y, weights: str = "") -> str:
    return f"g ({inputs}) => ({outputs}) {f'<{weights}>' if weights else ''} {{ {body} }}"


NO_OPS = {
    "identity": "a = Identity(x) y = Relu(a)",
    "cast": "a = Cast<to = 1>(x) y = Relu(a)",
    "cast-like": "a = CastLike(x, x) y = Relu(a)",
    "transpose": "a = Transpose<perm = [0, 1, 2]>(x) y = Relu(a)",
    "expand": "s = Shape(x) a = Expand(x, s) y = Relu(a)",
    "reshape": "s = Shape(x) a = Reshape(x, s) y = Relu(a)",
    "concat-of-one": "a = Concat<axis = 1>(x) y = Relu(a)",
    "sum-of-one": "a = Sum(x) y = Relu(a)",
    "split-in-one": "a = Split<axis = 1, num_outputs = 1>(x) y = Relu(a)",
}


@pytest.mark.parametrize("body", NO_OPS.values(), ids=NO_OPS)
def test_node_that_changes_nothing_goes(body: str) -> None:
    module = module_from(graph(body))
    check(RemoveNoOps(), module)
    assert [op for op in ops(module) if op != "Shape"] == ["Relu"]


WITH_CONSTANT = {
    "tile": ("a = Tile(x, c) y = Relu(a)", "int64[3] c = {1, 1, 1}"),
    "pad": ("a = Pad(x, c) y = Relu(a)", "int64[6] c = {0, 0, 0, 0, 0, 0}"),
    "slice": ("a = Slice(x, b, e, s) y = Relu(a)", "int64[1] b = {0}, int64[1] e = {9}, int64[1] s = {1}"),
    "slice-of-symbolic-axis": ("a = Slice(x, b, e) y = Relu(a)", "int64[1] b = {0}, int64[1] e = {2147483647}"),
    "reshape-zero": ("a = Reshape(x, c) y = Relu(a)", "int64[3] c = {0, 3, 4}"),
    "reshape-rest": ("a = Reshape(x, c) y = Relu(a)", "int64[3] c = {-1, 3, 4}"),
    "concat-empty": ("a = Concat<axis = 1>(x, c) y = Relu(a)", "float[2,0,4] c = {}"),
}


@pytest.mark.parametrize(("body", "weights"), WITH_CONSTANT.values(), ids=WITH_CONSTANT)
def test_node_that_changes_nothing_by_its_constants_goes(body: str, weights: str) -> None:
    module = module_from(graph(body, weights=weights))
    check(RemoveNoOps(), module)
    assert ops(module) == ["Relu"]


KEPT = {
    "cast-that-rounds": ("a = Cast<to = 10>(x) y = Cast<to = 1>(a)", ""),
    "transpose": ("a = Transpose<perm = [0, 2, 1]>(x) y = Transpose<perm = [0, 2, 1]>(a)", ""),
    "tile": ("a = Tile(x, c) y = Slice(a, b, e, b)", "int64[3] c = {2, 1, 1}, int64[1] b = {0}, int64[1] e = {2}"),
    "slice-that-cuts": ("a = Slice(x, b, e, b) y = Concat<axis = 0>(a, a)", "int64[1] b = {0}, int64[1] e = {1}"),
    "slice-backwards": (
        "y = Slice(x, b, e, z, s)",
        "int64[1] b = {-1}, int64[1] e = {-9}, int64[1] z = {0}, int64[1] s = {-1}",
    ),
    "pad": (
        "a = Pad(x, c) y = Slice(a, b, e, b)",
        "int64[6] c = {0, 0, 0, 1, 0, 0}, int64[1] b = {0}, int64[1] e = {2}",
    ),
    "concat-of-two": ("a = Concat<axis = 0>(x, x) y = Slice(a, b, e, b)", "int64[1] b = {0}, int64[1] e = {2}"),
    "clip-makes-infinity-finite": ("y = Clip(x)", ""),
}


@pytest.mark.parametrize(("body", "weights"), KEPT.values(), ids=KEPT)
def test_near_miss_stays(body: str, weights: str) -> None:
    module = module_from(graph(body, weights=weights))
    before = ops(module)
    check(RemoveNoOps(), module, fires=False)
    assert ops(module) == before


def test_reshape_by_runtime_target_stays_though_annotated_alike() -> None:
    """The annotation of an output proves nothing: the target decides."""
    module = module_from(
        "g (float[2,6] x, int64[2] s) => (float[2,6] y) <float[2,6] a> { a = Reshape(x, s) y = Relu(a) }"
    )
    module.graph.node(0).outputs[0].shape = module.graph.inputs[0].shape
    check(RemoveNoOps(), module, fires=False, run=False)
    check(ConstantTargets(), module, fires=False, run=False)


def test_input_handed_to_output_keeps_one_identity() -> None:
    module = module_from(graph("a = Identity(x) b = Identity(a) y = Identity(b)"))
    check(RemoveNoOps(), module)
    assert ops(module) == ["Identity"]


def test_no_op_between_input_and_output_becomes_identity() -> None:
    module = module_from(graph("y = Transpose<perm = [0, 1, 2]>(x)"))
    check(RemoveNoOps(), module)
    assert ops(module) == ["Identity"]


def test_initializer_as_output_stays() -> None:
    module = module_from("g () => (float[2] w, float[2] y) <float[2] w = {1.0, 2.0}> { y = Identity(w) }")
    check(RemoveNoOps(), module, fires=False)
    assert [value.name for value in module.graph.outputs] == ["w", "y"]


def test_one_value_for_two_outputs_keeps_both_names() -> None:
    module = module_from(graph("a = Relu(x) y = Identity(a) z = Identity(a)", outputs=f"{Y}, float[batch,3,4] z"))
    check(RemoveNoOps(), module)
    assert ops(module) == ["Relu", "Identity"]
    assert [value.name for value in module.graph.outputs] == ["y", "z"]


def test_identity_of_an_outer_value_as_a_branch_result_stays() -> None:
    """A body must make its own outputs: naming a value of the graph around it is not ONNX."""
    module = module_from(
        "g (float[3] x, bool c) => (float[3] y) { a = Exp(x)"
        "  y = If (c) <then_branch = t () => (float[3] p) { p = Identity(a) },"
        "              else_branch = e () => (float[3] q) { r = Identity(a) q = Neg(r) }> }"
    )
    check(RemoveNoOps(), module)
    assert ops(module) == ["Exp", "If", "Identity", "Neg"]


TRANSPOSES = {
    "cancel": ("[0, 2, 1]", "[0, 2, 1]", ["Relu"]),
    "compose": ("[1, 0, 2]", "[0, 2, 1]", ["Transpose", "Relu"]),
    "rotate-back": ("[1, 2, 0]", "[2, 0, 1]", ["Relu"]),
}


@pytest.mark.parametrize(("first", "second", "left"), TRANSPOSES.values(), ids=TRANSPOSES)
def test_transposes_compose(first: str, second: str, left: list[str]) -> None:
    module = module_from(
        graph(
            f"a = Transpose<perm = {first}>(x) b = Transpose<perm = {second}>(a) y = Relu(b)",
            "float[n,n,n] x",
            "float[n,n,n] y",
        )
    )
    check(ComposeTransposes(), module)
    assert ops(module)[-len(left) :] == left


AROUND_UNITS = {
    "back-in-order": ("float[m,6,n] x", "[1, 0, 2]", "[1, 6, -1, 8]", "[0, 2, 1, 3]", ["Reshape", "Relu"]),
    "moved": (
        "float[m,6,n] x",
        "[1, 0, 2]",
        "[1, 6, -1, 8]",
        "[3, 0, 1, 2]",
        ["Transpose", "Reshape", "Transpose", "Relu"],
    ),
    "split-axis": (
        "float[m,6,n] x",
        "[1, 0, 2]",
        "[3, 2, -1, 8]",
        "[2, 0, 1, 3]",
        ["Transpose", "Reshape", "Transpose", "Relu"],
    ),
    "drops-units": ("float[5,1,7] x", "[1, 2, 0]", "[7, 5]", "[1, 0]", ["Reshape", "Relu"]),
}


@pytest.mark.parametrize(("x", "first", "middle", "second", "left"), AROUND_UNITS.values(), ids=AROUND_UNITS)
def test_transposes_around_axes_of_one_element(x: str, first: str, middle: str, second: str, left: list[str]) -> None:
    rank = len(middle.split(","))
    text = (
        f"g ({x.replace('n', '8')}) => (float[{','.join('abcd'[:rank])}] y)"
        f" <int64[{rank}] s = {{{middle[1:-1]}}}>"
        f" {{ a = Transpose<perm = {first}>(x) b = Reshape(a, s) c = Transpose<perm = {second}>(b) y = Relu(c) }}"
    )
    module = module_from(text)
    check(ComposeTransposes(), module, fires=left[0] == "Reshape")
    assert ops(module)[-len(left) :] == left


def test_transpose_of_a_shared_transpose_leaves_the_other_reader() -> None:
    body = "a = Transpose<perm = [0, 2, 1]>(x) b = Transpose<perm = [0, 2, 1]>(a) y = Relu(b) z = Exp(a)"
    module = module_from(graph(body, outputs=f"{Y}, float[batch,4,3] z"))
    check(ComposeTransposes(), module)
    assert ops(module) == ["Transpose", "Relu", "Exp"]


def test_default_transposes_cancel() -> None:
    module = module_from(graph("a = Transpose(x) b = Transpose(a) y = Relu(b)"))
    check(ComposeTransposes(), module)
    assert ops(module)[-1] == "Relu"
    assert module.graph.node(len(module.graph) - 1).inputs[0] is module.graph.inputs[0]


RESHAPES = {
    "reshape-of-reshape": (
        "a = Reshape(x, s) b = Reshape(a, t) y = Relu(b)",
        "int64[2] s = {-1, 12}, int64[3] t = {-1, 4, 3}",
        "float[batch,4,3] y",
        ["Relu", "Reshape"],
    ),
    "back-to-the-start": (
        "a = Reshape(x, s) b = Reshape(a, t) c = Relu(b) y = Exp(c)",
        "int64[2] s = {-1, 12}, int64[3] t = {-1, 3, 4}",
        Y,
        ["Exp", "Relu"],
    ),
    "squeeze-of-unsqueeze": ("a = Unsqueeze(x, s) b = Squeeze(a, s) y = Relu(b)", "int64[1] s = {1}", Y, ["Relu"]),
    "flatten-of-reshape": (
        "f = Flatten<axis = 1>(x) g = Reshape(f, s) h = Flatten<axis = 1>(g) y = Relu(h)",
        "int64[4] s = {0, 3, 2, 2}",
        "float[batch,12] y",
        ["Relu", "Reshape"],
    ),
    "unsqueeze-of-unsqueeze": (
        "a = Unsqueeze(x, s) b = Unsqueeze(a, t) y = Relu(b)",
        "int64[1] s = {1}, int64[2] t = {0, 3}",
        "float[1,batch,1,1,3,4] y",
        ["Relu", "Unsqueeze"],
    ),
}


@pytest.mark.parametrize(("body", "weights", "outputs", "left"), RESHAPES.values(), ids=RESHAPES)
def test_reshapes_merge(body: str, weights: str, outputs: str, left: list[str]) -> None:
    module = module_from(graph(body, weights=weights, outputs=outputs))
    check(MergeReshapes(), module)
    value = module.graph.outputs[0]
    path = []
    while (node := value.producer()) is not None:
        path.append(node.op_type)
        value = node.inputs[0]
    assert path == left


def test_zero_that_copies_a_size_in_between_stays() -> None:
    """The 0 of the second target copies the 6 made by the first."""
    module = module_from(
        graph(
            "a = Reshape(x, s) b = Reshape(a, t) y = Relu(b)",
            "float[2,3,4] x",
            "float[6,2,2] y",
            "int64[2] s = {6, 4}, int64[3] t = {0, 2, 2}",
        )
    )
    check(MergeReshapes(), module, fires=False)


def test_cast_there_and_back_goes() -> None:
    module = module_from(graph("a = Cast<to = 11>(x) b = Cast<to = 1>(a) y = Relu(b)"))
    check(MergeCasts(), module)
    assert module.graph.node(len(module.graph) - 1).inputs[0] is module.graph.inputs[0]


LOSSY_CASTS = {
    "float-to-half": ("float", 10, "float", 1),
    "float-to-bfloat16": ("float", 16, "float", 1),
    "float-to-int": ("float", 6, "float", 1),
    "int64-to-int32": ("int64", 6, "int64", 7),
    "int32-to-float": ("int32", 1, "int32", 6),
    "int32-to-bool": ("int32", 9, "int32", 6),
}


@pytest.mark.parametrize(("source", "middle", "target", "to"), LOSSY_CASTS.values(), ids=LOSSY_CASTS)
def test_cast_that_loses_something_stays(source: str, middle: int, target: str, to: int) -> None:
    module = module_from(
        graph(f"a = Cast<to = {middle}>(x) y = Cast<to = {to}>(a)", f"{source}[3] x", f"{target}[3] y")
    )
    check(MergeCasts(), module, fires=False)


@pytest.mark.parametrize(("source", "middle", "to", "target"), [("int32", 7, 3, "int8"), ("float16", 1, 11, "double")])
def test_cast_on_from_a_wider_type_skips_it(source: str, middle: int, to: int, target: str) -> None:
    module = module_from(
        graph(f"a = Cast<to = {middle}>(x) y = Cast<to = {to}>(a)", f"{source}[5] x", f"{target}[5] y")
    )
    check(MergeCasts(), module)
    assert module.graph.node(1).inputs[0] is module.graph.inputs[0]


NEUTRAL = {
    "mul-one": ("a = Mul(x, c)", "float c = {1.0}"),
    "one-mul": ("a = Mul(c, x)", "float[1] c = {1.0}"),
    "div-one": ("a = Div(x, c)", "float c = {1.0}"),
    "pow-one": ("a = Pow(x, c)", "float c = {1.0}"),
    "sub-zero": ("a = Sub(x, c)", "float c = {0.0}"),
    "add-minus-zero": ("a = Add(x, c)", "float[3,1] c = {-0.0, -0.0, -0.0}"),
}


@pytest.mark.parametrize(("body", "weights"), NEUTRAL.values(), ids=NEUTRAL)
def test_neutral_operand_goes(body: str, weights: str) -> None:
    module = module_from(graph(f"{body} y = Relu(a)", weights=weights))
    check(SimplifyArithmetic(), module)
    assert ops(module) == ["Relu"]


NOT_NEUTRAL = {
    "plus-zero-turns-minus-zero": ("a = Add(x, c)", "float c = {0.0}"),
    "minus-minus-zero": ("a = Sub(x, c)", "float c = {-0.0}"),
    "zero-minus": ("a = Sub(c, x)", "float c = {0.0}"),
    "one-div": ("a = Div(c, x)", "float c = {1.0}"),
    "one-pow": ("a = Pow(c, x)", "float c = {1.0}"),
    "nearly-one": ("a = Mul(x, c)", "float[4] c = {1.0, 1.0, 1.0, 1.0000001}"),
    "broadcasts": ("b = Mul(x, c) a = ReduceSum<keepdims = 0>(b, z)", "float[1,1,1,1] c = {1.0}, int64[1] z = {0}"),
}


@pytest.mark.parametrize(("body", "weights"), NOT_NEUTRAL.values(), ids=NOT_NEUTRAL)
def test_operand_that_changes_a_bit_or_the_shape_stays(body: str, weights: str) -> None:
    check(SimplifyArithmetic(), module_from(graph(f"{body} y = Neg(a)", weights=weights)), fires=False)


def test_integer_plus_zero_goes() -> None:
    module = module_from(graph("a = Add(x, c) y = Neg(a)", "int64[3] x", "int64[3] y", "int64 c = {0}"))
    check(SimplifyArithmetic(), module)
    assert ops(module) == ["Neg"]


DROPOUTS = {
    "plain": ("a = Dropout(x) y = Relu(a)", ""),
    "with-ratio": ("a = Dropout(x, r) y = Relu(a)", "float r = {0.5}"),
    "not-training": ("a = Dropout(x, r, t) y = Relu(a)", "float r = {0.5}, bool t = {0}"),
    "drops-none": ("a = Dropout(x, r, t) y = Relu(a)", "float r = {0.0}, bool t = {1}"),
}


@pytest.mark.parametrize(("body", "weights"), DROPOUTS.values(), ids=DROPOUTS)
def test_dropout_that_drops_nothing_goes(body: str, weights: str) -> None:
    module = module_from(graph(body, weights=weights))
    check(RemoveTrainingLeftovers(), module)
    assert ops(module) == ["Relu"]


def test_mask_of_dropout_is_all_true() -> None:
    module = module_from(
        graph("a, k = Dropout(x) y = Relu(a) z = Not(k)", outputs=f"{Y}, bool[batch,3,4] z"),
    )
    check(RemoveTrainingLeftovers(), module)
    assert ops(module) == ["Shape", "ConstantOfShape", "Relu", "Not"]


def test_dropout_in_training_mode_stays_with_a_remark() -> None:
    module = module_from(
        graph("a = Dropout(x, r, t) y = Relu(a)", weights="float r = {0.5}, bool t = {1}"),
    )
    context = check(RemoveTrainingLeftovers(), module, fires=False, run=False)
    assert ops(module) == ["Dropout", "Relu"]
    assert "training mode" in context.remarks[0].message


def test_batch_normalization_loses_its_training_mark_but_not_its_mode() -> None:
    weights = "float[3] s = {1.0, 2.0, 3.0}, float[3] v = {1.0, 1.0, 1.0}"
    module = module_from(graph("y = BatchNormalization<training_mode = 0>(x, s, s, s, v)", weights=weights))
    check(RemoveTrainingLeftovers(), module)
    assert "training_mode" not in module.graph.node(0).attributes
    module = module_from(graph("y, a, b = BatchNormalization<training_mode = 1>(x, s, s, s, v)", weights=weights))
    context = check(RemoveTrainingLeftovers(), module, fires=False)
    assert "own statistics" in context.remarks[0].message


TARGETS = {
    "copied-sizes": ("float[batch,seq,12] x", "float[batch,seq,3,4] y", "Concat<axis = 0>(b, t, u, v)", [0, 0, 3, 4]),
    "rest": ("float[batch,3,4] x", "float[rows,4] y", "Concat<axis = 0>(k, v)", [-1, 4]),
}


@pytest.mark.parametrize(("inputs", "outputs", "target", "want"), TARGETS.values(), ids=TARGETS)
def test_reshape_target_becomes_constant(inputs: str, outputs: str, target: str, want: list[int]) -> None:
    body = (
        "b = Shape<start = 0, end = 1>(x) t = Shape<start = 1, end = 2>(x) k = Mul(b, u)"
        f" s = {target} a = Reshape<allowzero = 1>(x, s) y = Relu(a)"
    )
    weights = "int64[1] u = {3}, int64[1] v = {4}"
    module = module_from(graph(body, inputs, outputs, weights))
    check(ConstantTargets(), module)
    node = next(node for node in module.graph if node.op_type == "Reshape")
    value = node.inputs[1]
    assert value is not None
    assert value.const_value is not None
    assert value.const_value.numpy().tolist() == want
    assert "allowzero" not in node.attributes


def test_reshape_with_two_open_sizes_keeps_its_target() -> None:
    body = (
        "b = Shape<start = 0, end = 1>(x) t = Shape<start = 1, end = 2>(x) s = Concat<axis = 0>(t, b) y = Reshape(x, s)"
    )
    check(ConstantTargets(), module_from(graph(body, "float[batch,seq] x", "float[seq,batch] y")), fires=False)


def test_expand_target_becomes_constant() -> None:
    body = "b = Shape<start = 0, end = 1>(x) s = Concat<axis = 0>(b, u, v) a = Expand(x, s) y = Relu(a)"
    module = module_from(
        graph(body, "float[batch,1,4] x", "float[batch,3,4] y", "int64[1] u = {3}, int64[1] v = {1}"),
    )
    check(ConstantTargets(), module)
    node = next(node for node in module.graph if node.op_type == "Expand")
    value = node.inputs[1]
    assert value is not None
    assert value.const_value is not None
    assert value.const_value.numpy().tolist() == [1, 3, 1]
