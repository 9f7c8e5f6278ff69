"""Looks over a parsed ONNX file before a model is built: sizes it claims, files it points to, names it uses."""

from __future__ import annotations

import difflib
import math
import pathlib
import stat
from collections.abc import Iterable, Iterator

import numpy as np
import onnx
import onnx_ir as ir

from mmopt.errors import LoadError

_DENSE_LIMIT = 1 << 30
"""Largest dense form, in bytes, that a sparse tensor is expanded to."""

_FIELDS = {
    **dict.fromkeys(("FLOAT", "COMPLEX64"), "float_data"),
    **dict.fromkeys(("DOUBLE", "COMPLEX128"), "double_data"),
    "INT64": "int64_data",
    **dict.fromkeys(("UINT32", "UINT64"), "uint64_data"),
    "STRING": "string_data",
}
"""Field of a TensorProto that holds elements of a dtype when they are not raw; ``int32_data`` for all others."""


def check_model(proto: onnx.ModelProto, base: pathlib.Path | None, where: str) -> None:
    """Refuse what cannot be a model, and claims that do not hold. Nothing is read or allocated for weights.

    Args:
        proto: The parsed file.
        base: Folder of the external data, from :func:`settle_external`; None for a model that has no file.
        where: What error messages call the model.

    Raises:
        LoadError: For the first thing that is wrong.
    """
    if not proto.HasField("graph") or not (proto.graph.node or proto.graph.output or proto.graph.initializer):
        raise LoadError("holds no graph", where=where, hint="is this an ONNX model, and a complete file?")
    if not proto.opset_import and not proto.functions and any(node.domain == "" for node in proto.graph.node):
        raise LoadError("imports no operator set", where=where, hint="the file may be truncated; export it again")
    for tensor in _tensors(proto):
        _check_tensor(tensor, base, where)
    _check_names(proto.graph, set(), where)
    for function in proto.functions:
        label = f"{where}, function {function.name!r}"
        scope = _check_nodes(function.node, set(function.input), label)
        _check_outputs(function.output, scope, label)


