"""Integers of a layer's weights: the nearest, or chosen for what the layer gives on calibration samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mmopt.transforms.canonicalize.editing import Array, is_onnx
from mmopt.transforms.quantize.adaround import adaround
from mmopt.transforms.quantize.encoding import Encoding
from mmopt.transforms.quantize.gptq import gptq
from mmopt.transforms.quantize.layers import Layer

CHOOSING: Mapping[str, Callable[[Array, Array, Encoding], Array]] = {"gptq": gptq, "adaround": adaround}
"""Ways to choose integers by the Gram matrix of what a layer reads."""


def grams_wanted(chosen: Sequence[Layer], method: str) -> list[str]:
    """Names of the tensors whose Gram matrices ``method`` needs, each once."""
    if method not in CHOOSING:
        return []
    return list(dict.fromkeys(str(layer.data.name) for layer in chosen if not is_onnx(layer.node, "Conv")))


def round_weight(data: Array, layer: Layer, encoding: Encoding, gram: Array | None, method: str) -> Array:
    """The integers of ``data``, the weight of ``layer``; the nearest where there is no Gram matrix."""
    if gram is None or method not in CHOOSING:
        return encoding.quantize(data)
    choose = CHOOSING[method]
    if layer.depth_axis == 0:
        return choose(data, gram, encoding)
    return np.ascontiguousarray(choose(data.T, gram, encoding.transposed()).T)
