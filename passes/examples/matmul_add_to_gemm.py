"""A pass on an onnx-graphsurgeon graph, the way TensorRT users write them.

    y = Add(MatMul(x, w), b)   →   y = Gemm(x, w, b)        for a matrix x, a constant w and a constant row b

Run it with:

    mmopt optimize model.onnx --pass passes/examples/matmul_add_to_gemm.py:matmul_add_to_gemm
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from mmopt import Fidelity, graphsurgeon_pass


@graphsurgeon_pass(fidelity=Fidelity.ROUNDING)
def matmul_add_to_gemm(graph: gs.Graph) -> bool:
    """Joins a matrix product and the addition of a bias."""
    changed = False
    for add in [node for node in graph.nodes if node.op == "Add"]:
        product, bias = add.inputs
        if isinstance(product, gs.Constant):
            product, bias = bias, product
        if not _is_dense(product, bias):
            continue
        matmul = product.inputs[0]
        output = add.outputs[0]
        add.outputs.clear()
        graph.layer(op="Gemm", name=f"{matmul.name}_gemm", inputs=[*matmul.inputs, bias], outputs=[output])
        changed = True
    if changed:
        graph.cleanup().toposort()
    return changed


def _is_dense(product: gs.Tensor, bias: gs.Tensor) -> bool:
    """Whether ``product`` is made by a MatMul of matrices for the Add alone, and ``bias`` is a row as wide."""
    if len(product.inputs) != 1 or product.inputs[0].op != "MatMul" or len(product.outputs) != 1:
        return False
    data, weight = product.inputs[0].inputs
    if not isinstance(weight, gs.Constant) or not isinstance(bias, gs.Constant):
        return False
    return data.shape is not None and len(data.shape) == 2 and bias.shape == [weight.shape[-1]]
