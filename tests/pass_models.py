"""Small models with the parts that multimodal models are made of, for tests of passes and their manager."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from mmopt.ir.module import Module

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
OPSET = 21
WIDTH = 16
VOCABULARY = 50


def make_module(nodes, inputs, outputs, weights, *, functions=(), domains=(), value_info=()) -> Module:
    """A module from onnx helper's nodes, ``(name, type, shape)`` signatures and arrays by name."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(*entry) for entry in inputs],
        [helper.make_tensor_value_info(*entry) for entry in outputs],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
        value_info=[helper.make_tensor_value_info(*entry) for entry in value_info],
    )
    imports = [helper.make_opsetid("", OPSET), *(helper.make_opsetid(domain, 1) for domain in domains)]
    proto = helper.make_model(graph, opset_imports=imports, ir_version=10, functions=list(functions))
    return Module(ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True)))


def _node(op, inputs, output, **attributes):
    return helper.make_node(op, inputs, [output], name=f"make_{output}", **attributes)


def text_image_model(seed: int = 0) -> Module:
    """A masked attention layer over token ids, a convolution over an image, joined by concatenation.

    The attention projections of query and key share one weight.
    """
    rng = np.random.default_rng(seed)

    def weight(*shape):
        return (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)

    weights = {
        "table": rng.standard_normal((VOCABULARY, WIDTH)).astype(np.float32),
        "norm_scale": 1 + 0.1 * weight(WIDTH), "norm_bias": weight(WIDTH),
        "shared": weight(WIDTH, WIDTH), "value_weight": weight(WIDTH, WIDTH),
        "kernel": weight(8, 3, 3, 3), "kernel_bias": rng.standard_normal(8).astype(np.float32),
        "bn_scale": 1 + 0.1 * weight(8), "bn_bias": weight(8), "bn_mean": weight(8),
        "bn_var": rng.uniform(0.5, 1.5, 8).astype(np.float32),
        "image_weight": weight(8, WIDTH), "image_bias": rng.standard_normal(WIDTH).astype(np.float32),
        "head_weight": weight(2 * WIDTH, WIDTH), "head_bias": rng.standard_normal(WIDTH).astype(np.float32),
        "one": np.float32(1), "fill": np.float32(-1e4), "root": np.float32(np.sqrt(WIDTH)), "half": np.float32(0.5),
        "low": np.float32(-1.5), "high": np.float32(1.5), "axis1": np.array([1], np.int64),
        "mask_axes": np.array([1], np.int64), "last": np.array([2], np.int64),
        "starts": np.array([2], np.int64), "ends": np.array([10], np.int64), "columns": np.array([1], np.int64),
        "row": np.array([0, -1], np.int64),
    }  # fmt: skip
    nodes = [
        _node("Gather", ["table", "input_ids"], "embedded"),
        _node("LayerNormalization", ["embedded", "norm_scale", "norm_bias"], "normed", axis=-1, epsilon=1e-5),
        _node("MatMul", ["normed", "shared"], "query"),
        _node("MatMul", ["embedded", "shared"], "key"),
        _node("MatMul", ["normed", "value_weight"], "value"),
        _node("Transpose", ["key"], "key_t", perm=[0, 2, 1]),
        _node("MatMul", ["query", "key_t"], "products"),
        _node("Div", ["products", "root"], "scores"),
        _node("Cast", ["attention_mask"], "mask", to=FLOAT),
        _node("Sub", ["one", "mask"], "hidden"),
        _node("Mul", ["hidden", "fill"], "bias"),
        _node("Unsqueeze", ["bias", "mask_axes"], "bias_3d"),
        _node("Add", ["scores", "bias_3d"], "masked"),
        _node("Softmax", ["masked"], "weights", axis=-1),
        _node("MatMul", ["weights", "value"], "context"),
        _node("Add", ["context", "embedded"], "residual"),
        _node("Unsqueeze", ["mask", "last"], "mask_3d"),
        _node("Mul", ["residual", "mask_3d"], "kept"),
        _node("ReduceSum", ["kept", "axis1"], "summed", keepdims=0),
        _node("ReduceSum", ["mask", "axis1"], "count", keepdims=1),
        _node("Div", ["summed", "count"], "text"),
        _node("Conv", ["pixel_values", "kernel", "kernel_bias"], "convolved", strides=[2, 2], pads=[1, 1, 1, 1]),
        _node("BatchNormalization", ["convolved", "bn_scale", "bn_bias", "bn_mean", "bn_var"], "bn", epsilon=1e-5),
        _node("Relu", ["bn"], "activated"),
        _node("GlobalAveragePool", ["activated"], "pooled"),
        _node("Flatten", ["pooled"], "flat", axis=1),
        _node("Gemm", ["flat", "image_weight", "image_bias"], "image"),
        _node("Concat", ["text", "image"], "joined", axis=1),
        _node("Gemm", ["joined", "head_weight", "head_bias"], "head"),
        _node("Clip", ["head", "low", "high"], "clipped"),
        _node("Mul", ["clipped", "half"], "halved"),
        _node("Slice", ["halved", "starts", "ends", "columns"], "part"),
        _node("Reshape", ["part", "row"], "shaped"),
        _node("Softmax", ["shaped"], "probabilities", axis=1),
        _node("ArgMax", ["shaped"], "label", axis=1, keepdims=0),
        _node("Sub", ["text", "image"], "difference"),
    ]
    return make_module(
        nodes,
        [
            ("input_ids", INT64, ["batch", "sequence"]),
            ("attention_mask", INT64, ["batch", "sequence"]),
            ("pixel_values", FLOAT, ["batch", 3, 8, 8]),
        ],
        [("probabilities", FLOAT, ["batch", 8]), ("label", INT64, ["batch"]), ("difference", FLOAT, ["batch", WIDTH])],
        weights,
    )


