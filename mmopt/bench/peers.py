"""What can be measured, behind one interface: mmopt artifacts, onnxruntime, OpenVINO, torch and torch.compile.

Every runtime is imported when its contender is loaded, so a process that measures one of them pays for that one only.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from mmopt.errors import LoadError, UserError, did_you_mean

Values = Mapping[str, Any]
"""An array (a list of arrays for a sequence) by name."""


class Contender(Protocol):
    """One way to run one model.

    Attributes:
        name: How tables and files call it.
        version: Version of the runtime behind it; known after :meth:`load`.
    """

    name: str
    version: str

    def load(self) -> None:
        """Get ready to run: import the runtime, read the model, compile what has to be compiled."""

    def run(self, inputs: Values) -> dict[str, Any]:
        """One inference."""

    def unload(self) -> None:
        """Let go of the model's memory and threads."""


@dataclasses.dataclass(frozen=True)
class Spec:
    """Everything another process needs to make a contender.

    Attributes:
        kind: A key of :data:`KINDS`.
        label: Its name in tables; unique in one run.
        source: An artifact, an ``.onnx`` or ``.pt2`` file, or ``module:function`` (torch only, runs that code).
        threads: Threads it may use.
        precision: Precision OpenVINO and torch are told to compute in. Left to itself OpenVINO takes bf16 where the
            CPU has it. onnxruntime computes in what the model says.
        pin: Whether an artifact binds each thread to a CPU of its own.
    """

    kind: str
    label: str
    source: str
    threads: int
    precision: str = "fp32"
    pin: bool = False

    def to_json(self) -> dict[str, Any]:
        """A form that survives JSON."""
        return dataclasses.asdict(self)


class ArtifactContender:
    """A compiled artifact; its other entry points are contenders of their own (see :meth:`tower`)."""

    version = ""

    def __init__(self, spec: Spec, session: Any = None, name: str = "") -> None:
        self.name = name or spec.label
        self._spec, self._session = spec, session

    def load(self) -> None:
        from mmopt.runtime import load_artifact

        self.version = importlib.metadata.version("mmopt")
        self._session = load_artifact(pathlib.Path(self._spec.source), threads=self._spec.threads, pin=self._spec.pin)

    def run(self, inputs: Values) -> dict[str, Any]:
        return dict(self._session.run(dict(inputs)))

    def unload(self) -> None:
        self._session = None

    def towers(self) -> list[str]:
        """Entry points besides ``main``."""
        return [name for name in self._session.entries if name != "main"]

    def tower(self, entry: str) -> ArtifactContender:
        """A contender for one entry point that shares this one's session."""
        return ArtifactContender(self._spec, self._session.entry(entry), f"{self.name}:{entry}")

    @property
    def input_specs(self) -> tuple[Any, ...]:
        """The :class:`~mmopt.runtime.artifact.TensorSpec` of each input."""
        return tuple(self._session.inputs)


class OnnxRuntimeContender:
    """onnxruntime's CPU provider with all graph optimizations, as its users run it."""

    version = ""

    def __init__(self, spec: Spec) -> None:
        self.name = spec.label
        self._spec = spec
        self._session: Any = None

    def load(self) -> None:
        import onnxruntime

        self.version = str(onnxruntime.__version__)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._spec.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(self._spec.source, options, providers=["CPUExecutionProvider"])
        self._outputs = [value.name for value in self._session.get_outputs()]

    def run(self, inputs: Values) -> dict[str, Any]:
        return dict(zip(self._outputs, self._session.run(None, dict(inputs)), strict=True))

    def unload(self) -> None:
        self._session = None


class OpenVinoContender:
    """OpenVINO's CPU plugin, told to answer one request at a time as fast as it can."""

    version = ""

    def __init__(self, spec: Spec) -> None:
        self.name = spec.label
        self._spec = spec
        self._request: Any = None

    def load(self) -> None:
        import openvino
        from openvino import properties

        self.version = str(openvino.__version__).split("-")[0]
        types = {"fp32": openvino.Type.f32, "bf16": openvino.Type.bf16, "fp16": openvino.Type.f16}
        options = {
            properties.hint.inference_precision(): types[self._spec.precision],
            properties.hint.performance_mode(): properties.hint.PerformanceMode.LATENCY,
            properties.inference_num_threads(): self._spec.threads,
            properties.num_streams(): 1,
        }
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(self._spec.source), "CPU", options)
        self._outputs = [port.any_name for port in compiled.outputs]
        self._request = compiled.create_infer_request()

    def run(self, inputs: Values) -> dict[str, Any]:
        results = self._request.infer(dict(inputs), share_inputs=True)
        return dict(zip(self._outputs, results.values(), strict=True))

    def unload(self) -> None:
        self._request = None


