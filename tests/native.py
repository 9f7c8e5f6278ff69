"""Compiles small models in the textual syntax of ONNX, runs the artifacts and compares them with onnxruntime."""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

import mmopt
from mmopt.runtime.artifact import Segment


@dataclasses.dataclass
class Compiled:
    """An artifact's outputs and how it is made up.

    Attributes:
        outputs: Outputs by name, for each set of inputs.
        segments: Segments of ``main``.
        notes: The compiler's notes.
    """

    outputs: list[dict[str, Any]]
    segments: tuple[Segment, ...]
    notes: list[str]

    @property
    def kinds(self) -> list[str]:
        """The engines, in order."""
        return [segment.kind for segment in self.segments]


def compiled(model: onnx.ModelProto | str | pathlib.Path, *feeds: Mapping[str, Any]) -> Compiled:
    """Compile ``model`` and run it on each of ``feeds``; every output must equal onnxruntime's."""
    with tempfile.TemporaryDirectory(prefix="test-") as folder:
        path = model if isinstance(model, pathlib.Path) else pathlib.Path(folder, "model.onnx")
        if isinstance(model, str):
            model = onnx.parser.parse_model(model)
        if isinstance(model, onnx.ModelProto):
            onnx.save(model, path)
        module = mmopt.optimize(mmopt.load(path), level=2, validate="off").module
        built = mmopt.compile(module, output=pathlib.Path(folder, "a.mmopt"), entries={}, inputs=feeds)
        reference = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        outputs = []
        with mmopt.load_artifact(built.path, threads=1) as session:
            for feed in feeds:
                outputs.append(session.run(feed))
                expected = dict(
                    zip([o.name for o in reference.get_outputs()], reference.run(None, dict(feed)), strict=True)
                )
                for name, value in expected.items():
                    np.testing.assert_allclose(outputs[-1][name], value, rtol=1e-5, atol=1e-5, err_msg=name)
        return Compiled(outputs, built.manifest.entries["main"].segments, list(built.manifest.notes))