def _graphs(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """The main graph and every graph nested in a node of it or of a function."""
    pending = [proto.graph]
    nodes = [node for function in proto.functions for node in function.node]
    pending += [graph for node in nodes for graph in subgraphs(node)]
    while pending:
        graph = pending.pop()
        yield graph
        pending += [inner for node in graph.node for inner in subgraphs(node)]


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Graphs in the attributes of ``node``."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _nodes(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    for graph in _graphs(proto):
        yield from graph.node
    for function in proto.functions:
        yield from function.node


def _tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    for graph in _graphs(proto):
        yield from graph.initializer
    for node in _nodes(proto):
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def _check_tensor(tensor: onnx.TensorProto, base: pathlib.Path | None, where: str) -> None:
    where = f"{where}, tensor {tensor.name!r}"
    try:
        dtype = ir.DataType(tensor.data_type)
    except ValueError:
        raise LoadError(f"unknown data type {tensor.data_type}", where=where, hint="upgrade onnx and onnx-ir") from None
    if dtype == ir.DataType.UNDEFINED or any(dim < 0 for dim in tensor.dims):
        raise LoadError(f"{dtype.name} of shape {list(tensor.dims)} is not a tensor", where=where, hint=_DAMAGED)
    count = math.prod(tensor.dims)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        if base is None:
            raise LoadError("its data is in another file, but the model has no folder", where=where, hint=_NO_BASE)
        if dtype == ir.DataType.STRING:
            raise LoadError("strings cannot be external data", where=where, hint=_DAMAGED)
        _check_external(tensor, math.ceil(count * dtype.bitwidth / 8), base, where)
    else:
        _check_inline(tensor, dtype, count, where)


_DAMAGED = "the file is damaged or was written by a faulty tool; export the model again"
_NO_BASE = "save the model to a file beside its data and load that file"


def _check_inline(tensor: onnx.TensorProto, dtype: ir.DataType, count: int, where: str) -> None:
    if tensor.HasField("raw_data"):
        found, wanted, unit = len(tensor.raw_data), math.ceil(count * dtype.bitwidth / 8), "bytes"
    else:
        field = _FIELDS.get(dtype.name, "int32_data")
        found, wanted, unit = len(getattr(tensor, field)), count, "elements"
        if dtype in (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128):
            wanted *= 2
        elif field == "int32_data" and dtype.bitwidth < 8 and found != wanted:
            wanted = math.ceil(count * dtype.bitwidth / 8)
    if found != wanted:
        what = f"{dtype.name} of shape {list(tensor.dims)} needs {wanted} {unit}, found {found}"
        raise LoadError(what, where=where, hint=_DAMAGED)


def _check_external(tensor: onnx.TensorProto, nbytes: int, base: pathlib.Path, where: str) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    try:
        offset = int(entries.get("offset") or 0)
        length = int(entries.get("length") or nbytes)
    except ValueError:
        raise LoadError(f"offset or length is not a number: {entries}", where=where, hint=_DAMAGED) from None
    path = base / entries.get("location", "")
    size = path.stat().st_size
    if length != nbytes:
        shape = list(tensor.dims)
        raise LoadError(f"shape {shape} needs {nbytes} bytes, the file claims {length}", where=where, hint=_DAMAGED)
    if offset < 0 or offset + length > size:
        raise LoadError(
            f"its {length} bytes at offset {offset} lie outside {path.name!r}, which has {size}",
            where=where,
            hint="the data file is truncated or belongs to another model; copy both files again",
        )


def settle_external(proto: onnx.ModelProto, path: pathlib.Path) -> pathlib.Path:
    """Find the one folder that all external data of the model at ``path`` lies in, and check each file.

    That is the folder of ``path``. Where ``path`` is itself a link (as in download caches, where a model and its data
    are links to files kept elsewhere side by side) it may be the folder of the file linked to; the locations in
    ``proto`` are then changed to the names the files have there.

    Raises:
        LoadError: For a data file that is missing, outside, or not a plain file.
    """
    entries = [e for t in _tensors(proto) for e in t.external_data if e.key == "location"]
    locations = sorted({entry.value for entry in entries})
    home, linked = path.parent.resolve(), path.resolve().parent
    real = {location: _resolve(path.parent, location, (home, linked), str(path)) for location in locations}
    if all(file.is_relative_to(home) for file in real.values()):
        return home
    for entry in entries:
        if not real[entry.value].is_relative_to(linked):
            raise _outside(entry.value, real[entry.value], str(path))
        entry.value = real[entry.value].relative_to(linked).as_posix()
    return linked


def _resolve(base: pathlib.Path, location: str, homes: tuple[pathlib.Path, ...], where: str) -> pathlib.Path:
    """The plain file that ``location`` names, links followed, which must lie in one of ``homes``."""
    pure = pathlib.PurePosixPath(location.replace("\\", "/"))
    if not location or pure.is_absolute() or ".." in pure.parts or pathlib.PureWindowsPath(location).drive:
        raise LoadError(
            f"external data at {location!r} leaves the model's folder",
            where=where,
            hint="external data must have a relative path without '..'; move it beside the model and save it again",
        )
    named = base / pure
    try:
        status = named.stat()
    except OSError:
        hint = "copy it from where the model came from"
        raise LoadError(f"its data file {str(named)!r} is missing", where=where, hint=hint) from None
    real = named.resolve()
    if not any(real.is_relative_to(home) for home in homes):
        raise _outside(location, real, where)
    if not stat.S_ISREG(status.st_mode):
        raise LoadError(f"external data {location!r} is not a regular file", where=where, hint=_DAMAGED)
    if status.st_nlink > 1:
        hint = f"make it a file of its own: cp {named} {named}.copy && mv {named}.copy {named}"
        raise LoadError(f"external data {location!r} has several hard links", where=where, hint=hint)
    return real


def _outside(location: str, real: pathlib.Path, where: str) -> LoadError:
    what = f"external data {location!r} is a link to {str(real)!r}, outside the model's folder"
    return LoadError(what, where=where, hint="copy the file into the model's folder")


def _check_names(graph: onnx.GraphProto, outer: set[str], where: str) -> None:
    scope = outer | {value.name for value in graph.input}
    scope |= {tensor.name for tensor in graph.initializer}
    scope |= {tensor.values.name for tensor in graph.sparse_initializer}
    scope = _check_nodes(graph.node, scope, where)
    _check_outputs([value.name for value in graph.output], scope, where)


def _check_nodes(nodes: Iterable[onnx.NodeProto], scope: set[str], where: str) -> set[str]:
    """Every name is defined, once, somewhere in the graph or around it. Returns all names the graph can see."""
    produced: set[str] = set()
    for node in nodes:
        again = produced.intersection(filter(None, node.output))
        if again:
            raise LoadError(f"{min(again)!r} is defined twice", where=_place(where, node), hint=_DAMAGED)
        produced.update(filter(None, node.output))
    scope = scope | produced
    for node in nodes:
        _check_outputs(node.input, scope, _place(where, node), what="input")
        for graph in subgraphs(node):
            _check_names(graph, scope, _place(where, node))
    return scope


def _check_outputs(names: Iterable[str], scope: set[str], where: str, what: str = "output") -> None:
    for name in names:
        if name and name not in scope:
            near = difflib.get_close_matches(name, scope, n=1)
            hint = f"the nearest name is {near[0]!r}; " if near else ""
            raise LoadError(f"{what} {name!r} is not defined", where=where, hint=hint + _DAMAGED)


def _place(where: str, node: onnx.NodeProto) -> str:
    return f"{where}, node {node.name or '?'!r} ({node.op_type})"


def densify(proto: onnx.ModelProto, where: str) -> list[str]:
    """Turn sparse initializers and sparse constants, in place, into the dense tensors they stand for.

    Returns:
        One remark for each.

    Raises:
        LoadError: When a dense form would exceed 1 GiB.
    """
    remarks = []
    for graph in _graphs(proto):
        for sparse in graph.sparse_initializer:
            graph.initializer.append(_dense(sparse, sparse.values.name, where))
            remarks.append(f"sparse initializer {sparse.values.name!r} expanded to its dense form")
        del graph.sparse_initializer[:]
    for node in _nodes(proto):
        for attribute in node.attribute:
            if attribute.HasField("sparse_tensor") and node.op_type == "Constant":
                dense = _dense(attribute.sparse_tensor, "", where)
                attribute.CopyFrom(onnx.helper.make_attribute("value", dense))
                remarks.append(f"sparse constant {node.output[0]!r} expanded to its dense form")
    return remarks


def _dense(sparse: onnx.SparseTensorProto, name: str, where: str) -> onnx.TensorProto:
    where = f"{where}, sparse tensor {sparse.values.name!r}"
    for part in (sparse.values, sparse.indices):
        _check_tensor(part, None, where)
    values, indices = onnx.numpy_helper.to_array(sparse.values), onnx.numpy_helper.to_array(sparse.indices)
    shape = tuple(sparse.dims)
    if math.prod(shape) * values.itemsize > _DENSE_LIMIT:
        raise LoadError(f"shape {list(shape)} is too large to expand", where=where, hint="save it with dense weights")
    try:
        flat = np.ravel_multi_index(tuple(indices.T), shape) if indices.ndim == 2 else indices
        np.unravel_index(flat, shape)
    except ValueError as error:
        raise LoadError(f"its indices do not fit shape {list(shape)}: {error}", where=where, hint=_DAMAGED) from None
    dense = np.zeros(shape, values.dtype)
    dense.reshape(-1)[flat] = values
    return onnx.numpy_helper.from_array(dense, name)
