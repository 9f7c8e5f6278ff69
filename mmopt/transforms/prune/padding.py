"""Which rows of a product's data are padding, and so of no interest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mmopt.analysis.calibration.collect import Padding
from mmopt.ir.module import Module
from mmopt.transforms.prune.linear_maps import LinearMap, linear_maps, norm_maps

Array = np.ndarray[Any, Any]

Valid = Callable[[LinearMap, Array, Mapping[str, Array]], "Array | None"]
"""``valid(map, data, inputs)``: for each row of the map's data whether it is none, or None when that is not known."""


def valid_rows(module: Module) -> Valid:
    """How to tell padding in the data of the products of ``module``, as its own mask inputs mark it."""
    padding = Padding(module, (found.data for found in (*linear_maps(module.graph), *norm_maps(module.graph))))

    def valid(found: LinearMap, data: Array, feeds: Mapping[str, Array]) -> Array | None:
        axis = padding.axis(str(found.data.name), data, feeds)
        if found.kind not in ("product", "norm") or axis != 1 or data.ndim != 3:
            return None
        return padding.mask(str(found.data.name), feeds).reshape(-1)

    return valid
