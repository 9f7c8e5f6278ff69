"""Where in the source model's module tree a node comes from."""

from __future__ import annotations

import ast

import onnx_ir as ir

from mmopt.ir.module import MODULE_PATH_KEY

_TORCH_SCOPES = "pkg.torch.onnx.name_scopes"
"""Where torch's exporter writes, as a Python list, the modules around a node from the root down, then the FX node."""


_NO_SCOPE = "_empty_nn_module_stack_from_metadata_hook"
"""What torch writes there for nodes that its own rewriting added."""


def record_module_paths(model: ir.Model) -> None:
    """Give each node that torch's exporter wrote its module path under ``MODULE_PATH_KEY`` (nothing for the root)."""
    places: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for scope in places:
        for node in scope.all_nodes():
            scopes = node.metadata_props.get(_TORCH_SCOPES)
            if scopes and MODULE_PATH_KEY not in node.metadata_props:
                path = _innermost(scopes)
                if path:
                    node.metadata_props[MODULE_PATH_KEY] = path


def _innermost(scopes: str) -> str:
    try:
        names = ast.literal_eval(scopes)
    except (ValueError, SyntaxError):  # a file may hold anything
        return ""
    inner = [name for name in names[:-1] if name != _NO_SCOPE][-1:] if isinstance(names, list) else []
    return inner[0] if inner and isinstance(inner[0], str) else ""
