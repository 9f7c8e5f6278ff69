"""Vector polynomials in place of scalar calls to the C library's mathematical functions."""

from __future__ import annotations


def register() -> None:
    """Make TVM's LLVM backend use the functions of this file. Idempotent."""
