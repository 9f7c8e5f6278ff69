"""Numerical agreement of two sets of outputs: the one place where tolerances are decided."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from mmopt.ir.module import Module
from mmopt.pipeline.base import Fidelity

_RELATIVE: dict[Fidelity, dict[str, float]] = {
    # Exact rewrites leave every operation as it was; what remains is a runtime that sums in another order when the
    # layout of an operand changes, and constants folded by another library's erf or exp: a few units in the last place.
    Fidelity.EXACT: {
        "float64": 1e-12,
        "float32": 2e-6,
        "float16": 2e-3,
        "bfloat16": 1.6e-2,
        "8-bit": 1e-2,
        "4-bit": 1e-2,
    },
    # Reassociation errors grow with depth: about 1000 units in the last place of float32 for a whole network.
    Fidelity.ROUNDING: {
        "float64": 1e-9,
        "float32": 1e-4,
        "float16": 1e-2,
        "bfloat16": 4e-2,
        "8-bit": 1e-1,
        "4-bit": 3e-1,
    },
}
_LAST_PLACES = {
    "float64": 2.0**-50,
    "float32": 2.0**-21,
    "float16": 2.0**-8,
    "bfloat16": 2.0**-5,
    "8-bit": 2.0**-3,
    "4-bit": 2.0**-3,
}
"""Part of the largest value that an output of this dtype is always granted, as it cannot do better far from zero: four
units in the last place, one for the 8-bit formats."""
_QUANTIZING = ("QuantizeLinear", "DynamicQuantizeLinear", "DequantizeLinear")
_FEW_BITS = {ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.INT2, ir.DataType.UINT2}
_GRAIN = 2.0**-25
"""The last place of numbers just below one half. onnxruntime computes a sigmoid as one half plus a remainder, so its
small probabilities are multiples of this, however small they are: a reference like that is right to some grains, not to
its own last places."""
_OUTLIER = 1e4
"""Values this many times the median magnitude do not count for the range: a mask's -1e9 would hide the rest."""


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """How far an output may be from the reference.

    Attributes:
        relative: Largest error as a fraction of the output's range. Infinite: values are not compared.
        fraction: Part of an 8-bit integer output's elements that may be off by one step.
    """

    relative: float
    fraction: float = 0.0


@dataclasses.dataclass(frozen=True)
class OutputComparison:
    """One output, compared.

    Attributes:
        name: Name of the output.
        dtype: Its dtype, or ``sequence``/``optional``.
        shape: Its shape ([] for a sequence).
        max_abs_error: Largest absolute difference of two finite elements.
        relative_error: The same as a fraction of the reference's range.
        range: Largest minus smallest finite element of the reference, outliers left out.
        mismatched_fraction: Part of the elements beyond the tolerance.
        nonfinite: Elements that are NaN or infinite in the reference.
        tolerance: The bound on ``relative_error``.
        reason: Why the outputs disagree, or "".
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    max_abs_error: float = 0.0
    relative_error: float = 0.0
    range: float = 0.0
    mismatched_fraction: float = 0.0
    nonfinite: int = 0
    tolerance: float = 0.0
    reason: str = ""

    @property
    def ok(self) -> bool:
        """Whether the outputs agree."""
        return not self.reason

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON-ready values: errors that are not finite become None."""
        values = dataclasses.asdict(self)
        finite = {key: _finite_or_none(value) for key, value in values.items()}
        return {**finite, "shape": list(self.shape), "ok": self.ok}


def working_precision(module: Module) -> str:
    """The coarsest number format that ``module`` computes in; rounding shows up at that scale in every output.

    Returns:
        ``4-bit`` (weights of 4 bits or fewer), ``8-bit`` (quantization or float8 inside), ``bfloat16``, ``float16``,
        ``float32``, or ``float64`` when nothing coarser occurs.
    """
    seen: set[ir.DataType | None] = set()
    quantized = False
    for graph in (*module.model.graphs(), *(function.graph for function in module.model.functions.values())):
        seen.update(value.dtype for value in (*graph.inputs, *graph.initializers.values()))
        for node in graph:
            quantized = quantized or node.op_type in _QUANTIZING
            seen.update(value.dtype for value in node.outputs)
            if node.op_type == "Cast":  # passes may leave the type of its output for inference
                seen.add(ir.DataType(node.attributes.get_int("to", 0)))
    if quantized:
        return "4-bit" if seen & _FEW_BITS else "8-bit"
    if any(dtype is not None and dtype.name.startswith(("FLOAT8", "FLOAT6", "FLOAT4")) for dtype in seen):
        return "8-bit"
    for dtype in (ir.DataType.BFLOAT16, ir.DataType.FLOAT16, ir.DataType.FLOAT):
        if dtype in seen:
            return {"FLOAT": "float32"}.get(dtype.name, dtype.name.lower())
    # Nothing known says float64; an unannotated model is most likely float32.
    return "float64" if ir.DataType.DOUBLE in seen else "float32"