def audio_model(seed: int = 0) -> Module:
    """An LSTM over audio features with lengths, a GELU by erf, and an If over a flag that captures its input."""
    rng = np.random.default_rng(seed)
    hidden, features = 6, 5

    def weight(*shape):
        return rng.standard_normal(shape).astype(np.float32) * 0.5

    def branch(name, op):
        output = f"{name}_out"
        return helper.make_graph(
            [helper.make_node(op, ["gelu", "offset"], [output], name=f"{name}_{op}")],
            name,
            [],
            [helper.make_tensor_value_info(output, FLOAT, None)],
        )

    nodes = [
        helper.make_node(
            "LSTM", ["frames", "W", "R", "B", "lengths"], ["sequence", "state"], name="lstm", hidden_size=hidden
        ),
        _node("Squeeze", ["state", "axis0"], "last"),
        _node("Div", ["last", "root2"], "scaled"),
        _node("Erf", ["scaled"], "erf"),
        _node("Add", ["erf", "one"], "shifted"),
        _node("Mul", ["last", "shifted"], "product"),
        _node("Mul", ["product", "half"], "gelu"),
        _node("If", ["flag"], "chosen", then_branch=branch("then", "Add"), else_branch=branch("else", "Sub")),
        _node("Greater", ["chosen", "zero"], "positive"),
        _node("Where", ["positive", "chosen", "gelu"], "audio"),
    ]
    weights = {
        "W": weight(1, 4 * hidden, features), "R": weight(1, 4 * hidden, hidden), "B": weight(1, 8 * hidden),
        "axis0": np.array([0], np.int64), "root2": np.float32(np.sqrt(2)), "one": np.float32(1),
        "half": np.float32(0.5), "zero": np.float32(0), "offset": weight(hidden),
    }  # fmt: skip
    return make_module(
        nodes,
        [("frames", FLOAT, ["time", "batch", features]), ("lengths", TensorProto.INT32, ["batch"]), ("flag", BOOL, [])],
        [("audio", FLOAT, ["batch", hidden])],
        weights,
    )


def fused_model() -> Module:
    """A call of a function in mmopt's fused domain."""
    function = helper.make_function(
        "mmopt.fused",
        "MatMulBias",
        ["x", "w", "b"],
        ["y"],
        [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Add", ["p", "b"], ["y"])],
        [helper.make_opsetid("", OPSET)],
    )
    rng = np.random.default_rng(0)
    return make_module(
        [helper.make_node("MatMulBias", ["x", "w", "b"], ["y"], domain="mmopt.fused", name="fused")],
        [("x", FLOAT, ["rows", 4])],
        [("y", FLOAT, ["rows", 3])],
        {"w": rng.standard_normal((4, 3)).astype(np.float32), "b": rng.standard_normal(3).astype(np.float32)},
        functions=[function],
        domains=["mmopt.fused"],
    )


def serialized(module: Module) -> bytes:
    """The module as the bytes of its file."""
    return ir.to_proto(module.model).SerializeToString(deterministic=True)
