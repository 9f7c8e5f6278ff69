"""Reads ONNX files into modules and writes modules as ONNX files."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import pathlib
import tempfile
from collections.abc import Iterator

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx_ir.passes import common

from mmopt.errors import LoadError, UnsupportedError, UserError
from mmopt.frontends import opset, proto_checks
from mmopt.frontends.module_paths import record_module_paths
from mmopt.ir.module import Module, initializer_bytes

SOURCE = "load-onnx"
"""Source of the remarks this frontend leaves."""

_PROTOBUF_LIMIT = (1 << 31) - 1
_EXTERNAL_FROM = 1 << 20


def load_onnx(path: str | os.PathLike[str]) -> Module:
    """Read an ONNX file.

    Weights in external files are memory-mapped when they are first used. The model is brought to
    :data:`~mmopt.frontends.opset.WORKING_OPSET`; where that is not possible it keeps its own, and a remark says why.

    Args:
        path: A ``.onnx`` file. Data files lie in its folder.

    Raises:
        LoadError: When the file is missing, no ONNX model, damaged, or points outside its folder.
    """
    path = pathlib.Path(path)
    proto = _parse(path)
    base = proto_checks.settle_external(proto, path)
    return module_from_proto(proto, base=base, where=str(path))


def module_from_proto(proto: onnx.ModelProto, *, base: pathlib.Path | None = None, where: str = "model") -> Module:
    """Turn a parsed model into a module. ``proto`` is taken over and must not be used any more.

    Args:
        proto: The model.
        base: Folder of its external data, if it has any.
        where: What errors and the module's provenance call the model.

    Raises:
        LoadError: When the model is not valid.
    """
    proto_checks.check_model(proto, base, where)
    remarks = proto_checks.densify(proto, where)
    proto = _from_before_opset_7(proto, remarks)
    if proto.training_info:
        remarks.append("training information is dropped")
    model = _deserialize(proto, where)
    if base is not None:
        _set_base(model, base)
    if model.ir_version < 4:
        remarks += _free_initializers(model)
    remarks += _sort(model, where)
    model, reason = opset.to_working_opset(model)
    record_module_paths(model)
    module = Module(model, provenance=[f"loaded from {where}"])
    for message in [*remarks, reason]:
        if message:
            module.remark(SOURCE, "note", "", message)
    return module


def _parse(path: pathlib.Path) -> onnx.ModelProto:
    where = str(path)
    try:
        size = path.stat().st_size
        if path.is_dir():
            raise LoadError("is a folder", where=where, hint="name the .onnx file in it")
        if size == 0:
            raise LoadError("is empty", where=where, hint="the download or export did not finish; repeat it")
        if size > _PROTOBUF_LIMIT:
            hint = "save it with its weights as external data: onnx.save(model, path, save_as_external_data=True)"
            raise LoadError(f"has {size} bytes; a protobuf file ends at 2 GiB", where=where, hint=hint)
        data = path.read_bytes()
    except OSError as error:
        raise LoadError(error.strerror or str(error), where=where, hint="check the path") from None
    if data.startswith(b"version https://git-lfs"):
        raise LoadError("is a Git LFS pointer, not the model", where=where, hint="fetch it with 'git lfs pull'")
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError:
        hint = "it may be truncated or another kind of file; compare its size with the original, or export it again"
        raise LoadError("cannot be read as an ONNX model", where=where, hint=hint) from None
    return proto


def _from_before_opset_7(proto: onnx.ModelProto, remarks: list[str]) -> onnx.ModelProto:
    """Bring a model older than opset 7 to opset 7 with onnx's own converter, whose realm these few rules are."""
    old = [entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")]
    if not old or old[0] >= opset.OLDEST_OPSET:
        return proto
    if _has_channel_prelu(proto):
        remarks.append(f"PRelu broadcast another way before opset 7; the model stays at opset {old[0]}")
        return proto
    try:
        converted = onnx.version_converter.convert_version(proto, opset.OLDEST_OPSET)
    except Exception as error:  # the C++ converter raises several types, RuntimeError among them
        remarks.append(f"opset {old[0]} could not be converted to {opset.OLDEST_OPSET}: {str(error).splitlines()[0]}")
        return proto
    converted.ir_version = proto.ir_version
    return converted


def _has_channel_prelu(proto: onnx.ModelProto) -> bool:
    """Whether a slope of PRelu is not a single number; onnx's converter leaves its shape, which then means another."""
    single = {tensor.name for tensor in proto.graph.initializer if math.prod(tensor.dims) == 1}
    return any(node.op_type == "PRelu" and node.input[1] not in single for node in proto.graph.node)


def _deserialize(proto: onnx.ModelProto, where: str) -> ir.Model:
    with _quiet("onnx_ir"):
        try:
            return ir.from_proto(proto)
        except Exception as error:  # onnx_ir raises its own, ValueError, TypeError, NotImplementedError, …
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            what = f"cannot be represented: {str(cause).splitlines()[0] if str(cause) else type(cause).__name__}"
            raise LoadError(what, where=where, hint="check it with onnx.checker.check_model") from error


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Hold back warnings of a logger: what they say was checked before, or becomes an error."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _set_base(model: ir.Model, base: pathlib.Path) -> None:
    ir.external_data.set_base_dir(model.graph, base)
    for function in model.functions.values():
        ir.external_data.set_base_dir(function.graph, base)


def _free_initializers(model: ir.Model) -> list[str]:
    """Before IR version 4 every initializer had to be listed as an input; they are constants nevertheless."""
    listed = [value for value in model.graph.inputs if value.is_initializer()]
    for value in listed:
        model.graph.inputs.remove(value)
    return [f"{len(listed)} weights that IR version 3 lists as inputs are constants"] if listed else []


def _sort(model: ir.Model, where: str) -> list[str]:
    """Put nodes in topological order where a file has them in another."""
    try:
        changed = common.TopologicalSortPass()(model).modified
    except Exception as error:
        raise LoadError("its nodes depend on each other in a circle", where=where, hint="export it again") from error
    return ["its nodes were not in topological order and have been sorted"] if changed else []


def save_onnx(
    module: Module, path: str | os.PathLike[str], *, inline: bool = False, external: bool | None = None
) -> None:
    """Write the module as an ONNX file, and its weights to ``<path>.data`` when they exceed 1 MiB in sum.

    Both files are written beside ``path`` under other names and renamed when complete, the model last; a process
    killed at any moment leaves the old model, none, or the new one. Weights are copied one at a time, external ones
    from file to file, so memory stays bounded by the largest in-memory weight.

    Args:
        module: What to write; it is not changed.
        path: The file to write.
        inline: Replace calls of model-local functions by their bodies, for tools that cannot read functions.
        external: Force (True) or forbid (False) a data file.

    Raises:
        UserError: When the folder is missing, or the file to write is where the module's weights are read from.
    """
    path = pathlib.Path(path)
    model = _with_data_inside_attributes(_inlined(module.model) if inline else module.model)
    if external is None:
        external = initializer_bytes(model) > _EXTERNAL_FROM
    data = path.with_name(f"{path.name}.data")
    _check_target(model, path, data)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        new = pathlib.Path(folder) / path.name
        ir.save(model, new, external_data=data.name if external else None)
        path.unlink(missing_ok=True)
        if external and new.with_name(data.name).exists():
            os.replace(new.with_name(data.name), data)
        os.replace(new, path)


def _inlined(model: ir.Model) -> ir.Model:
    if not model.functions:
        return model
    steps = ir.passes.Sequential(
        common.InlinePass(),
        common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        common.RemoveUnusedOpsetsPass(),
        common.NameFixPass(),
    )
    try:
        return steps(model.clone()).model
    except ir.passes.PassError as error:
        what = f"functions cannot be inlined: {str(error.__cause__ or error).splitlines()[0]}"
        raise UnsupportedError(what, hint="write the model with inline=False") from error


def _with_data_inside_attributes(model: ir.Model) -> ir.Model:
    """Tensors in attributes stay in the model file, so those mapped from a data file are read into it."""

    def external(attr: ir.Attr) -> bool:
        return attr.type == ir.AttributeType.TENSOR and isinstance(attr.value, ir.ExternalTensor)

    if not any(external(attr) for node in _all_nodes(model) for attr in node.attributes.values()):
        return model
    copy = model.clone()
    for node in _all_nodes(copy):
        for attr in list(node.attributes.values()):
            if external(attr):
                source = attr.as_tensor()
                node.attributes.add(ir.AttrTensor(attr.name, ir.tensor(source.numpy(), source.dtype, name=source.name)))
    return copy


def _all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def _check_target(model: ir.Model, path: pathlib.Path, data: pathlib.Path) -> None:
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {str(path.parent)!r}", hint="create it, or choose another path")
    if path.is_dir():
        raise UserError(f"{str(path)!r} is a folder", hint="give the name of the file to write")
    tensors = [value.const_value for graph in model.graphs() for value in graph.initializers.values()]
    for source in {tensor.path for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}:
        if data.exists() and os.path.samefile(source, data):
            what = f"writing {str(path)!r} would overwrite {source!r}, which the model's weights are read from"
            raise UserError(what, hint="write to another name or folder")
