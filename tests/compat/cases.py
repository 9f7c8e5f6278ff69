"""The models of the suite with their inputs and expected outputs: 1,884 generated ones and 149 on disk in onnx 1.23."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pathlib
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

DATA = pathlib.Path(onnx.__file__).parent / "backend" / "test" / "data"
RANDOM = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)
"""Their values are not defined by the standard: only shapes and dtypes are compared."""

DataSet = tuple[list[Any], list[Any]]


@dataclasses.dataclass(frozen=True)
class Case:
    """One model of the suite.

    Attributes:
        name: Its name in the suite; those on disk have their folder in front.
        rtol: Relative tolerance.
        atol: Absolute tolerance.
        load: Gives the model and its sets of inputs and expected outputs.
    """

    name: str
    rtol: float
    atol: float
    load: Callable[[], tuple[onnx.ModelProto, list[DataSet]]]

    @functools.cached_property
    def content(self) -> tuple[onnx.ModelProto, list[DataSet]]:
        """The model and its data, loaded once."""
        return self.load()

    @functools.cached_property
    def digest(self) -> str:
        """Hash of the model."""
        return hashlib.sha256(self.content[0].SerializeToString(deterministic=True)).hexdigest()[:16]

    @functools.cached_property
    def operators(self) -> list[str]:
        """What the model is about: its operators, without constants around the others."""
        found = {f"{n.domain}.{n.op_type}" if n.domain else n.op_type for n in self.content[0].graph.node}
        return sorted(found - {"Constant"} or found)

    @property
    def family(self) -> str:
        """Row of the table: the operator, or the kind of model."""
        if "/" in self.name:
            return f"({self.name.split('/')[0]})"
        if "_expanded" in self.name:
            return "(definitions of the standard)"
        wanted = self.name.removeprefix("test_").replace("_", "").lower()
        named = [op for op in self.operators if wanted.startswith(op.rpartition(".")[2].lower())]
        return (
            max(named, key=len) if named else self.operators[0] if len(self.operators) == 1 else "(several operators)"
        )

    @property
    def random(self) -> bool:
        """Whether the expected values are not defined."""
        return any(op in RANDOM for op in self.operators) or any(
            call.op_type in RANDOM for function in self.content[0].functions for call in function.node
        )


def all_cases() -> list[Case]:
    """Every model, in a fixed order."""
    return [*generated(), *on_disk(), *light()]


def generated() -> list[Case]:
    """The models that the suite makes in memory."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = collect_testcases(None)

    def case(made: Any) -> Case:
        sets = [([_array(v) for v in given], [_array(v) for v in expected]) for given, expected in made.data_sets]
        return Case(made.name, made.rtol, made.atol, lambda: (made.model, sets))

    return [case(made) for made in found]


def _array(value: Any) -> Any:
    """Dtypes that numpy lacks come as protobufs."""
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def on_disk() -> list[Case]:
    """The models that lie on disk with their data."""
    return [
        Case(f"{path.parent.parent.name}/{path.parent.name}", 1e-3, 1e-7, functools.partial(_from_folder, path))
        for path in sorted(DATA.glob("*/*/model.onnx"))
    ]


def light() -> list[Case]:
    """Well-known networks whose weights are made by nodes; their input is a ramp."""
    return [
        Case(f"light/{path.stem}", 1e-3, 1e-7, functools.partial(_light, path))
        for path in sorted(DATA.glob("light/*.onnx"))
    ]


def _from_folder(path: pathlib.Path) -> tuple[onnx.ModelProto, list[DataSet]]:
    model = onnx.load(path)
    sets = []
    for folder in sorted(path.parent.glob("test_data_set_*")):
        given = [_read(folder / f"input_{n}.pb", v.type) for n, v in enumerate(model.graph.input)]
        expected = [_read(folder / f"output_{n}.pb", v.type) for n, v in enumerate(model.graph.output)]
        sets.append((given, expected))
    return model, sets


def _read(path: pathlib.Path, type_: onnx.TypeProto) -> Any:
    if not path.exists():  # an input with a default
        return None
    kind = type_.WhichOneof("value")
    if kind == "sequence_type":
        return numpy_helper.to_list(onnx.SequenceProto.FromString(path.read_bytes()))
    if kind == "optional_type":
        return numpy_helper.to_optional(onnx.OptionalProto.FromString(path.read_bytes()))
    return numpy_helper.to_array(onnx.TensorProto.FromString(path.read_bytes()))


def _light(path: pathlib.Path) -> tuple[onnx.ModelProto, list[DataSet]]:
    model = onnx.load(path)
    weights = {tensor.name for tensor in model.graph.initializer}
    given = [None if v.name in weights else _ramp(v) for v in model.graph.input]
    expected = [
        numpy_helper.to_array(onnx.TensorProto.FromString((path.parent / f"{path.stem}_output_{n}.pb").read_bytes()))
        for n in range(len(model.graph.output))
    ]
    return model, [(given, expected)]


def _ramp(value: onnx.ValueInfoProto) -> np.ndarray[Any, Any]:
    shape = [d.dim_value if d.HasField("dim_value") else 1 for d in value.type.tensor_type.shape.dim]
    count = int(np.prod(shape))
    return (np.arange(count).reshape(shape) / count).astype(np.float32)
