"""What ``mmopt inspect --why`` says: what passes did at a node, or what stopped them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx_ir as ir

from mmopt.api import load, optimize
from mmopt.cli.output import Output, table
from mmopt.errors import UserError, did_you_mean
from mmopt.ir.module import Module, Remark
from mmopt.loading import parse_modalities, parse_shapes

_NOTHING = "no pass had anything to say about it"


def inspect_why(
    name: str,
    wanted: str,
    target: str,
    shapes: Sequence[str],
    modalities: Sequence[str],
    trust_code: bool,
    show: Output,
) -> None:
    """Run the passes of ``-O2`` on the model ``name`` and print what they remark on ``wanted``.

    Args:
        name: The model.
        wanted: A node, or a part of names of nodes; or a pattern: a part of the name of a pass or of what it says
            (``attention``, ``Gelu``, ``fuse-groups``).
        target: Name of the target.
        shapes: Shapes to fix, as on the command line.
        modalities: Modalities, as on the command line.
        trust_code: Allow files that can run code.
        show: Where to print.

    Raises:
        LoadError: The model cannot be read.
        UserError: Nothing in the model, and nothing that a pass says, goes by that name.
    """
    module = load(name, shapes=parse_shapes(shapes), modalities=parse_modalities(modalities), trust_code=trust_code)
    result = optimize(module, target=target, validate="off").module
    found = matching(result.remarks, wanted)
    rows = [(remark.node or "(the model)", remark.kind, remark.source, remark.message) for remark in found]
    rows += [(node, "note", "", text) for node, text in _fates(module, result, wanted, found)]
    if not rows:
        known = {remark.source for remark in result.remarks} | {str(node.name) for node in module.graph.all_nodes()}
        raise UserError(f"nothing is known of {wanted!r}", where="--why", hint=did_you_mean(wanted, known))
    show.result(table(("node", "kind", "pass", "why"), rows))
    show.json({"model": name, "why": wanted, "remarks": [dict(zip(_KEYS, row, strict=True)) for row in rows]})


_KEYS = ("node", "kind", "pass", "message")


def matching(remarks: Iterable[Remark], wanted: str) -> list[Remark]:
    """Remarks on nodes of that name; else on nodes with it in their names; else from or about such a pattern."""
    unique = list(dict.fromkeys(remarks))
    needle = wanted.lower()
    choices = (
        [r for r in unique if r.node == wanted],
        [r for r in unique if needle in r.node.lower()],
        [r for r in unique if needle in r.source.lower() or needle in r.message.lower()],
    )
    return next((choice for choice in choices if choice), [])


def _fates(before: Module, after: Module, wanted: str, found: Sequence[Remark]) -> list[tuple[str, str]]:
    """What became of nodes of that name, or with it in theirs, that no remark is about."""
    told = {remark.node for remark in found}
    everything = [node for node in before.graph.all_nodes() if node.name and node.name not in told]
    nodes = [node for node in everything if node.name == wanted]
    if not nodes and not found:
        nodes = [node for node in everything if wanted.lower() in str(node.name).lower()]
    kept = {node.name: node for node in after.graph.all_nodes()}
    return [(str(node.name), _fate(node, kept.get(node.name))) for node in nodes]


def _fate(node: ir.Node, now: ir.Node | None) -> str:
    if now is None:
        return f"{node.op_type}: replaced by others or part of a fusion group; {_NOTHING}"
    if now.op_type != node.op_type:
        return f"{node.op_type}: now {now.op_type}; {_NOTHING}"
    return f"{node.op_type}: as it was; {_NOTHING}"
