"""A pass on a torch.fx graph: runs on models from torch, before they become ONNX.

    relu(relu(x))   →   relu(x)

Use it with:

    mmopt.load(torch_module, example_inputs, fx_passes=[relu_once()])
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmopt import fx_pass

if TYPE_CHECKING:
    import torch


@fx_pass
def relu_once(graph_module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Removes a ReLU that follows a ReLU."""
    import torch

    relus = (torch.ops.aten.relu.default, torch.ops.aten.relu_.default)
    for node in list(graph_module.graph.nodes):
        if node.target in relus and node.args[0].target in relus:
            node.replace_all_uses_with(node.args[0])
            graph_module.graph.erase_node(node)
    return graph_module
