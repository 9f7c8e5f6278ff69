"""State shared by all functions of one compiled program: kernels, weights, functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import tvm
from tvm import relax, tirx
from tvm.ir import GlobalVar

from mmopt.backends.compute import LoopNest, Reduction, Tensor
from mmopt.backends.cpu.choosing import Chooser, plausible
from mmopt.backends.cpu.emit import Kernel
from mmopt.backends.expressions import itemsize
from mmopt.backends.profile import Profile
from mmopt.lowering.targets import emitter_for, templates_for
from mmopt.lowering.values import (
    ConstantSource,
    NotLowered,
    Quantized,
    Value,
    Widened,
    dtype_name,
    narrow_bits,
)
from mmopt.runtime.encoded import Encoded


class ProgramBuilder:
    """Collects what the functions of a program share.

    Attributes:
        profile: What is compiled for.
        templates: Kernel templates of the target that take the place of those for a CPU; None there.
        chooser: Picks the parameters of kernel templates.
        kernels: One record for each distinct kernel, for reports.
        built: The kernels themselves, by name.
        weights: Weight arrays by key, as the kernels want them.
        encoded: The form in which some of them are stored.
    """

    def __init__(self, profile: Profile, chooser: Chooser | None = None) -> None:
        self.profile = profile
        self.templates = templates_for(profile)
        self.chooser = chooser or Chooser()
        self.kernels: dict[str, dict[str, Any]] = {}
        self.built: dict[str, Kernel] = {}
        self.weights: dict[str, np.ndarray] = {}
        self.encoded: dict[str, Encoded] = {}
        self._registry = relax.BlockBuilder()
        self._functions: dict[str, relax.Function] = {}
        self._constants: dict[int, tuple[ir.TensorProtocol, Value]] = {}
        self._packed: dict[tuple[int, Hashable], tuple[np.ndarray, ConstantSource]] = {}
        self._keys: dict[ConstantSource, str] = {}
        self._widened: dict[int, tuple[np.ndarray, Value]] = {}
        self._names: set[str] = set()

    def unique(self, hint: str) -> str:
        """A function name nobody has yet."""
        clean = "".join(c if c.isalnum() else "_" for c in hint)[:60] or "f"
        name, number = clean, 0
        while name in self._names:
            number += 1
            name = f"{clean}_{number}"
        self._names.add(name)
        return name

    # -- kernels -----------------------------------------------------------------------------------------------

    def kernel(self, outputs: Sequence[Tensor], hint: str) -> tuple[GlobalVar, Kernel]:
        """The kernel that computes ``outputs``; equal kernels are shared."""
        emitter = emitter_for(self.profile)(outputs, self.profile)
        kernel = emitter.build()
        handle = self._registry.add_func(kernel.function, "".join(c if c.isalnum() else "_" for c in hint)[:60])
        name = str(handle.name_hint)
        self._names.add(name)
        if name not in self.kernels:
            described = self._description(emitter.plan.stages)
            self.kernels[name] = {"name": name, "calls": 0, **_traffic(kernel), **described}
            self.built[name] = kernel
        self.kernels[name]["calls"] += 1
        return handle, kernel

    def _description(self, stages: Sequence[Tensor | LoopNest]) -> dict[str, Any]:
        """What reports say about a kernel: its template, and how its parameters were chosen."""
        nests = [stage for stage in stages if isinstance(stage, LoopNest)]
        if not nests:
            reduces = any(isinstance(stage, Reduction) for stage in stages)
            return {"template": "reduction" if reduces else "elementwise", "parameters": {}}
        main = next((nest for nest in nests if nest.workload is not None), nests[0])
        record: dict[str, Any] = {"template": main.name, "parameters": dict(main.parameters())}
        choice = None if main.workload is None else self.chooser.choice(main.workload)
        if choice is not None:
            record |= choice.to_json()
        return record

    def add_function(self, function: relax.Function, name: str) -> GlobalVar:
        """Add a helper function that other functions call."""
        return self._registry.add_func(function, name)

    def replace_function(self, handle: GlobalVar, function: relax.Function) -> None:
        """Define a function that was added under ``handle`` only to be called."""
        self._registry.update_func(handle, function)

    def add_entry(self, function: relax.Function, name: str) -> None:
        """Add a function the runtime calls."""
        self._functions[name] = function

    def module(self) -> tvm.IRModule:
        """What the entries need of everything collected, as one module. The records of other kernels are dropped."""
        helpers = dict(self._registry.get().functions)
        needed: dict[GlobalVar, Any] = {}
        pending = list(self._functions.values())
        while pending:
            function = pending.pop()
            if not isinstance(function, relax.Function):
                continue
            for handle in relax.analysis.all_global_vars(function):
                if handle not in needed:
                    needed[handle] = helpers[handle]
                    pending.append(helpers[handle])
        names = {str(handle.name_hint) for handle in needed}
        self.kernels = {name: record for name, record in self.kernels.items() if name in names}
        for name, function in self._functions.items():
            needed[GlobalVar(name)] = function
        return tvm.IRModule(needed)

    # -- weights -----------------------------------------------------------------------------------------------

    def constant(self, tensor: ir.TensorProtocol, name: str) -> Value:
        """The value of an initializer; one tensor gives one value however many functions use it."""
        if id(tensor) not in self._constants:
            data = np.asarray(tensor.numpy())
            if tensor.dtype in (ir.DataType.STRING, ir.DataType.COMPLEX64, ir.DataType.COMPLEX128):
                raise NotLowered(f"a constant of type {tensor.dtype.name}")
            if (bits := narrow_bits(tensor.dtype)) is not None:
                data = data.astype(dtype_name(tensor.dtype))
            value = Value(constant=data, name=name)
            value.bits = bits
            self._constants[id(tensor)] = (tensor, value)
        return self._constants[id(tensor)][1]

    def widened(self, known: Quantized, name: str) -> Value | None:
        """The float32 constant that was dequantized to ``known``, which the artifact stores in integers.

        Returns:
            ``None`` when integers or scales are not known, or there are zero points.
        """
        data, scale = known.value.constant, known.scale.constant
        if data is None or scale is None or data.dtype != np.int8 or scale.dtype != np.float32:
            return None
        if known.zero is not None and (known.zero.constant is None or known.zero.constant.any()):
            return None
        if id(data) not in self._widened:
            if known.block:
                wide = scale.repeat(known.block, known.axis).take(range(data.shape[known.axis]), known.axis)
            else:
                around = [1] * data.ndim
                around[known.axis if scale.size > 1 else 0] = -1
                wide = np.broadcast_to(scale.reshape(around), data.shape)
            value = Value(constant=data.astype(np.float32) * wide, name=name)
            value.widened = Widened(data, wide, known.value.bits or 8)
            self._widened[id(data)] = data, value
        return self._widened[id(data)][1]

    def packed(self, value: Value, key: Hashable, pack: Callable[[np.ndarray], np.ndarray]) -> ConstantSource:
        """A weight rearranged at compile time, made once for each (weight, ``key``).

        Args:
            value: A constant.
            key: Names the arrangement.
            pack: Gives the array to store.
        """
        assert value.constant is not None
        at = (id(value.constant), key)
        if at not in self._packed:
            made = ConstantSource(np.ascontiguousarray(pack(value.constant)), value.name)
            made.widened = None if value.widened is None else _packed_alike(value.widened, pack, made.data)
            self._packed[at] = value.constant, made  # the array stays alive, for another one would get its id
        return self._packed[at][1]

    def weight_key(self, source: ConstantSource) -> str:
        """Key of a weight in the artifact."""
        if source not in self._keys:
            key, number = source.name, 0
            while key in self.weights:
                number += 1
                key = f"{source.name}.{number}"
            self.weights[key] = source.data
            if source.widened is not None:
                form = source.widened
                encoded = Encoded.of(form.integers, form.scales, form.bits)
                if encoded.nbytes < source.data.nbytes:
                    self.encoded[key] = encoded
            self._keys[source] = key
        return self._keys[source]


def _packed_alike(form: Widened, pack: Callable[[np.ndarray], np.ndarray], want: np.ndarray) -> Widened | None:
    """The integers and scales of a weight after ``pack``, unless that does more than move and fill up."""
    integers, scales = pack(form.integers), pack(np.ascontiguousarray(form.scales))
    if integers.dtype != np.int8 or not np.array_equal(integers.astype(np.float32) * scales, want):
        return None
    return Widened(integers, scales, form.bits)


def _traffic(kernel: Kernel) -> dict[str, int | None]:
    """Bytes of everything a kernel reads and writes, each once: as they are known, and with plausible sizes."""
    tensors = (*kernel.sources, *kernel.outputs)
    total = sum(math.prod(map(plausible, tensor.shape)) * itemsize(tensor.dtype) for tensor in tensors)
    if all(isinstance(extent, tirx.IntImm) for tensor in tensors for extent in tensor.shape):
        return {"bytes": total}
    return {"bytes": None, "plausible_bytes": total}
