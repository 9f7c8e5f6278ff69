"""Runs constant nodes in onnxruntime: all of them in one session, and by halves where that fails."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from mmopt.errors import BackendError
from mmopt.ir.evaluate import ONNXRUNTIME, Outputs, ReferenceRunner
from mmopt.ir.module import Module
from mmopt.transforms.canonicalize import editing
from mmopt.transforms.canonicalize.constant_regions import Tensors

Failures = list[tuple[ir.Node, str]]


def compute(
    model: ir.Model, nodes: Sequence[ir.Node], known: Mapping[ir.Value, ir.TensorProtocol]
) -> tuple[Tensors, Failures]:
    """What ``nodes`` compute.

    Args:
        model: The model they are in; it is not changed.
        nodes: Nodes whose inputs are constants, ``known``, or outputs of nodes before them.
        known: Results that are known already.

    Returns:
        The outputs that something outside of ``nodes`` reads, and the nodes that could not be run, with the reason.
    """
    if not nodes:
        return {}, []
    with ReferenceRunner(threads=1) as runner:
        run = _Runs(runner, dict(model.opset_imports), dict(known))
        run.run(list(nodes))
    return run.results, run.failures


class _Runs:
    def __init__(self, runner: ReferenceRunner, opsets: dict[str, int], known: Tensors) -> None:
        self._runner, self._opsets, self._known = runner, opsets, known
        self.results: Tensors = {}
        self.failures: Failures = []
        self._failed: set[ir.Value] = set()

    def run(self, nodes: list[ir.Node]) -> None:
        """Run ``nodes``; on failure each half, so that one bad node costs a logarithmic number of sessions."""
        for node in nodes:
            if any(value in self._failed for value in node.inputs if value is not None):
                self._fail(node, "what it reads could not be computed")
        nodes = [node for node in nodes if not any(output in self._failed for output in node.outputs)]
        if not nodes:
            return
        reason = self._try(nodes)
        if not reason:
            return
        if len(nodes) == 1:
            self._fail(nodes[0], reason)
            return
        self.run(nodes[: len(nodes) // 2])
        self.run(nodes[len(nodes) // 2 :])

    def _fail(self, node: ir.Node, reason: str) -> None:
        self._failed.update(node.outputs)
        self.failures.append((node, f"{node.op_type} of constants is not computed: {reason}."))

    def _try(self, nodes: list[ir.Node]) -> str:
        """Run ``nodes`` in one session and keep what others read; the reason when that is not possible."""
        model, wanted = self._model(nodes)
        if not wanted:
            return ""
        try:
            outputs = self._runner.run(Module(model), {})
        except BackendError as error:
            return error.what
        if outputs.engine != ONNXRUNTIME and not (len(nodes) == 1 and _is_exact(outputs)):
            return outputs.reason
        for name, value in wanted.items():
            self.results[value] = ir.tensor(np.asarray(outputs[name]))
        return ""

    def _model(self, nodes: list[ir.Node]) -> tuple[ir.Model, dict[str, ir.Value]]:
        """A model without inputs that runs copies of ``nodes``, and its outputs by name."""
        inside = set(nodes)
        copies: dict[ir.Value, ir.Value] = {}
        weights: list[ir.Value] = []

        def copy(value: ir.Value | None) -> ir.Value | None:
            if value is None:
                return None
            if value not in copies:
                tensor = self.results.get(value) or self._known.get(value) or editing.tensor_of(value)
                if tensor is None:
                    raise ValueError(f"value {value.name!r} is not constant")
                copies[value] = ir.Value(
                    name=f"c{len(copies)}",
                    type=ir.TensorType(tensor.dtype),
                    shape=ir.Shape(tensor.shape.numpy()),
                    const_value=tensor,
                )
                weights.append(copies[value])
            return copies[value]

        copied: list[ir.Node] = []
        wanted: dict[str, ir.Value] = {}
        outputs: list[ir.Value] = []
        for node in nodes:
            results = [ir.Value(name=f"r{len(copied)}_{i}" if o.name else "") for i, o in enumerate(node.outputs)]
            inputs = [copy(value) for value in node.inputs]
            attributes = list(node.attributes.values())
            copied.append(ir.Node(node.domain, node.op_type, inputs, attributes, outputs=results, version=node.version))
            for old, new in zip(node.outputs, results, strict=True):
                copies[old] = new
                if old.name and any(user not in inside for user in old.consumers()):
                    new.type = old.type
                    wanted[str(new.name)] = old
                    outputs.append(new)
        graph = ir.Graph([], outputs, nodes=copied, initializers=weights, opset_imports=self._opsets, name="constants")
        return ir.Model(graph, ir_version=10), wanted


def _is_exact(outputs: Outputs) -> bool:
    """Whether results that did not come from onnxruntime can be no other: whole numbers."""
    return all(isinstance(value, np.ndarray) and value.dtype.kind in "iub" for value in outputs.values())
