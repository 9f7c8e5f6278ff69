"""From ONNX graphs to Relax functions and kernels."""

from mmopt.runtime.libraries import import_tvm_ffi

# Before anything imports tvm: on its own, tvm_ffi would import torch, which takes seconds.
import_tvm_ffi()