def tolerance_for(fidelity: Fidelity, precision: str = "float32", *, bound: float | None = None) -> Tolerance:
    """The tolerance that follows from a fidelity and the coarsest number format.

    Args:
        fidelity: What the pass declares.
        precision: From :func:`working_precision`.
        bound: A ``LOSSY`` pass's own bound on the relative error, if it has one.
    """
    if fidelity is Fidelity.LOSSY:
        return Tolerance(math.inf if bound is None else bound, fraction=1.0)
    fraction = 0.01 if fidelity is Fidelity.ROUNDING else 0.0
    return Tolerance(_RELATIVE[fidelity][precision], fraction)


def compare(reference: Any, actual: Any, tolerance: Tolerance | Fidelity, *, name: str = "") -> OutputComparison:
    """Compare one output with its reference.

    Args:
        reference: An array, a list of arrays, or None.
        actual: What is compared with it.
        tolerance: How far it may be off; a fidelity stands for its tolerance in the reference's own dtype.
        name: The output's name, for the report.
    """
    if isinstance(reference, list | tuple):
        return _compare_sequence(reference, actual, tolerance, name)
    if reference is None or actual is None:
        reason = "" if reference is actual else f"one is empty: {type(reference).__name__}, {type(actual).__name__}"
        return OutputComparison(name, "optional", (), reason=reason)
    if isinstance(reference, Mapping):
        return OutputComparison(name, "map", (), reason="" if reference == actual else "the maps differ")
    reference, actual = np.asarray(reference), np.asarray(actual)
    if isinstance(tolerance, Fidelity):
        tolerance = tolerance_for(tolerance, _precision_of(reference.dtype))
    if reference.dtype != actual.dtype and not _both_text(reference, actual):
        return _different(name, reference, f"dtype is {actual.dtype}, should be {reference.dtype}")
    if reference.shape != actual.shape:
        return _different(name, reference, f"shape is {list(actual.shape)}, should be {list(reference.shape)}")
    if _is_float(reference.dtype):
        return _compare_floats(reference, actual, tolerance, name)
    return _compare_discrete(reference, actual, tolerance, name)


def compare_outputs(
    reference: Mapping[str, Any], actual: Mapping[str, Any], tolerance: Tolerance | Fidelity
) -> list[OutputComparison]:
    """Compare every output of ``reference`` with that of the same name; a missing one is a disagreement."""
    compared = []
    for name, value in reference.items():
        if name in actual:
            compared.append(compare(value, actual[name], tolerance, name=name))
        else:
            compared.append(OutputComparison(name, "", (), mismatched_fraction=1.0, reason="the output is missing"))
    return compared


def worst(comparisons: Sequence[OutputComparison]) -> OutputComparison | None:
    """The comparison that disagrees most: failures first, then by relative error. None when there are none."""
    return max(comparisons, key=lambda found: (not found.ok, found.relative_error), default=None)


def _compare_sequence(
    reference: Sequence[Any], actual: Any, tolerance: Tolerance | Fidelity, name: str
) -> OutputComparison:
    if not isinstance(actual, list | tuple):
        return OutputComparison(name, "sequence", (), reason=f"is a {type(actual).__name__}, should be a sequence")
    if len(reference) != len(actual):
        reason = f"has {len(actual)} elements, should have {len(reference)}"
        return OutputComparison(name, "sequence", (), mismatched_fraction=1.0, reason=reason)
    pairs = zip(reference, actual, strict=True)
    found = worst([compare(mine, theirs, tolerance, name=name) for mine, theirs in pairs])
    return OutputComparison(name, "sequence", ()) if found is None else dataclasses.replace(found, dtype="sequence")


