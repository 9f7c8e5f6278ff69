"""Narrow number formats: where values are rounded, stated in the model itself."""

from __future__ import annotations

from mmopt.transforms.precision.narrow_floats import NarrowFloats

__all__ = ["NarrowFloats"]
