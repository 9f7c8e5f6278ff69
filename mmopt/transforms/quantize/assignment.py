"""Which layer is quantized how: schemes by name, what they cost, and putting an assignment into a model."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping

import numpy as np

from mmopt.analysis.calibration import Calibration
from mmopt.ir.module import Module
from mmopt.pipeline.base import PassContext
from mmopt.transforms.canonicalize.editing import is_onnx, tensor_of
from mmopt.transforms.quantize.layers import Layer
from mmopt.transforms.quantize.quantize_static import QuantizeStatic
from mmopt.transforms.quantize.quantize_weights import QuantizeWeights

FLOAT = "fp32"


@dataclasses.dataclass(frozen=True)
class Scheme:
    """One way to quantize a layer.

    Attributes:
        name: ``fp32``, ``w8a8``, ``w8a16``, ``w8`` or ``w4``.
        bits: Of a weight, scales included.
        activation_bits: Of what the layer reads; 0 for float.
        block: Weights that share a scale; 0 for an output channel.
    """

    name: str
    bits: float
    activation_bits: int = 0
    block: int = 0

    def fits(self, layer: Layer) -> bool:
        """Whether there are kernels for ``layer`` quantized like this."""
        return self.name in (FLOAT, "w8a8") or not is_onnx(layer.node, "Conv")


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme(FLOAT, 32),
        Scheme("w8a16", 8, activation_bits=16),
        Scheme("w8a8", 8, activation_bits=8),
        Scheme("w8", 8),
        Scheme("w4", 5, block=32),
    )
}
"""The schemes, from the closest to the smallest."""


def parameters(layer: Layer) -> int:
    """Number of weights of a layer."""
    tensor = tensor_of(layer.weight)
    return 0 if tensor is None else int(tensor.size)


def nbytes(layer: Layer, scheme: Scheme) -> float:
    """Bytes of a layer's weights under a scheme."""
    return parameters(layer) * scheme.bits / 8


def assign(module: Module, assignment: Mapping[str, str], calibration: Calibration | None, **options: object) -> None:
    """Quantize the layers of ``module`` by name.

    Args:
        module: The module, changed in place.
        assignment: Name of a scheme by name of the layer's node; layers that are not in it stay as they are.
        calibration: Statistics, for schemes with integer activations.
        options: Further options of :class:`QuantizeStatic`.
    """
    names: dict[str, list[str]] = collections.defaultdict(list)
    for layer, given in assignment.items():
        names[given].append(escaped(layer))
    context = PassContext()
    for name, include in names.items():
        scheme = SCHEMES[name]
        chosen = tuple(include)
        if scheme.activation_bits:
            bits: object = scheme.activation_bits
            static = QuantizeStatic(activation_bits=bits, include=chosen, logits=True, **options)  # type: ignore[arg-type]
            static.quantize(module, context, calibration)
        elif name != FLOAT:
            weight_bits: object = 8 if name == "w8" else 4
            weights = QuantizeWeights(bits=weight_bits, block=scheme.block, include=chosen, logits=True)  # type: ignore[arg-type]
            weights.run(module, context)


def escaped(name: str) -> str:
    """A pattern that matches ``name`` alone."""
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)


def relative_error(outputs: Mapping[str, object], reference: Mapping[str, object]) -> float:
    """Root mean square error of the worst floating-point output, of the root mean square of its reference."""
    worst = 0.0
    for name, want in reference.items():
        expected, actual = np.asarray(want), np.asarray(outputs[name])
        if expected.dtype.kind != "f" or not expected.size:
            continue
        finite = np.isfinite(expected)
        power = float((expected[finite].astype(np.float64) ** 2).mean()) if finite.any() else 0.0
        error = float(((actual[finite].astype(np.float64) - expected[finite]) ** 2).mean()) if finite.any() else 0.0
        worst = max(worst, float(np.sqrt(error / max(power, 1e-30))))
    return worst