def _compare_floats(
    reference: np.ndarray[Any, Any], actual: np.ndarray[Any, Any], tolerance: Tolerance, name: str
) -> OutputComparison:
    expected, found = _as_float64(reference), _as_float64(actual)
    finite = np.isfinite(expected)
    agree = np.where(finite, np.isfinite(found), (expected == found) | (np.isnan(expected) & np.isnan(found)))
    both = finite & np.isfinite(found)
    ordinary = finite & ~_outliers(expected, finite)
    spread = _range(expected[ordinary])
    scale = np.where(ordinary, spread, np.abs(expected))
    error = np.abs(np.subtract(found, expected, where=both, out=np.zeros_like(expected)))
    largest = float(np.abs(expected[ordinary]).max(initial=0.0))
    # A pattern of NaN and infinities must be kept even when values are not compared.
    allowed = tolerance.relative * scale + _LAST_PLACES[_precision_of(reference.dtype)] * largest
    if reference.dtype == np.float32 and _is_grainy(expected[ordinary]):
        allowed = allowed + 4 * _GRAIN
    wrong = ~agree | (both & (error > allowed) if math.isfinite(tolerance.relative) else np.zeros_like(agree))
    relative = np.divide(error, scale, where=both & (scale > 0), out=np.zeros_like(error))
    comparison = OutputComparison(
        name,
        str(reference.dtype),
        reference.shape,
        max_abs_error=float(error.max(initial=0.0)),
        relative_error=float(relative.max(initial=0.0)),
        range=spread,
        mismatched_fraction=float(wrong.mean()) if wrong.size else 0.0,
        nonfinite=int((~finite).sum()),
        tolerance=tolerance.relative,
    )
    return dataclasses.replace(comparison, reason=_float_reason(comparison, int((~agree).sum())) if wrong.any() else "")


def _float_reason(comparison: OutputComparison, patterns: int) -> str:
    if patterns:
        return f"NaN or infinity appear or vanish at {patterns} element{'s' if patterns > 1 else ''}"
    return (
        f"max error {comparison.max_abs_error:.3g} is {comparison.relative_error:.3g} of the range, "
        f"allowed is {comparison.tolerance:.3g} ({comparison.mismatched_fraction:.1%} of the elements)"
    )


def _compare_discrete(
    reference: np.ndarray[Any, Any], actual: np.ndarray[Any, Any], tolerance: Tolerance, name: str
) -> OutputComparison:
    wrong = np.asarray(reference != actual)
    fraction = float(wrong.mean()) if wrong.size else 0.0
    error = 0.0
    if reference.dtype.kind not in "OSU" and wrong.any():
        error = float(np.abs(actual.astype(np.float64) - reference.astype(np.float64)).max())
    one_step = reference.dtype.itemsize == 1 and reference.dtype.kind in "iu" and error <= 1
    allowed = math.isinf(tolerance.relative) or (one_step and fraction <= tolerance.fraction)
    reason = "" if fraction == 0 or allowed else f"{fraction:.1%} of the elements differ"
    return OutputComparison(
        name,
        str(reference.dtype),
        reference.shape,
        max_abs_error=error,
        mismatched_fraction=fraction,
        tolerance=tolerance.fraction if one_step else 0.0,
        reason=reason,
    )


def _different(name: str, reference: np.ndarray[Any, Any], reason: str) -> OutputComparison:
    return OutputComparison(name, str(reference.dtype), reference.shape, mismatched_fraction=1.0, reason=reason)


def _both_text(reference: np.ndarray[Any, Any], actual: np.ndarray[Any, Any]) -> bool:
    return reference.dtype.kind in "OSU" and actual.dtype.kind in "OSU"


def _outliers(values: np.ndarray[Any, Any], finite: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    magnitudes = np.abs(values)
    nonzero = magnitudes[finite & (magnitudes > 0)]
    if nonzero.size == 0:
        return np.zeros(values.shape, dtype=bool)
    return np.asarray(magnitudes > _OUTLIER * np.median(nonzero))


def _range(values: np.ndarray[Any, Any]) -> float:
    """Largest minus smallest; for one value, or many equal ones, its magnitude; for zeros, 1."""
    if values.size == 0:
        return 0.0
    spread = float(values.max() - values.min())
    return spread or float(np.abs(values).max()) or 1.0


def _is_grainy(values: np.ndarray[Any, Any]) -> bool:
    return bool((np.remainder(values, _GRAIN) == 0).all())


def _is_float(dtype: np.dtype[Any]) -> bool:
    return dtype.kind in "fc" or dtype.name.startswith(("bfloat", "float"))


def _as_float64(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if array.dtype.kind == "c":
        return np.stack([array.real, array.imag], axis=-1).astype(np.float64)
    return array.astype(np.float64)


def _precision_of(dtype: np.dtype[Any]) -> str:
    if dtype.kind == "c":
        return "float64" if dtype.itemsize == 16 else "float32"
    if dtype.name in _LAST_PLACES:
        return str(dtype.name)
    return "8-bit" if dtype.name.startswith(("float8", "float6", "float4")) else "float32"


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
