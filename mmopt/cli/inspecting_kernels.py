"""What ``mmopt inspect ARTIFACT --kernels`` says: every kernel, why it is as it is, and how fast it runs here."""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mmopt.cli.arrays import read_arrays
from mmopt.cli.output import Output, table, time_text
from mmopt.errors import MmoptError, UnsupportedError
from mmopt.runtime import load_artifact
from mmopt.runtime.profiling import KernelTime, ModelTime, time_kernels
from mmopt.runtime.store import Store, open_store

if TYPE_CHECKING:
    from mmopt.autotune.peak import Peaks

COLUMNS = ("kernel", "template", "workload", "parameters", "chosen by", "calls", "predicted", "measured", "rate")

DEVICE_COLUMNS = ("on the GPU", "threads", "registers", "shared bytes", "stack bytes", "spilled bytes", "occupancy")


@dataclasses.dataclass(frozen=True)
class Row:
    """One kernel.

    Attributes:
        record: What the manifest says about it.
        timed: How long it took here; None when it was not measured, or is not part of ``main``.
        share: Fraction of the model's time.
        predicted: Seconds of all its calls by the template's own model; None without one, or without a peak.
        rate: Operations or bytes a second; None when nobody counts them.
        of_peak: ``rate`` as a fraction of the machine's peak.
    """

    record: Mapping[str, Any]
    timed: KernelTime | None = None
    share: float | None = None
    predicted: float | None = None
    rate: float | None = None
    of_peak: float | None = None

    @property
    def counts_operations(self) -> bool:
        return bool(self.record.get("operations"))

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values; times are in seconds, rates in operations or bytes a second."""
        return {
            **self.record,
            "measured_calls": self.timed.calls if self.timed else None,
            "measured_seconds": self.timed.seconds if self.timed else None,
            "predicted_seconds": self.predicted,
            "rate": self.rate,
            "rate_unit": "operations/s" if self.counts_operations else "bytes/s",
            "share_of_peak": self.of_peak,
            "share_of_time": self.share,
        }


def inspect_kernels(
    path: pathlib.Path, show: Output, *, inputs: pathlib.Path | None, shapes: Sequence[str], threads: int | None
) -> None:
    """Print and write the kernels of the artifact at ``path``, measured when it can run here.

    Raises:
        LoadError: It is not an artifact, or a damaged one.
        UserError: Inputs that do not fit.
    """
    store = open_store(path)
    timed, peaks, why, manifest = None, None, "", store.manifest
    try:
        session = load_artifact(path, threads)
    except UnsupportedError as error:
        why = error.what
    else:
        manifest = session.manifest
        with session:
            values = _inputs(store, inputs, shapes)
            timed = time_kernels(session, values)
            peaks, no_peak = _peaks(manifest.kernels, session.threads)
    rows = rows_of(manifest.kernels, timed, peaks)
    show.result(table((*COLUMNS, "of peak", "of time"), [_cells(row) for row in rows]))
    if device := _on_device(manifest.kernels):
        show.result(table(DEVICE_COLUMNS, device))
    if timed is None:
        show.result(f"not measured: {why}")
    else:
        _tell_measured(show, rows, timed, peaks, no_peak)
    show.json(
        {
            "path": str(path),
            "target": manifest.target,
            "measured": timed is not None,
            "reason": why,
            "model_seconds": timed.seconds if timed else None,
            "runs": timed.runs if timed else 0,
            "peaks": peaks.to_json() if peaks else None,
            "kernels": [row.to_json() for row in rows],
        }
    )


def _inputs(store: Store, path: pathlib.Path | None, shapes: Sequence[str]) -> dict[str, Any]:
    if path is not None:
        return read_arrays(path, store.manifest.entries["main"].inputs)
    from mmopt.bench.inputs import made_up_inputs
    from mmopt.frontends.onnx import load_onnx
    from mmopt.loading import parse_shapes
    from mmopt.runnable import OPTIMIZED

    return made_up_inputs(load_onnx(store.file(OPTIMIZED)), parse_shapes(shapes))


def _peaks(kernels: Sequence[Mapping[str, Any]], threads: int) -> tuple[Peaks | None, str]:
    """The machine's peaks, or why they are not known."""
    if importlib.util.find_spec("tvm") is None:
        return None, "TVM's compiler is not installed"
    from mmopt.autotune.peak import kind_of, measure_peaks
    from mmopt.backends.profile import native_profile

    try:
        return measure_peaks(native_profile(), threads, [kind_of(_dtypes(kernel)) for kernel in kernels]), ""
    except MmoptError as error:
        return None, error.what


