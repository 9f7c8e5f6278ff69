"""Has other runtimes multiply queries and keys of long attention in integers.

    y = Attention(q, k, v)    →    y = Softmax(Q(s q) · Q(k)ᵀ) · v        Q: to int8 and back, symmetric

They do not look into the standard Attention operator, but take the product of two quantized tensors for one of
integers. What the softmax gives stays in float: over long rows most of it is less than a step of 8 bits.

Rounding queries and keys takes time of its own, which only long rows give back: sooner in OpenVINO than in onnxruntime.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from mmopt.analysis.calibration import Calibration, choose_range
from mmopt.analysis.shapes import ShapeFacts, infer_shapes
from mmopt.ir.module import Module
from mmopt.pipeline.base import Fidelity, Pass, PassContext
from mmopt.transforms.canonicalize.editing import Names, erase, is_onnx, new_initializer, new_node, replace
from mmopt.transforms.quantize.calibrating import calibration_of
from mmopt.transforms.quantize.encoding import encode
from mmopt.transforms.quantize.qdq import Quantizer

LONG = 512
"""Keys from which it pays: the shortest of 64 to 1500 at which what one runtime gains is more than the other loses."""

_PLAIN = {"q_num_heads", "kv_num_heads", "scale"}
"""Attributes that are covered here."""


@dataclasses.dataclass(frozen=True)
class QuantizeAttention(Pass):
    """Write long attention as products of which the first one reads int8, for runtimes that fuse it themselves.

    Attributes:
        longest: Attention over fewer keys than this is left as it is.
        stats: File of statistics (``mmopt calibrate``); the calibration samples of the run when empty.
    """

    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY

    longest: int = LONG
    stats: str = ""

    def run(self, module: Module, context: PassContext) -> bool:
        """Rewrite attention without a mask whose rows are long.

        Raises:
            UserError: There is nothing to calibrate on.
        """
        facts = infer_shapes(module.model)
        found = [node for node in module.graph if is_onnx(node, "Attention") and self._covers(node, facts)]
        if not found:
            return False
        calibration = calibration_of(self, self.stats, module, context)
        names, quantizer, count = Names(module.model), Quantizer(module.model), 0
        for node in found:
            count += _rewrite(node, calibration, names, quantizer)
        if count:
            self.remark(context, "applied", "", f"queries and keys of {count} long attentions are int8.")
        return bool(count)

    def _covers(self, node: ir.Node, facts: ShapeFacts) -> bool:
        given = [value for value in node.inputs if value is not None]
        shapes = [facts.shape(value) for value in given]
        if len(given) != 3 or len(node.outputs) != 1 or any(s is None or len(s) != 3 for s in shapes):
            return False
        if any(value.dtype != ir.DataType.FLOAT for value in given):
            return False
        heads = {node.attributes.get_int(name, 0) for name in ("q_num_heads", "kv_num_heads")}
        # Only what is written out holds a number other than what is meant anyway.
        odd = [a for name, a in node.attributes.items() if name not in _PLAIN and a.value not in (0, 0.0)]
        keys = shapes[1][1] if shapes[1] is not None else None
        return len(heads) == 1 and not odd and isinstance(keys, int) and keys >= self.longest


def _rewrite(node: ir.Node, calibration: Calibration, names: Names, quantizer: Quantizer) -> bool:
    q, k, v = node.inputs[:3]
    graph = node.graph
    assert graph is not None
    assert q is not None
    assert k is not None
    statistics = [calibration.tensors.get(str(value.name)) for value in (q, k)]
    if q.shape is None or any(s is None or not s.count for s in statistics):
        return False
    heads = node.attributes.get_int("q_num_heads", 1)
    width = int(q.shape[-1]) // heads  # type: ignore[arg-type]
    scale = node.attributes.get_float("scale", width**-0.5)
    numbers = {"heads": np.array([0, 0, heads, -1]), "joined": np.array([0, 0, -1]), "scale": np.float32(scale)}
    constants = {
        key: new_initializer(graph, ir.tensor(np.asarray(data)), names.fresh(f"{node.name}_{key}"))
        for key, data in numbers.items()
    }

    def emit(op_type: str, *inputs: ir.Value | None, **attributes: object) -> ir.Value:
        attrs = [ir.convenience.convert_attribute(name, value) for name, value in attributes.items()]  # type: ignore[arg-type]
        output = new_node(op_type, inputs, node, names, attrs).outputs[0]
        output.type = ir.TensorType(ir.DataType.FLOAT)
        return output

    split = [emit("Reshape", value, constants["heads"]) for value in (emit("Mul", q, constants["scale"]), k, v)]
    orders = ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])
    queries, keys, values = (emit("Transpose", x, perm=perm) for x, perm in zip(split, orders, strict=True))
    scores = emit("MatMul", queries, keys)
    mixed = emit("MatMul", emit("Softmax", scores, axis=-1), values)
    result = emit("Reshape", emit("Transpose", mixed, perm=[0, 2, 1, 3]), constants["joined"])
    output = node.outputs[0]
    result.shape = output.shape
    for value, found, factor in zip((queries, keys), statistics, (abs(scale), 1.0), strict=True):
        assert found is not None
        low, high = choose_range(found, symmetric=True)
        encoding = encode(np.array(low * factor), np.array(high * factor), ir.DataType.INT8, symmetric=True)
        quantizer.activation(value, encoding, [scores.producer()])  # type: ignore[list-item]
    replace(output, result)
    erase([node])
    return True
