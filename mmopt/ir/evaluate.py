"""Reference execution of a module: what it computes, by onnxruntime with every optimization off.

Weights are neither written nor copied. The session loads a protobuf of a few kilobytes and is handed the memory of the
module's tensors (memory-mapped files included), so that a 600 MB model loads in milliseconds after every pass.
"""

from __future__ import annotations

import ctypes
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from onnx_ir import _type_casting

from mmopt.errors import BackendError
from mmopt.ir.module import Module
from mmopt.ir.skeleton import PLACEHOLDER, skeleton_proto

ONNXRUNTIME = "onnxruntime"
REFERENCE = "onnx reference evaluator"

_RANDOM_OPS = frozenset({"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial"})
_MAYBE_RANDOM_OPS = frozenset({"Bernoulli", "Dropout"})


class Outputs(dict[str, Any]):
    """Outputs by name: arrays, lists of arrays for sequences, None for an empty optional.

    Attributes:
        engine: :data:`ONNXRUNTIME`, or :data:`REFERENCE` when onnxruntime could not load the model.
        reason: Why onnxruntime could not, or "".
    """

    def __init__(self, values: Mapping[str, Any], *, engine: str = ONNXRUNTIME, reason: str = "") -> None:
        super().__init__(values)
        self.engine = engine
        self.reason = reason


class ReferenceRunner:
    """Runs modules one after another from one temporary folder.

    Args:
        threads: Threads of onnxruntime inside an operator; 0 takes all cores.
        seed: Seed of operators that draw random numbers.
    """

    def __init__(self, *, threads: int = 0, seed: int = 0) -> None:
        self._threads = threads
        self._seed = seed
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> ReferenceRunner:
        self._folder = tempfile.TemporaryDirectory(prefix="mmopt-")
        # onnxruntime wants the file of an external initializer to exist, even when its data comes from memory.
        (pathlib.Path(self._folder.name) / PLACEHOLDER).write_bytes(b"\0")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def run(self, module: Module, inputs: Mapping[str, Any]) -> Outputs:
        """Run ``module`` once.

        Args:
            module: The module to run; it is unchanged afterwards.
            inputs: An array (a list of arrays for a sequence input) for each input without a default, by name.

        Returns:
            All graph outputs, each in its own dtype: those that numpy lacks (bfloat16, float8, int4) as ml_dtypes.

        Raises:
            BackendError: Neither onnxruntime nor onnx's reference evaluator could run the module on these inputs.
        """
        return self.run_all(module, [inputs])[0]

    def run_all(self, module: Module, batches: Sequence[Mapping[str, Any]]) -> list[Outputs]:
        """Run ``module`` on several sets of inputs with one loaded session; otherwise as :meth:`run`."""
        return list(self.stream(module, batches))

    def stream(self, module: Module, batches: Iterable[Mapping[str, Any]]) -> Iterator[Outputs]:
        """As :meth:`run_all`, one set after another, so that only one set of outputs need be in memory."""
        run = self.prepare(module)
        for inputs in batches:
            yield run(inputs)

    def prepare(self, module: Module) -> Callable[[Mapping[str, Any]], Outputs]:
        """``module``, loaded once, as a function from inputs to outputs; otherwise as :meth:`run`."""
        session, reason = self._load(module)
        if session is None:
            return lambda inputs: _run_reference(module, inputs, reason)
        return session.run

    def refusal(self, module: Module) -> str:
        """Why onnxruntime cannot load ``module``, or "" when it can."""
        return self._load(module)[1]

    def _load(self, module: Module) -> tuple[_Session | None, str]:
        if self._folder is None:
            raise RuntimeError("ReferenceRunner is a context manager: use it in a with statement")
        proto, left_out = skeleton_proto(module.model)
        options = _session_options(self._threads)
        weights = {name: value.const_value for name, value in left_out.items() if value.const_value is not None}
        values = {name: _ort_value(tensor.numpy(), tensor.dtype) for name, tensor in weights.items()}
        for name, value in values.items():
            options.add_initializer(name, value)
        path = pathlib.Path(self._folder.name) / "model.onnx"
        path.write_bytes(proto.SerializeToString())
        ort.set_seed(self._seed)
        try:
            loaded = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises a dozen unrelated types; all of them end in the fallback
            return None, _first_line(error)
        return _Session(loaded, values), ""


def is_random(module: Module) -> bool:
    """Whether some operator of ``module`` draws random numbers without a fixed seed."""
    for graph in module.model.graphs():
        for node in graph:
            if node.domain == "" and node.op_type in _RANDOM_OPS and "seed" not in node.attributes:
                return True
            if node.domain == "" and node.op_type in _MAYBE_RANDOM_OPS and _draws(node):
                return True
    return False


