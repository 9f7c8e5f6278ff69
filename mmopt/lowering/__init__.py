"""From ONNX graphs to Relax functions and kernels."""

from mmopt.runtime.libraries import without_torch

with without_torch():
    import tvm.relax  # noqa: F401
