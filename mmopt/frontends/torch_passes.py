"""Runs FX passes on an exported program, each checked on the program's example inputs and undone when it is wrong."""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from mmopt.errors import PassError


class FxRewrite(Protocol):
    """A pass on the FX graph. May also have a ``name`` and a ``fidelity`` as passes on modules do."""

    def run_fx(self, graph_module: Any) -> Any:
        """Return the rewritten ``torch.fx.GraphModule``, the same object or a new one."""


@contextlib.contextmanager
def quiet_torch() -> Iterator[None]:
    """Hold back what torch's exporters log and warn about themselves; what goes wrong is raised all the same."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch.onnx", "torch._subclasses.fake_tensor")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def run_fx_passes(
    torch: Any, program: Any, passes: Sequence[FxRewrite], *, strict: bool = False
) -> tuple[Any, list[tuple[str, str, str]]]:
    """Run ``passes`` in order.

    Args:
        torch: The torch package.
        program: The ``ExportedProgram``; it is not changed.
        passes: Objects with ``run_fx``.
        strict: Raise on the first pass that fails.

    Returns:
        The new program, and a remark (source, kind, message) for each pass.

    Raises:
        PassError: When ``strict``, and a pass fails or changes the outputs.
    """
    remarks = []
    for rewrite in passes:
        name = getattr(rewrite, "name", "") or type(rewrite).__name__
        try:
            with quiet_torch():
                candidate = _rewritten(torch, program, rewrite)
                problem = _difference(torch, program, candidate, rewrite)
        except Exception as error:  # a pass is foreign code: whatever it does wrong, the program before it still stands
            problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if problem and strict:
            raise PassError(f"FX pass {name}: {problem}", hint="without --strict it is undone and the run goes on")
        if problem:
            remarks.append((name, "missed", f"undone: {problem}"))
        else:
            program = candidate
            remarks.append((name, "applied", "ran on the FX graph"))
    return program, remarks


def _rewritten(torch: Any, program: Any, rewrite: FxRewrite) -> Any:
    before = program.graph_module
    result = rewrite.run_fx(copy.deepcopy(before))
    if not isinstance(result, torch.fx.GraphModule):
        raise TypeError(f"run_fx returned a {type(result).__name__}, not a GraphModule")
    result.graph.lint()
    _fill_in_values(torch, result)
    result.recompile()
    inputs = [node.name for node in before.graph.nodes if node.op == "placeholder"]
    if inputs != [node.name for node in result.graph.nodes if node.op == "placeholder"]:
        raise ValueError("inputs and parameters of the graph were added, removed or reordered")
    return torch.export.ExportedProgram(
        root=result,
        graph=result.graph,
        graph_signature=_signature(program.graph_signature, result),
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=copy.deepcopy(program.module_call_graph),
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=program.verifiers,
    )


def _fill_in_values(torch: Any, graph_module: Any) -> None:
    """Give nodes that the pass added the example value (dtype and shape only) that exported programs carry."""
    nodes = list(graph_module.graph.nodes)
    mode = torch._guards.detect_fake_mode([node.meta["val"] for node in nodes if node.op == "placeholder"])
    if mode is None:
        return
    with mode:
        for node in nodes:
            if node.op == "call_function" and "val" not in node.meta:
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda used: used.meta["val"])
                node.meta["val"] = node.target(*args, **kwargs)


def _signature(signature: Any, graph_module: Any) -> Any:
    """The program's signature with the names that the outputs have now."""
    outputs = next(node for node in graph_module.graph.nodes if node.op == "output").args[0]
    signature = copy.deepcopy(signature)
    if len(outputs) != len(signature.output_specs):
        raise ValueError(f"the graph has {len(outputs)} outputs, it had {len(signature.output_specs)}")
    for spec, node in zip(signature.output_specs, outputs, strict=True):
        if hasattr(node, "name") and hasattr(spec.arg, "name"):
            spec.arg.name = node.name
    return signature


def _difference(torch: Any, before: Any, after: Any, rewrite: FxRewrite) -> str:
    """How the outputs on the example inputs differ beyond what the pass's fidelity allows; "" when they agree."""
    if before.example_inputs is None:
        return ""
    args, kwargs = copy.deepcopy(before.example_inputs)
    fidelity = getattr(getattr(rewrite, "fidelity", None), "value", "exact")
    with torch.no_grad():
        old, new = before.module()(*args, **kwargs), after.module()(*args, **kwargs)
    if fidelity == "lossy":
        return ""
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if fidelity == "rounding" else {}
    try:
        for a, b in zip(*map(torch.utils._pytree.tree_leaves, (old, new)), strict=True):
            torch.testing.assert_close(b, a, equal_nan=True, **tolerance)
    except AssertionError as error:
        return f"changed the outputs: {' '.join(str(error).split())}"
    return ""