def _draws(node: ir.Node) -> bool:
    if node.op_type != "Dropout":
        return "seed" not in node.attributes
    training = node.inputs[2] if len(node.inputs) > 2 else None
    return training is not None and (training.const_value is None or bool(training.const_value.numpy()))


class _Session:
    """A loaded onnxruntime session together with the memory its weights lie in."""

    def __init__(self, session: ort.InferenceSession, weights: dict[str, ort.OrtValue]) -> None:
        self._session = session
        self._weights = weights
        self._names = [output.name for output in session.get_outputs()]
        self._types = {value.name: value.type for value in (*session.get_inputs(), *session.get_outputs())}

    def run(self, inputs: Mapping[str, Any]) -> Outputs:
        # numpy turns what should be arrays of rank 0 into its scalars, which onnxruntime does not take.
        inputs = {name: np.asarray(value) if np.isscalar(value) else value for name, value in inputs.items()}
        try:
            if any(_is_exotic(kind) for kind in self._types.values()):
                return Outputs(self._run_ort_values(inputs))
            return Outputs(dict(zip(self._names, self._session.run(self._names, inputs), strict=True)))
        except Exception as error:
            raise BackendError(
                f"onnxruntime could not run the model: {_first_line(error)}",
                where=", ".join(f"{name} {_describe(value)}" for name, value in inputs.items()),
                hint="check that the inputs are legal for the model (sizes, index ranges)",
            ) from error

    def _run_ort_values(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        feeds = {name: _ort_value(value, ir.DataType.from_numpy(value.dtype)) for name, value in inputs.items()}
        values = self._session.run_with_ort_values(self._names, feeds)
        return {name: _read(value) for name, value in zip(self._names, values, strict=True)}


def _session_options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False
    options.use_deterministic_compute = True
    options.log_severity_level = 4
    return options


def _is_exotic(kind: str) -> bool:
    """Whether numpy alone cannot hold a value of onnxruntime's type ``kind``."""
    return kind.startswith("tensor(") and any(word in kind for word in ("bfloat16", "float8", "float4", "int4", "int2"))


def _ort_value(array: np.ndarray[Any, Any], dtype: ir.DataType) -> ort.OrtValue:
    if dtype == ir.DataType.STRING:
        return ort.OrtValue.ortvalue_from_numpy(array)
    array = np.asarray(array)
    if not (array.flags.c_contiguous and array.flags.aligned):
        array = np.array(array, order="C")
    if dtype.bitwidth < 8:
        return _packed_ort_value(array, dtype)
    carrier = array.view(f"u{dtype.itemsize:g}") if dtype.bitwidth <= 16 else array
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(carrier, dtype.value)


def _packed_ort_value(array: np.ndarray[Any, Any], dtype: ir.DataType) -> ort.OrtValue:
    """A value of a type that packs several elements into a byte, in memory of our own as add_initializer wants it.

    The carrier has a byte an element, because onnxruntime takes the shape from it; it reads the packed front only.
    """
    carrier = np.zeros(array.shape, dtype=np.uint8)
    packed = np.frombuffer(ir.Tensor(array, dtype=dtype).tobytes(), dtype=np.uint8)
    carrier.reshape(-1)[: packed.size] = packed
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(carrier, dtype.value)


def _read(value: ort.OrtValue) -> Any:
    if not value.is_tensor():
        return value.numpy()
    dtype = ir.DataType(value.element_type())
    if not _is_exotic(value.data_type()):
        return value.numpy()
    shape = tuple(value.shape())
    raw = np.frombuffer(ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes()), dtype=np.uint8)
    if dtype.bitwidth == 4:
        return _type_casting.unpack_4bitx2(raw, shape).view(dtype.numpy())
    if dtype.bitwidth == 2:
        return _type_casting.unpack_2bitx4(raw, shape).view(dtype.numpy())
    return raw.view(dtype.numpy()).reshape(shape)


def _run_reference(module: Module, inputs: Mapping[str, Any], reason: str) -> Outputs:
    from onnx.reference import ReferenceEvaluator

    try:
        proto, _ = skeleton_proto(module.model, inline_bytes=1 << 62)
        evaluator = ReferenceEvaluator(proto)
        values = evaluator.run(None, dict(inputs))
    except Exception as error:
        raise BackendError(
            f"the model cannot be run: onnxruntime: {reason}; {REFERENCE}: {_first_line(error)}",
            hint="look for an operator, opset or type that neither knows",
        ) from error
    return Outputs(dict(zip(evaluator.output_names, values, strict=True)), engine=REFERENCE, reason=reason)


def _describe(value: Any) -> str:
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
