"""The unit every part of mmopt works on: one ONNX model plus what ONNX has no place for."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import pathlib
from collections.abc import Iterator, Mapping

import onnx_ir as ir

from mmopt.ir.modality import Modality

FUSED_DOMAIN = "mmopt.fused"
"""Domain of the model-local functions that stand for fusion groups; a function's body is its definition."""

MODULE_PATH_KEY = "mmopt.module_path"
"""Key in a node's ``metadata_props``: dotted path of the source module it comes from (``encoder.layers.0.attn``)."""


@dataclasses.dataclass(frozen=True)
class Remark:
    """One line a pass leaves for the person who asks "why was this (not) done?".

    Attributes:
        source: The pass or analysis that speaks, by its kebab-case name.
        kind: ``applied``, ``missed`` or ``note``.
        node: Name of the node it is about, or "" for the whole module.
        message: The reason, in a full sentence.
    """

    source: str
    kind: str
    node: str
    message: str


@dataclasses.dataclass
class Module:
    """One model and what belongs to it.

    Attributes:
        model: The ONNX model. At every moment it is valid standard ONNX that any runtime can run.
        modalities: What the user said about inputs (``--modality name=image``), by input name.
        remarks: What passes and analyses reported, in order.
        provenance: Where the model came from and what was applied, in order; one line each.
    """

    model: ir.Model
    modalities: dict[str, Modality] = dataclasses.field(default_factory=dict)
    remarks: list[Remark] = dataclasses.field(default_factory=list)
    provenance: list[str] = dataclasses.field(default_factory=list)

    @property
    def graph(self) -> ir.Graph:
        """The main graph."""
        return self.model.graph

    @property
    def opset(self) -> int:
        """Version of the default ONNX operator set."""
        return int(self.model.opset_imports.get("", 0))

    def clone(self) -> Module:
        """A copy that can be changed freely. Weight data is shared: tensors are immutable."""
        model = self.model.clone()
        model.meta.update(self.model.meta)
        _separate_types(model)
        return Module(
            model=model,
            modalities=dict(self.modalities),
            remarks=list(self.remarks),
            provenance=list(self.provenance),
        )

    def remark(self, source: str, kind: str, node: str, message: str) -> None:
        """Append one :class:`Remark`."""
        self.remarks.append(Remark(source, kind, node, message))

    def signature(self) -> tuple[tuple[tuple[str, str, str], ...], tuple[tuple[str, str, str], ...]]:
        """Names, types and shapes of inputs and outputs, in order: what no pass may change."""
        return (
            tuple(_describe(v) for v in self.graph.inputs),
            tuple(_describe(v) for v in self.graph.outputs),
        )


def _separate_types(model: ir.Model) -> None:
    """Give every value of ``model`` its own type object: ``value.dtype = …`` writes into the one that clones share."""
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        for value in itertools.chain(graph.inputs, graph.initializers.values()):
            value.type = _fresh_type(value.type)
        for node in ir.traversal.RecursiveGraphIterator(graph):
            for value in node.outputs:
                value.type = _fresh_type(value.type)
            for subgraph in _subgraphs(node):
                for value in itertools.chain(subgraph.inputs, subgraph.initializers.values()):
                    value.type = _fresh_type(value.type)


def _subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS and not attribute.is_ref():
            yield from attribute.as_graphs()


def _fresh_type(type_: ir.TypeProtocol | None) -> ir.TypeProtocol | None:
    if isinstance(type_, ir.TensorType):
        return ir.TensorType(type_.dtype, denotation=type_.denotation)
    return copy.deepcopy(type_)


def _describe(value: ir.Value) -> tuple[str, str, str]:
    return (str(value.name), str(value.type), str(value.shape))


def tensor_digest(tensor: ir.TensorProtocol) -> str:
    """Hex SHA-256 of dtype, shape and bytes, shortened to 16 digits."""
    digest = hashlib.sha256(f"{tensor.dtype.name}{tuple(tensor.shape)}".encode())
    digest.update(tensor.tobytes())
    return digest.hexdigest()[:16]


def initializer_bytes(model: ir.Model) -> int:
    """Bytes of all initializers of the main graph."""
    values: Mapping[str, ir.Value] = model.graph.initializers
    return sum(v.const_value.nbytes for v in values.values() if v.const_value is not None)


def save_model(model: ir.Model, path: pathlib.Path, *, external: bool | None = None) -> None:
    """Write ``model`` to ``path``; weights go to ``path.data`` beside it when they exceed 1 MB or ``external``."""
    if external is None:
        external = initializer_bytes(model) > 1 << 20
    ir.save(model, path, external_data=f"{path.name}.data" if external else None)
