"""A pass as a function on the module: keyword-only parameters are its options.

    every finite weight beyond ±largest becomes ±largest        (-3.4e38 in a mask, which overflows in float16)

Run it with:

    mmopt optimize model.onnx --pass 'passes/examples/cap_constants.py:cap_constants{largest=65504}'
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from mmopt import Fidelity, Module, PassContext, module_pass
from mmopt.ir.module import Remark


@module_pass(fidelity=Fidelity.ROUNDING)
def cap_constants(module: Module, context: PassContext, *, largest: float = 1e4) -> bool:
    """Limits the magnitude of scalar float32 constants, such as the fill value of a mask."""
    changed = False
    for name, value in module.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size != 1:
            continue
        array = tensor.numpy()
        capped = np.clip(array, -largest, largest)
        if np.isfinite(array).all() and not np.array_equal(array, capped):
            value.const_value = ir.tensor(capped, name=name)
            context.remarks.append(Remark("cap-constants", "applied", name, f"Capped {array} to {capped}."))
            changed = True
    return changed
