"""``weights.safetensors``: written so that every tensor can be used where it lies, and memory-mapped.

The format (https://github.com/huggingface/safetensors) is a length, a JSON header and the bytes of all tensors without
gaps. It promises no alignment, so the header is padded with spaces and the gaps are tensors of their own, whose names
start with :data:`PADDING`. Any reader of the format reads the file.
"""

from __future__ import annotations

import json
import math
import mmap
import pathlib
import struct
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np

from mmopt.errors import LoadError
from mmopt.runtime.encoded import Encoded
from mmopt.runtime.tensors import ALIGNMENT, Array, dtype_name, numpy_dtype

PADDING = "__padding__."
"""Prefix of the names of tensors that only fill gaps."""

INTEGERS, SCALES, FACTS = "__integers__.", "__scales__.", "__encoded__."
"""Prefixes of the parts of a weight that is stored in integers: two tensors, and an entry of the metadata."""

_MAX_HEADER = 100 << 20
_CODES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "float16": "F16",
    "bfloat16": "BF16",
    "uint32": "U32",
    "int32": "I32",
    "float32": "F32",
    "uint64": "U64",
    "int64": "I64",
    "float64": "F64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
_NAMES = {code: name for name, code in _CODES.items()}


def write_weights(
    weights: Mapping[str, Array], path: pathlib.Path, encoded: Mapping[str, Encoded] | None = None
) -> None:
    """Write ``weights``, each starting at a multiple of :data:`~mmopt.runtime.tensors.ALIGNMENT` bytes of the file.

    Dtypes the format does not have are stored as bytes; their names stand in its metadata. A weight with an entry in
    ``encoded`` is stored in that form.
    """
    header: dict[str, Any] = {}
    other_dtypes: dict[str, str] = {}
    offset = 0
    weights = dict(_taken_apart(weights, encoded or {}, other_dtypes))
    for name, array in weights.items():
        dtype = dtype_name(array)
        shape = list(array.shape)
        if dtype not in _CODES:
            other_dtypes[name] = json.dumps({"dtype": dtype, "shape": shape})
            shape = [array.nbytes]
        header[name] = {
            "dtype": _CODES.get(dtype, "U8"),
            "shape": shape,
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
        gap = -offset % ALIGNMENT
        if gap:
            filler = {"dtype": "U8", "shape": [gap], "data_offsets": [offset, offset + gap]}
            header[f"{PADDING}{len(header)}"] = filler
            offset += gap
    if other_dtypes:
        header["__metadata__"] = other_dtypes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in weights.values():
            _write_array(file, array)


def _taken_apart(
    weights: Mapping[str, Array], encoded: Mapping[str, Encoded], metadata: dict[str, str]
) -> Iterator[tuple[str, Array]]:
    """The tensors to write; what puts encoded ones together again goes into ``metadata``."""
    for name, array in weights.items():
        if name not in encoded:
            yield name, array
            continue
        integers, scales, facts = encoded[name].parts()
        metadata[FACTS + name] = json.dumps(facts)
        yield INTEGERS + name, integers
        yield SCALES + name, scales


def _write_array(file: BinaryIO, array: Array) -> None:
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    if little.nbytes:
        file.write(little.reshape(-1).view(np.uint8).data)
    file.write(b"\0" * (-little.nbytes % ALIGNMENT))


def map_weights(path: pathlib.Path, offset: int = 0, size: int | None = None) -> dict[str, Array]:
    """The tensors of a safetensors file, as views of one private mapping of it.

    Args:
        path: The file, or one that contains it.
        offset: Where in ``path`` it starts, in bytes.
        size: Its length in bytes; None for all that is left.

    Raises:
        LoadError: The file is damaged: sizes that do not fit, unknown dtypes.
    """
    size = path.stat().st_size - offset if size is None else size
    if size < 8:
        raise LoadError("the weight file is cut off", where=str(path))
    page_start = offset - offset % mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as file:
        # Copy-on-write, because readonly arrays cannot cross DLPack; pages stay shared with all other processes.
        mapped = mmap.mmap(file.fileno(), size + offset - page_start, access=mmap.ACCESS_COPY, offset=page_start)
    data = np.frombuffer(mapped, np.uint8)[offset - page_start :]
    try:
        return _put_together(*_views(data))
    except (KeyError, TypeError, ValueError) as error:
        raise LoadError(f"the weight file is damaged: {error}", where=str(path)) from error


def _put_together(tensors: dict[str, Array], metadata: Mapping[str, str]) -> dict[str, Array]:
    """The weights: encoded ones are decoded into memory of their own."""
    for name in [key.removeprefix(FACTS) for key in metadata if key.startswith(FACTS)]:
        parts = tensors.pop(INTEGERS + name), tensors.pop(SCALES + name)
        tensors[name] = Encoded.joined(*parts, json.loads(metadata[FACTS + name])).decoded()
    return tensors


def _views(data: Array) -> tuple[dict[str, Array], dict[str, str]]:
    """The tensors in the file, and its metadata."""
    (length,) = struct.unpack("<Q", data[:8].tobytes())
    if length > min(_MAX_HEADER, data.nbytes - 8):
        raise ValueError(f"its header claims {length} bytes")
    header = json.loads(data[8 : 8 + length].tobytes())
    other_dtypes = header.pop("__metadata__", {})
    body = data[8 + length :]
    found: dict[str, Array] = {}
    for name, entry in header.items():
        if name.startswith(PADDING):
            continue
        start, end = entry["data_offsets"]
        shape, dtype = entry["shape"], _NAMES.get(entry["dtype"], entry["dtype"])
        if name in other_dtypes:
            other = json.loads(other_dtypes[name])
            shape, dtype = other["shape"], other["dtype"]
        kind = numpy_dtype(dtype)
        if not 0 <= start <= end <= body.nbytes or math.prod(shape) * kind.itemsize != end - start:
            raise ValueError(f"tensor {name!r} claims bytes {start} to {end} for {dtype}{shape}")
        found[name] = body[start:end].view(kind).reshape(shape)
    return found, other_dtypes
