"""Statistics in a file: an uncompressed ``.npz``, read without pickling."""

from __future__ import annotations

import json
import pathlib
import zipfile
from typing import Any

import numpy as np

from mmopt.analysis.calibration.collect import Calibration
from mmopt.analysis.calibration.statistics import SIDE, Array, ChannelStatistics, Histogram, TensorStatistics
from mmopt.errors import UserError

SCHEMA_VERSION = 2
_CHANNEL_FIELDS = ("low", "high", "total", "magnitude", "squares")


def save(calibration: Calibration, path: pathlib.Path) -> None:
    """Write ``calibration`` to ``path``, in one step.

    Raises:
        UserError: It cannot be written.
    """
    arrays: dict[str, Array] = {}
    entries = [_entry(number, name, found, arrays) for number, (name, found) in enumerate(calibration.tensors.items())]
    head = {
        "schema_version": SCHEMA_VERSION,
        "samples": calibration.samples,
        "source": calibration.source,
        "tensors": entries,
    }
    arrays["head"] = np.frombuffer(json.dumps(head).encode(), np.uint8)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"statistics cannot be written: {error.strerror}", where=str(path)) from error


def _entry(number: int, name: str, found: TensorStatistics, arrays: dict[str, Array]) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": name,
        "low": found.low,
        "high": found.high,
        "count": found.count,
        "infinite": found.infinite,
        "exponent": found.histogram.exponent,
    }
    used = np.flatnonzero(found.histogram.counts)
    arrays[f"{number}.bins"], arrays[f"{number}.counts"] = used, found.histogram.counts[used]
    if found.channels is not None:
        entry["axis"], entry["rows"] = found.channels.axis, found.channels.count
        for field in _CHANNEL_FIELDS:
            arrays[f"{number}.{field}"] = getattr(found.channels, field)
    if found.gram is not None:
        arrays[f"{number}.gram"] = found.gram
    return entry


def load(path: pathlib.Path) -> Calibration:
    """Read what :func:`save` wrote.

    Raises:
        UserError: It is no file of statistics, or of another version.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            head = json.loads(bytes(stored["head"]))
            if head["schema_version"] != SCHEMA_VERSION:
                raise UserError(
                    f"has version {head['schema_version']} of the statistics, not {SCHEMA_VERSION}",
                    where=str(path),
                    hint="calibrate again",
                )
            tensors = {e["name"]: _statistics(n, e, stored) for n, e in enumerate(head["tensors"])}
            return Calibration(tensors, int(head["samples"]), str(head["source"]))
    except (OSError, EOFError, zipfile.BadZipFile, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"holds no statistics: {error}", where=str(path), hint="write it with mmopt calibrate"
        ) from error


def _statistics(number: int, entry: dict[str, Any], stored: Any) -> TensorStatistics:
    counts = np.zeros(2 * SIDE, np.int64)
    counts[stored[f"{number}.bins"]] = stored[f"{number}.counts"]
    channels = None
    if "axis" in entry:
        fields = {field: stored[f"{number}.{field}"] for field in _CHANNEL_FIELDS}
        channels = ChannelStatistics(entry["axis"], count=entry["rows"], **fields)
    gram = stored[f"{number}.gram"] if f"{number}.gram" in stored.files else None
    histogram = Histogram(entry["exponent"], counts)
    return TensorStatistics(histogram, entry["low"], entry["high"], entry["count"], entry["infinite"], channels, gram)
