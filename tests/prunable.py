"""Small models with something to cut, and samples for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from mmopt.ir.module import Module
from tests.unit.tower_models import FLOAT, INT64, Net

Arrays = dict[str, np.ndarray[Any, Any]]


def named(net: Net, *outputs: ir.Value) -> Module:
    """The model that ``net`` builds, with outputs ``y0``, ``y1``, …"""
    for place, value in enumerate(outputs):
        net.output(value, f"y{place}")
    return net.module()


def perceptron(inputs: int = 12, hidden: int = 32, results: int = 6, *, rank: int = 0, seed: int = 0) -> Module:
    """x · A + a, Relu, · B + b. With ``rank``, hidden units are copies, up to a factor, of the first so many."""
    net = Net(seed=seed)
    x = net.input("x", FLOAT, "batch", inputs)
    first = net.rng.normal(0, 0.5, (hidden, inputs)).astype(np.float32)
    offset = net.rng.normal(0, 0.3, hidden).astype(np.float32)
    if rank:
        factors = np.linspace(0.5, 2, hidden).astype(np.float32)
        first, offset = first[np.arange(hidden) % rank], offset[np.arange(hidden) % rank]
        first, offset = first * factors[:, None], offset * factors
    up = net.op("Gemm", x, net.constant(first), net.constant(offset), transB=1)
    down = net.op("Gemm", net.op("Relu", up), net.weight(results, hidden), net.weight(results), transB=1)
    return named(net, down)


def convolutions(channels: tuple[int, ...] = (16, 24), *, seed: int = 0) -> Module:
    """Convolutions with rectifiers, a mean over places, and a linear layer."""
    net = Net(seed=seed)
    x = net.input("x", FLOAT, "batch", 3, 8, 8)
    value, before = x, 3
    for width in channels:
        value = net.op("Conv", value, net.weight(width, before, 3, 3), net.weight(width), pads=[1, 1, 1, 1])
        value, before = net.op("Relu", value), width
    mean = net.op("Flatten", net.op("GlobalAveragePool", value), axis=1)
    return named(net, net.op("Gemm", mean, net.weight(5, before), net.weight(5), transB=1))


def two_modalities(seed: int = 0, *, weak: float = 1.0) -> Module:
    """A picture and words; what the words add is scaled by ``weak``."""
    net = Net(seed=seed)
    image = net.input("image", FLOAT, "batch", 3, 8, 8)
    ids = net.input("ids", INT64, "batch", 6)
    seen = net.op("Relu", net.op("Conv", image, net.weight(16, 3, 3, 3), net.weight(16), pads=[1, 1, 1, 1]))
    seen = net.op("Relu", net.op("Conv", seen, net.weight(16, 16, 3, 3), net.weight(16), pads=[1, 1, 1, 1]))
    seen = net.op("Flatten", net.op("GlobalAveragePool", seen), axis=1)
    read = net.op("ReduceMean", net.op("Gather", net.weight(50, 16), ids), net.ints(1), keepdims=0)
    read = net.op("Relu", net.op("Gemm", read, net.weight(32, 16), net.weight(32), transB=1))
    read = net.op("Gemm", read, net.constant((weak * net.rng.normal(0, 0.3, (16, 32))).astype(np.float32)), transB=1)
    both = net.op("Concat", seen, read, axis=1)
    head = net.op("Relu", net.op("Gemm", both, net.weight(24, 32), net.weight(24), transB=1))
    return named(net, net.op("Gemm", head, net.weight(4, 24), net.weight(4), transB=1))


def samples_of(module: Module, count: int = 96, seed: int = 0) -> Arrays:
    """Random samples with a leading axis of samples."""
    random = np.random.default_rng(seed)
    found: Arrays = {}
    for value in module.graph.inputs:
        shape = (count, *(int(size) for size in list(value.shape or ())[1:]))
        if value.dtype == INT64:
            found[str(value.name)] = random.integers(0, 50, shape)
        else:
            found[str(value.name)] = random.standard_normal(shape).astype(np.float32)
    return found
