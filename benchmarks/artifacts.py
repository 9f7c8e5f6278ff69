"""Every reference model through optimize → artifact → run, against onnxruntime on the model as it was exported.

``python -m benchmarks.artifacts FOLDER [--models bert-base,…] [--json FILE]``

FOLDER holds exports (``NAME/b1.onnx``, ``NAME/b3.onnx``, ``NAME/dyn.onnx``), which are made when missing. A static
export is run at its batch, a dynamic one at batches 1 and 3. A line passes when the largest error is at most 1e-4 of
the output's range and nothing falls back to onnxruntime.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

import numpy as np
import onnxruntime

import mmopt
from benchmarks.zoo import ZOO, ZooModel
from mmopt.errors import MmoptError

TOLERANCE = 1e-4
EXPORTS = {"b1": (1,), "b3": (3,), "dyn": (1, 3)}


@dataclasses.dataclass
class Line:
    """One export at one batch.

    Attributes:
        model: Name in the zoo.
        export: ``b1``, ``b3`` or ``dyn``.
        batch: Batch it was run at.
        error: Largest absolute error over the output's range, over all outputs.
        native: Nothing was left to onnxruntime.
        seconds: Time of load, optimize and compile together.
        problem: What went wrong, or "".
    """

    model: str
    export: str
    batch: int
    error: float = float("nan")
    native: bool = False
    seconds: float = 0.0
    problem: str = ""

    @property
    def ok(self) -> bool:
        return not self.problem and self.native and self.error <= TOLERANCE


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Largest absolute difference over the range of ``expected``; infinite when shapes or NaN patterns differ."""
    if actual.shape != expected.shape or not np.array_equal(np.isnan(actual), np.isnan(expected)):
        return float("inf")
    if expected.size == 0:
        return 0.0
    difference = np.nanmax(np.abs(actual.astype(np.float64) - expected.astype(np.float64)), initial=0.0)
    extent = float(np.nanmax(np.abs(expected.astype(np.float64)), initial=0.0))
    return float(difference / extent) if extent else float(difference)


def check_export(model: ZooModel, export: str, source: pathlib.Path, work: pathlib.Path) -> Iterator[Line]:
    """Compile one export and run it at its batches."""
    start = time.perf_counter()
    artifact = work / f"{model.name}-{export}.mmopt"
    try:
        result = mmopt.optimize(mmopt.load(source), target="cpu", level=2, seed=0)
        mmopt.compile(result.module, target="cpu", output=artifact)
        session = mmopt.load_artifact(artifact)
    except MmoptError as error:
        yield Line(model.name, export, 0, problem=str(error))
        return
    seconds = time.perf_counter() - start
    manifest = json.loads((artifact / "manifest.json").read_text())
    entries = manifest["entries"].values()
    native = all(segment["kind"] == "native" for entry in entries for segment in entry["segments"])
    reference = onnxruntime.InferenceSession(str(source), providers=["CPUExecutionProvider"])
    for batch in EXPORTS[export]:
        inputs = model.inputs(batch=batch, seed=batch)
        names = [output.name for output in reference.get_outputs()]
        expected = dict(zip(names, reference.run(None, inputs), strict=True))
        actual = session.run(inputs)
        error = max(relative_error(np.asarray(actual[name]), np.asarray(expected[name])) for name in names)
        yield Line(model.name, export, batch, error, native, seconds)


def source_of(model: ZooModel, export: str, folder: pathlib.Path) -> pathlib.Path:
    """The exported model, made when it is missing."""
    path = folder / model.name / f"{export}.onnx"
    if path.is_file():
        return path
    batch = EXPORTS[export][0]
    return model.export(folder / model.name / export, batch=batch, dynamic=export == "dyn")


def check_all(names: Sequence[str], folder: pathlib.Path, exports: Sequence[str] = tuple(EXPORTS)) -> Iterator[Line]:
    """All exports of the models called ``names``."""
    for name in names:
        model = ZOO[name]
        if model.missing():
            yield Line(name, "-", 0, problem=f"left out: {model.missing()}")
            continue
        for export in exports:
            with tempfile.TemporaryDirectory(prefix="mmopt-artifacts-") as work:
                yield from check_export(model, export, source_of(model, export, folder), pathlib.Path(work))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 when every line passes, else 5.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--models", default=",".join(sorted(ZOO)))
    parser.add_argument("--exports", default=",".join(EXPORTS))
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args(arguments)
    lines: list[Line] = []
    print("| model | export | batch | error | native | s | |\n| --- | --- | ---: | ---: | --- | ---: | --- |")
    for line in check_all(options.models.split(","), options.folder, options.exports.split(",")):
        lines.append(line)
        verdict = "ok" if line.ok else line.problem or "FAILED"
        cells = (line.model, line.export, line.batch, f"{line.error:.1e}", line.native, f"{line.seconds:.1f}", verdict)
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    if options.json:
        rows = [{**dataclasses.asdict(line), "ok": line.ok} for line in lines]
        options.json.write_text(json.dumps({"schema_version": 1, "tolerance": TOLERANCE, "lines": rows}, indent=1))
    return 0 if all(line.ok for line in lines) else 5


if __name__ == "__main__":
    sys.exit(main())