class TorchContender:
    """torch, eager or through torch.compile, from a ``.pt2`` file or from ``module:function``.

    Inputs go in by name where the program knows the names, else in order; outputs are named by position.
    """

    version = ""

    def __init__(self, spec: Spec) -> None:
        self.name = spec.label
        self._spec = spec
        self._call: Any = None
        self._names: list[str] = []

    def load(self) -> None:
        import torch

        self.version = str(torch.__version__)
        torch.set_num_threads(self._spec.threads)
        module, self._names = _torch_program(self._spec.source)
        self._call = torch.compile(module) if self._spec.kind == "torch.compile" else module

    def run(self, inputs: Values) -> dict[str, Any]:
        import torch

        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
        narrow = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self._spec.precision)
        with torch.inference_mode(), torch.autocast("cpu", dtype=narrow or torch.bfloat16, enabled=narrow is not None):
            by_name = set(self._names) == set(tensors)
            result = self._call(**tensors) if by_name else self._call(*tensors.values())
            leaves = torch.utils._pytree.tree_leaves(result)
            found = [_array(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)]
        return {f"output {i}": array for i, array in enumerate(found)}

    def unload(self) -> None:
        self._call = None


def _array(tensor: Any) -> Any:
    """A tensor for numpy, which does not know bfloat16."""
    return (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy()


def _torch_program(source: str) -> tuple[Any, list[str]]:
    """A callable and the names of its inputs (empty when they are known by order only)."""
    import torch

    if source.endswith(".pt2"):
        program = torch.export.load(source)
        return program.module(), list(program.graph_signature.user_inputs)
    place, _, function = source.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        made = getattr(importlib.import_module(place), function)()
    except (ImportError, AttributeError) as error:
        raise LoadError(str(error), where=source, hint="give package.module:function") from error
    module, examples = made[:2]
    return module.eval(), list(examples) if isinstance(examples, Mapping) else []


KINDS: dict[str, Callable[[Spec], Contender]] = {
    "mmopt": ArtifactContender,
    "onnxruntime": OnnxRuntimeContender,
    "openvino": OpenVinoContender,
    "torch": TorchContender,
    "torch.compile": TorchContender,
}
PEERS = tuple(kind for kind in KINDS if kind != "mmopt")


def open_contender(spec: Spec) -> Contender:
    """The contender a spec describes, not loaded yet."""
    return KINDS[spec.kind](spec)


def installed(kind: str) -> bool:
    """Whether the runtime behind a kind of contender can be imported here."""
    return importlib.util.find_spec(kind.partition(".")[0]) is not None


def peer_specs(
    names: Iterable[str], sources: Mapping[str, str], threads: int, precision: str = "fp32"
) -> tuple[list[Spec], dict[str, str]]:
    """Specs of the peers that can take part, and why the others cannot.

    Args:
        names: Peers asked for, of :data:`PEERS`.
        sources: ``onnx`` and ``torch``: what the peers of each kind run, where known.
        threads: Threads each may use.
        precision: Precision OpenVINO and torch compute in.

    Returns:
        The specs, and the reason for each peer left out.

    Raises:
        UserError: A name is not a peer.
    """
    specs, left_out = [], {}
    for name in names:
        if name not in PEERS:
            raise UserError(f"no peer {name!r}", where="--against", hint=did_you_mean(name, PEERS))
        source = sources.get("torch" if name.startswith("torch") else "onnx")
        if not installed(name):
            left_out[name] = "not installed"
        elif source is None:
            needs = "a .pt2 file or module:function" if name.startswith("torch") else "an .onnx file"
            left_out[name] = f"nothing to run: give it {needs} with --model"
        else:
            specs.append(Spec(name, name, source, threads, precision))
    return specs, left_out


def files_of(spec: Spec) -> list[pathlib.Path]:
    """The files a contender is made of; none for ``module:function``."""
    path = pathlib.Path(spec.source)
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.is_file())
    if path.suffix != ".onnx":
        return [path] if path.is_file() else []
    import onnx_ir as ir

    model = ir.load(path)
    tensors = (v.const_value for graph in model.graphs() for v in graph.initializers.values())
    external = {pathlib.Path(t.path) for t in tensors if isinstance(t, ir.ExternalTensor)}
    return [path, *sorted(external)]
