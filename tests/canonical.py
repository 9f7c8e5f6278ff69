"""Helpers for tests of exact passes: models from text, and one check that does everything a pass owes."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from mmopt.ir.evaluate import ReferenceRunner
from mmopt.ir.fingerprint import fingerprint
from mmopt.ir.module import Module
from mmopt.ir.verify import verify
from mmopt.pipeline.base import Pass, PassContext

SIZES = {"batch": 2, "seq": 5, "n": 3, "m": 4}
"""What the named sizes of test models stand for when they are run."""


def module_from(text: str, *, opset: int = 18, domains: str = "") -> Module:
    """A module from ONNX's text form, the header left out."""
    header = f'<ir_version: 10, opset_import: ["" : {opset}{domains}]>\n'
    return Module(ir.from_onnx_text(header + text))


def ops(module: Module) -> list[str]:
    """Operators of the main graph and, each after the node it belongs to, of the bodies."""
    return [node.op_type for node in module.graph.all_nodes()]


def count_ops(module: Module) -> dict[str, int]:
    """How often each operator occurs."""
    return dict(collections.Counter(ops(module)))


def inputs_for(module: Module, seed: int = 0, sizes: Mapping[str, int] = SIZES) -> dict[str, Any]:
    """Seeded inputs with negative zero, infinities and NaN among the floats."""
    random = np.random.default_rng(seed)
    feeds: dict[str, Any] = {}
    for value in module.graph.inputs:
        if value.is_initializer():
            continue
        shape = [dim if isinstance(dim, int) else sizes[str(dim)] for dim in value.shape or ()]
        feeds[str(value.name)] = _array(random, shape, value.dtype or ir.DataType.FLOAT)
    return feeds


def _array(random: np.random.Generator, shape: list[int], dtype: ir.DataType) -> np.ndarray[Any, Any]:
    if dtype == ir.DataType.BOOL:
        return np.asarray(random.random(shape) < 0.5)
    if not dtype.is_floating_point():
        return np.asarray(random.integers(0, 3, shape)).astype(dtype.numpy())
    array = np.asarray(random.standard_normal(shape) * 3)
    if array.size >= 4:
        array.flat[:4] = [-0.0, np.inf, -np.inf, np.nan]
    return array.astype(dtype.numpy())


def evaluate(module: Module, feeds: Mapping[str, Any]) -> dict[str, Any]:
    """Outputs by onnxruntime with every optimization off."""
    with ReferenceRunner(threads=1) as runner:
        outputs = runner.run(module, feeds)
    assert outputs.engine == "onnxruntime", outputs.reason
    return outputs


def assert_same(want: Mapping[str, Any], got: Mapping[str, Any]) -> None:
    """Equal to the last bit: the sign of zero counts, all NaN are alike."""
    assert list(want) == list(got)
    for name, expected in want.items():
        actual = got[name]
        assert expected.dtype == actual.dtype, name
        assert expected.shape == actual.shape, name
        if expected.dtype.name == "bfloat16":  # numpy does not know that its NaN are NaN
            expected, actual = expected.astype(np.float32), actual.astype(np.float32)
        np.testing.assert_array_equal(expected, actual, err_msg=name)
        if expected.dtype.kind == "f":
            number = ~np.isnan(expected)
            np.testing.assert_array_equal(np.signbit(expected[number]), np.signbit(actual[number]), err_msg=name)


def check(pass_: Pass, module: Module, *, fires: bool = True, seed: int = 0, run: bool = True) -> PassContext:
    """Run ``pass_`` and check what every exact pass owes.

    It says truly whether it changed something, leaves a valid module with the same inputs and outputs, computes the
    same bits on seeded inputs, and finds nothing more to do.
    """
    feeds = inputs_for(module, seed) if run else {}
    want = evaluate(module, feeds) if run else {}
    signature, before = module.signature(), fingerprint(module.model)
    context = PassContext()
    assert pass_.run(module, context) is fires
    assert (fingerprint(module.model) != before) is fires
    assert module.signature() == signature
    assert [problem for problem in verify(module) if problem.severity == "error"] == []
    if run:
        assert_same(want, evaluate(module, feeds))
    settled = fingerprint(module.model)
    assert pass_.run(module, PassContext()) is False
    assert fingerprint(module.model) == settled
    return context
