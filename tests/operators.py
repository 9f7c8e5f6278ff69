"""Models of a few nodes, written as text, for tests of operator lowerings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np
import onnx

from tests.programs import Example

NAMES = {
    "float32": "float",
    "float64": "double",
    "float16": "float16",
    "bfloat16": "bfloat16",
    **{name: name for name in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool")},
}
"""Names of element types in the text form of ONNX."""

Extents = Mapping[str, Sequence[int | str]]


def numbers(*shape: int, dtype: str = "float32", seed: int = 0, low: float = -3, high: float = 3) -> np.ndarray:
    """Evenly distributed numbers from ``low`` to ``high``."""
    random = np.random.default_rng(seed)
    if dtype == "bool":
        return np.asarray(random.random(shape) < 0.5)
    return np.asarray(
        random.random(shape) * (high - low) + low, dtype=ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    )


def example(
    body: str,
    feeds: Mapping[str, np.ndarray],
    *,
    symbolic: Extents | None = None,
    outputs: Sequence[str] = ("y",),
    want: Sequence[np.ndarray] | None = None,
    opset: int = 21,
) -> Example:
    """A model of the nodes in ``body``.

    Args:
        body: Statements of ONNX's text form.
        feeds: Inputs.
        symbolic: Extents the model states for inputs, instead of those of ``feeds``.
        outputs: Names of the outputs.
        want: Expected outputs; onnxruntime's when absent.
        opset: Version of the standard operators.
    """
    stated = {name: list(array.shape) for name, array in feeds.items()} | dict(symbolic or {})
    inputs = ", ".join(f"{NAMES[str(a.dtype)]}{_extents(stated[name])} {name}" for name, a in feeds.items())
    text = f'<ir_version: 10, opset_import: ["" : {opset}]>\ng ({inputs}) => ({", ".join(outputs)}) {{ {body} }}'
    model = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text), data_prop=True)
    return Example(f"{body} for {stated}", model, feeds, want)


def _extents(shape: Sequence[int | str]) -> str:
    """Extents in the text form, where a scalar has no brackets."""
    return f"[{', '.join(map(str, shape))}]" if shape else ""
