"""Which layer is quantized how: schemes by name, what they cost, and putting an assignment into a model."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np

from mmopt.analysis.calibration import Calibration
from mmopt.ir.module import Module
from mmopt.pipeline.base import PassContext
from mmopt.transforms.canonicalize.editing import is_onnx, tensor_of
from mmopt.transforms.quantize.compress_weights import CompressWeights, Store
from mmopt.transforms.quantize.layers import KINDS, Layer
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

    def fits(self, layer: Layer | Store) -> bool:
        """Whether there are kernels for ``layer`` quantized like this, or it can at least be stored so."""
        if isinstance(layer, Store):
            return not self.activation_bits
        return self.name != "w8a16" or not is_onnx(layer.node, "Conv")


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


def offered(layer: Layer | Store, schemes: Iterable[str]) -> list[str]:
    """Those of ``schemes`` that are worth considering for a layer.

    A convolution whose weights alone are integers computes in float. That is worth fewer bits, not the same.
    """
    names = [name for name in schemes if SCHEMES[name].fits(layer)]
    integers = is_onnx(layer.node, "Conv") and "w8a8" in names
    return [name for name in names if not (integers and name == "w8")]


def parameters(layer: Layer | Store) -> int:
    """Number of weights of a layer."""
    tensors = [tensor_of(weight) for weight in layer.weights]
    return sum(int(tensor.size) for tensor in tensors if tensor is not None)


def nbytes(layer: Layer | Store, scheme: Scheme) -> float:
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
            few: Literal[4, 8] = 8 if name == "w8" else 4
            QuantizeWeights(few, scheme.block, kinds=KINDS, include=chosen, logits=True).run(module, context)
            CompressWeights(few, scheme.block, include=chosen).run(module, context)


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