def _dtypes(kernel: Mapping[str, Any]) -> list[str]:
    return str(kernel.get("workload", "")).rpartition(":")[2].split(",")


def rows_of(kernels: Sequence[Mapping[str, Any]], timed: ModelTime | None, peaks: Peaks | None) -> list[Row]:
    """The kernels, those that take longest first."""
    times = {kernel.name: kernel for kernel in timed.kernels} if timed else {}
    rows = [_row(kernel, times.get(str(kernel["name"])), timed, peaks) for kernel in kernels]
    return sorted(rows, key=lambda row: -(row.timed.seconds if row.timed else 0.0))


def _row(kernel: Mapping[str, Any], time: KernelTime | None, model: ModelTime | None, peaks: Peaks | None) -> Row:
    calls = time.calls if time else int(kernel["calls"])
    predicted = None
    if peaks and peaks.cycles and kernel.get("cycles") and not (_open(kernel) or kernel.get("device")):
        predicted = calls * float(kernel["cycles"]) / (peaks.cycles * peaks.threads)
    if time is None or model is None:
        return Row(kernel, predicted=predicted)
    share = time.seconds / model.seconds
    amount = None if _open(kernel) else kernel.get("operations") or kernel.get("bytes")
    if not amount or not time.seconds:
        return Row(kernel, time, share, predicted)
    rate = calls * float(amount) / time.seconds
    return Row(kernel, time, share, predicted, rate, _of_peak(kernel, rate, peaks))


def _open(kernel: Mapping[str, Any]) -> bool:
    """Whether sizes are open, so that what the kernel does here is not what was predicted."""
    return "=?" in str(kernel.get("workload", ""))


def _of_peak(kernel: Mapping[str, Any], rate: float, peaks: Peaks | None) -> float | None:
    if peaks is None:
        return None
    if not kernel.get("operations"):
        share = rate / peaks.bandwidth
        return share if share <= 1 else None  # more than memory gives: it was in the caches
    from mmopt.autotune.peak import kind_of

    peak = peaks.operations.get(kind_of(_dtypes(kernel)))
    return rate / peak if peak else None


def _on_device(kernels: Sequence[Mapping[str, Any]]) -> list[tuple[object, ...]]:
    """What each kernel takes of a GPU's multiprocessor, as the compiler said."""
    keys = ("threads", "registers", "shared", "stack", "spills")
    parts = [(kernel["name"], part) for kernel in kernels for part in kernel.get("device", ())]
    filled = [f"{part['occupancy']:.0%}" if "occupancy" in part else "-" for _, part in parts]
    return [(name, *(part.get(key, "-") for key in keys), f) for (name, part), f in zip(parts, filled, strict=True)]


def _cells(row: Row) -> tuple[object, ...]:
    record = row.record
    candidates = record.get("candidates")
    chosen = "" if candidates is None else f"{'measured' if record['measured'] else 'predicted'}, of {candidates}"
    unit = "Gop/s" if row.counts_operations else "GB/s"
    return (
        record["name"],
        record["template"],
        record.get("workload", ""),
        " ".join(f"{key}={value}" for key, value in record.get("parameters", {}).items()),
        chosen,
        row.timed.calls if row.timed else record["calls"],
        "-" if row.predicted is None else time_text(row.predicted),
        "-" if row.timed is None else time_text(row.timed.seconds),
        "-" if row.rate is None else f"{row.rate / 1e9:.1f} {unit}",
        "-" if row.of_peak is None else f"{row.of_peak:.0%}",
        "-" if row.share is None else f"{row.share:.1%}",
    )


def _tell_measured(show: Output, rows: Sequence[Row], timed: ModelTime, peaks: Peaks | None, no_peak: str) -> None:
    inside = sum(row.timed.seconds for row in rows if row.timed)
    rest = max(0.0, timed.seconds - inside)
    show.result(
        f"model: {time_text(timed.seconds)}, median of {timed.runs} runs; {time_text(inside)} in these kernels, "
        f"{time_text(rest)} in what is around them"
    )
    if peaks is None:
        show.result(f"peak: not known, because {no_peak}")
        return
    kinds = ", ".join(f"{kind} {rate / 1e9:.0f} Gop/s" for kind, rate in peaks.operations.items())
    plural = "s" if peaks.threads > 1 else ""
    show.result(
        f"peak, measured in this run with {peaks.threads} thread{plural}: {kinds}, "
        f"reading memory {peaks.bandwidth / 1e9:.1f} GB/s"
    )
