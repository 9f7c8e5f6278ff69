"""The operator conformance suite of the onnx wheel through the whole canonical form.

Every model that onnxruntime can run must keep its outputs. Small integer inputs (sizes, axes, targets) are also made
constants in a second run, so that the rules about constants get to work.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.backend.test.case.node import collect_testcases

from mmopt.errors import BackendError
from mmopt.ir.evaluate import ONNXRUNTIME, ReferenceRunner, is_random
from mmopt.ir.module import Module
from mmopt.ir.verify import verify
from mmopt.pipeline.base import PassContext
from mmopt.transforms.canonicalize import Canonicalize

_DATA = pathlib.Path(onnx.__file__).parent / "backend" / "test" / "data"
_PARTS = 4
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
_Case = tuple[str, Module, dict[str, Any]]


def _generated(part: int) -> Iterator[_Case]:
    for case in collect_testcases(None)[part::_PARTS]:
        inputs, _ = case.data_sets[0]
        if (module := _module(case.model)) is not None:
            yield case.name, module, _feeds(module, inputs)


def _on_disk() -> Iterator[_Case]:
    for path in sorted(_DATA.glob("*/*/model.onnx")):
        proto = onnx.load(path)
        tensors = sorted(path.parent.glob("test_data_set_0/input_*.pb"))
        if (module := _module(proto)) is not None and tensors:
            yield path.parent.name, module, _feeds(module, [_read(file, i, proto) for i, file in enumerate(tensors)])


def _module(proto: onnx.ModelProto) -> Module | None:
    try:
        module = Module(ir.from_proto(proto))
    except ir.serde.SerdeError:
        return None
    # Before version 4 of the format every initializer had to be an input; loading a file lifts that.
    module.model.ir_version = max(module.model.ir_version or 0, 8)
    invalid = any(problem.severity == "error" for problem in verify(module))
    return None if invalid or is_random(module) else module


def _read(path: pathlib.Path, index: int, proto: onnx.ModelProto) -> Any:
    kind = proto.graph.input[index].type.WhichOneof("value")
    if kind == "sequence_type":
        return onnx.numpy_helper.to_list(onnx.SequenceProto.FromString(path.read_bytes()))
    if kind == "optional_type":
        return onnx.numpy_helper.to_optional(onnx.OptionalProto.FromString(path.read_bytes()))
    return onnx.numpy_helper.to_array(onnx.TensorProto.FromString(path.read_bytes()))


def _feeds(module: Module, inputs: list[Any]) -> dict[str, Any]:
    return {str(value.name): array for value, array in zip(module.graph.inputs, inputs, strict=False)}


def _with_constants(module: Module, feeds: dict[str, Any]) -> dict[str, Any]:
    """Make constants of small integer and bool inputs; the inputs that are left."""
    left = dict(feeds)
    for value in list(module.graph.inputs):
        array = feeds.get(str(value.name))
        if isinstance(array, np.ndarray) and array.dtype.kind in "ib" and array.ndim <= 1 and array.size <= 16:
            module.graph.inputs.remove(value)
            value.const_value = ir.tensor(array, name=value.name)
            module.graph.register_initializer(value)
            del left[str(value.name)]
    return left


def _same(want: Any, got: Any) -> bool:
    if isinstance(want, (list, tuple)):
        return len(want) == len(got) and all(map(_same, want, got))
    if want is None or got is None:
        return want is got
    want, got = np.asarray(want), np.asarray(got)
    if want.shape != got.shape or want.dtype != got.dtype:
        return False
    if want.dtype.kind in "OSU":
        return bool((want == got).all())
    if want.dtype.itemsize < 4 and want.dtype.kind in "fV":
        # onnxruntime computes these in float and rounds in places that depend on the graph around them.
        return np.allclose(want.astype(np.float32), got.astype(np.float32), rtol=1e-2, atol=1e-2, equal_nan=True)
    return want.tobytes() == got.tobytes() or np.array_equal(want, got, equal_nan=want.dtype.kind in "fc")


def _check(runner: ReferenceRunner, name: str, module: Module, feeds: dict[str, Any]) -> str:
    """What is wrong, or ""; ``-`` where onnxruntime cannot run the model."""
    try:
        want = runner.run(module, feeds)
    except BackendError:
        return "-"
    if want.engine != ONNXRUNTIME:
        return "-"
    signature = module.signature()
    Canonicalize().run(module, PassContext())
    if Canonicalize().run(module, PassContext()):
        return f"{name}: a second run found more to do"
    if errors := [str(problem) for problem in verify(module) if problem.severity == "error"]:
        return f"{name}: {errors[0]}"
    if module.signature() != signature:
        return f"{name}: inputs or outputs changed"
    got = runner.run(module, feeds)
    if got.engine != ONNXRUNTIME:
        return f"{name}: onnxruntime no longer runs it: {got.reason}"
    wrong = [key for key in want if not _same(want[key], got[key])]
    return f"{name}: {wrong} differ" if wrong else ""


def _run(cases: Iterator[_Case], *, constants: bool) -> tuple[int, list[str]]:
    checked, failures = 0, []
    with ReferenceRunner(threads=1) as runner:
        for name, module, feeds in cases:
            feeds = _with_constants(module, feeds) if constants else feeds
            message = _check(runner, name, module, feeds)
            checked += message != "-"
            if message not in ("", "-"):
                failures.append(message)
    return checked, failures


@pytest.mark.slow
@pytest.mark.parametrize("constants", [False, True], ids=["as-is", "sizes-constant"])
@pytest.mark.parametrize("part", range(_PARTS))
def test_generated_models_keep_their_outputs(part: int, constants: bool) -> None:
    checked, failures = _run(_generated(part), constants=constants)
    assert failures == []
    assert checked > 250


@pytest.mark.slow
def test_models_on_disk_keep_their_outputs() -> None:
    checked, failures = _run(_on_disk(), constants=False)
    assert failures == []
    assert checked >= 100
