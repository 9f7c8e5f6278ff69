"""Decides whether a pass kept its contract: structure, signature, honesty about changes, and values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from mmopt.errors import LoadError, MmoptError
from mmopt.ir.evaluate import ONNXRUNTIME, Outputs, ReferenceRunner, is_random
from mmopt.ir.fingerprint import fingerprint, structure_hash
from mmopt.ir.module import Module
from mmopt.ir.skeleton import INLINE_BYTES
from mmopt.ir.verify import Diagnostic, describe, verify
from mmopt.pipeline.base import Fidelity
from mmopt.pipeline.validation import OutputComparison, compare_outputs, tolerance_for, working_precision, worst


class Rejected(MmoptError):
    """A module is not an acceptable successor of the one before it; ``what`` says why."""

    def __init__(self, what: str, *, comparisons: Sequence[OutputComparison] = ()) -> None:
        super().__init__(what)
        self.comparisons = list(comparisons)


@dataclasses.dataclass
class Known:
    """What is known about an accepted module.

    Attributes:
        fingerprint: Its :func:`~mmopt.ir.fingerprint.fingerprint`.
        problems: Kind and text of the warnings it already had: a pass answers for new ones only.
        signature: Its inputs and outputs.
        precision: The coarsest number format in it.
        undeclared: What :func:`_undeclared` says about its outputs.
        structure: Its :func:`~mmopt.ir.fingerprint.structure_hash`.
        outputs: Its outputs for each set of inputs; empty when values are not compared.
    """

    fingerprint: str
    problems: frozenset[tuple[str, str]]
    signature: Signature
    precision: str
    structure: str
    outputs: list[Outputs] = dataclasses.field(default_factory=list)
    undeclared: str = ""


class Guard:
    """Checks the modules of one pipeline run.

    Args:
        runner: An open runner.
        batches: Sets of inputs to run modules on; none at all when values are not to be compared.
    """

    def __init__(self, runner: ReferenceRunner, batches: Sequence[Mapping[str, Any]]) -> None:
        self._runner = runner
        self._batches = batches
        self._draws = False
        self._unstable: frozenset[str] = frozenset()

    def know(self, module: Module, problems: Sequence[Diagnostic], outputs: list[Outputs]) -> Known:
        """Learn the facts of a module that is taken as right.

        Args:
            module: The module.
            problems: From :func:`check_start`.
            outputs: Its outputs on the sets of inputs.
        """
        if outputs and is_random(module):
            self._draws = True
            self._unstable = _unstable(outputs, self._runner.run_all(module, self._batches))
        return Known(
            fingerprint(module.model),
            _kinds(problems),
            _signature(module),
            working_precision(module),
            structure_hash(module.model),
            outputs,
            _undeclared(module, outputs),
        )

    def accept(
        self, module: Module, print_: str, before: Known, fidelity: Fidelity, *, bound: float | None, sets: int
    ) -> tuple[Known, list[OutputComparison]]:
        """Check that ``module`` may follow the module that ``before`` describes.

        Args:
            module: What a pass made.
            print_: Its fingerprint.
            before: Facts of the module it was made from.
            fidelity: What the pass declares.
            bound: The bound of a lossy pass, if it has one.
            sets: How many sets of inputs to compare values on; 0 compares structure only.

        Returns:
            The facts of ``module``, and its outputs compared with those before (the worst of all inputs, an output).

        Raises:
            Rejected: It may not; the reason is the first of: structure, signature, annotations, values.
        """
        problems = verify(module)
        if errors := _errors(problems):
            raise Rejected(describe(errors))
        signature = _signature(module)
        if change := _signature_change(before.signature, signature):
            raise Rejected(change)
        if fresh := [problem for problem in problems if (problem.code, problem.where) not in before.problems]:
            raise Rejected(describe(fresh))
        known = Known(print_, _kinds(problems), signature, working_precision(module), structure_hash(module.model))
        if not (sets and before.outputs):
            return known, []
        if known.structure == before.structure and not self._draws:
            # The same computation under other names or annotations: running it could only give the same bits.
            known.outputs = before.outputs[:sets]
        else:
            known.outputs = self._run(module, before.outputs, slice(0, sets))
        comparisons = self.compare(before, known, fidelity, bound)
        refuse_mismatch(comparisons)
        known.undeclared = _undeclared(module, known.outputs)
        if known.undeclared and known.undeclared != before.undeclared:
            raise Rejected(known.undeclared, comparisons=comparisons)
        return known, comparisons

    def compare(
        self, before: Known, after: Known, fidelity: Fidelity, bound: float | None = None
    ) -> list[OutputComparison]:
        """Compare the outputs of two modules; for each output the worst over all sets that both ran on.

        The number format of the module before decides: a pass that brings in a coarser one is not exact or rounding.
        """
        tolerance = tolerance_for(fidelity, before.precision, bound=bound)
        by_name: dict[str, list[OutputComparison]] = {}
        for reference, actual in zip(before.outputs, after.outputs, strict=False):
            for found in compare_outputs(reference, actual, tolerance):
                if found.name not in self._unstable:
                    by_name.setdefault(found.name, []).append(found)
        return [result for group in by_name.values() if (result := worst(group)) is not None]

    def finish(self, module: Module, start: Known, end: Known, fidelity: Fidelity, bound: float | None) -> None:
        """Run the last module on the sets that it has not run on, and compare it with the first.

        Raises:
            Rejected: Values differ by more than ``fidelity`` and ``bound`` allow.
        """
        rest = slice(len(end.outputs), len(self._batches))
        if rest.start < rest.stop:
            end.outputs = [*end.outputs, *self._run(module, start.outputs, rest)]
        refuse_mismatch(self.compare(start, end, fidelity, bound))

    def _run(self, module: Module, before: Sequence[Outputs], sets: slice) -> list[Outputs]:
        try:
            outputs = self._runner.run_all(module, self._batches[sets])
        except MmoptError as error:
            raise Rejected(f"the module no longer runs: {error.what}") from error
        if before[0].engine == ONNXRUNTIME != outputs[0].engine:
            # The reference evaluator does not check types, so it would accept what no runtime can load.
            raise Rejected(f"onnxruntime no longer loads the module: {outputs[0].reason}")
        return outputs


def check_start(module: Module) -> list[Diagnostic]:
    """Verify the module that a run starts from.

    Returns:
        The warnings about it.

    Raises:
        LoadError: It is not valid ONNX.
    """
    problems = verify(module)
    if errors := _errors(problems):
        raise LoadError(describe(errors), where="model", hint="passes need a valid model to start from")
    return problems


def check_claim(claimed: object, before: str, after: str) -> bool:
    """Compare a pass's claim to have changed the module with the module's fingerprints.

    Returns:
        Whether it did change.

    Raises:
        Rejected: The claim is untrue, or no bool.
    """
    if not isinstance(claimed, bool | np.bool_):
        raise Rejected(f"run() returned {type(claimed).__name__}, must return whether it changed the module (a bool)")
    changed = before != after
    if claimed and not changed:
        raise Rejected("says that it changed the module, but nothing is different")
    if changed and not claimed:
        raise Rejected("changed the module, but says that it did not")
    return changed


def refuse_mismatch(comparisons: Sequence[OutputComparison]) -> None:
    """Raise Rejected, naming the worst output, unless all ``comparisons`` are good."""
    found = worst(comparisons)
    if found is not None and not found.ok:
        raise Rejected(f"output {found.name!r}: {found.reason}", comparisons=comparisons)


def read_only_weights(module: Module) -> None:
    """Give ``module`` read-only views of its weights in memory: clones share them, so a write would reach them all.

    The arrays themselves stay as they are for whoever else holds them.
    """
    views: dict[int, ir.Tensor[Any]] = {}
    for graph in module.model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None or not (_is_writable(tensor) or _is_decoded_on_every_use(tensor)):
                continue
            if id(tensor) not in views:
                view = tensor.numpy().view()
                view.flags.writeable = False
                views[id(tensor)] = ir.Tensor(view, dtype=tensor.dtype, name=tensor.name, doc_string=tensor.doc_string)
            value.const_value = views[id(tensor)]


def _is_writable(tensor: ir.TensorProtocol) -> bool:
    return isinstance(tensor, ir.Tensor) and bool(tensor.numpy().flags.writeable)


def _is_decoded_on_every_use(tensor: ir.TensorProtocol) -> bool:
    """Whether the tensor is a protobuf of some size, which would be copied for every run of every version."""
    is_protobuf = isinstance(tensor, ir.TensorProtoTensor) and tensor.dtype != ir.DataType.STRING
    return is_protobuf and tensor.nbytes > INLINE_BYTES


def _errors(problems: Sequence[Diagnostic]) -> list[Diagnostic]:
    return [problem for problem in problems if problem.severity == "error"]


def _kinds(problems: Sequence[Diagnostic]) -> frozenset[tuple[str, str]]:
    return frozenset((problem.code, problem.where) for problem in problems)


_Dims = tuple["int | str | None", ...]
_Entry = tuple[str, str, "_Dims | None"]
Signature = tuple[tuple[_Entry, ...], tuple[_Entry, ...]]
"""Name, type and shape of each input, and of each output."""


def _signature(module: Module) -> Signature:
    return tuple(map(_entry, module.graph.inputs)), tuple(map(_entry, module.graph.outputs))


def _entry(value: ir.Value) -> _Entry:
    dims = None if value.shape is None else tuple(d if isinstance(d, int) else d.value for d in value.shape)
    return str(value.name), str(value.type), dims


def _signature_change(before: Signature, after: Signature) -> str:
    """Say which input or output is not what it was, or "". Learning an unknown size is no change."""
    for kind, old, new in zip(("inputs", "outputs"), before, after, strict=True):
        old_names, new_names = [entry[0] for entry in old], [entry[0] for entry in new]
        if old_names != new_names:
            return f"the {kind} are {', '.join(new_names) or 'none'}, were {', '.join(old_names) or 'none'}"
        for (name, old_type, old_dims), (_, new_type, new_dims) in zip(old, new, strict=True):
            if old_type != new_type:
                return f"{kind[:-1]} {name!r} has type {new_type}, had {old_type}"
            if not _refines(new_dims, old_dims, symbols=kind == "outputs"):
                return f"{kind[:-1]} {name!r} has shape {_shown(new_dims)}, had {_shown(old_dims)}"
    return ""


def _refines(new: _Dims | None, old: _Dims | None, *, symbols: bool) -> bool:
    """Whether ``new`` says what ``old`` says and perhaps more; ``symbols`` may be replaced when that is set."""
    if old is None or new is None:
        return old is None
    if len(new) != len(old):
        return False
    return all(
        mine == theirs or theirs is None or (symbols and isinstance(theirs, str))
        for mine, theirs in zip(new, old, strict=True)
    )


def _shown(dims: _Dims | None) -> str:
    return "unknown" if dims is None else f"[{', '.join('?' if dim is None else str(dim) for dim in dims)}]"


def _undeclared(module: Module, outputs: Sequence[Outputs]) -> str:
    """Say which output has a size that the graph does not declare, or ""."""
    for value in module.graph.outputs:
        for values in outputs:
            array = values.get(str(value.name))
            if value.shape is None or not isinstance(array, np.ndarray):
                continue
            declared = [dim if isinstance(dim, int) else None for dim in value.shape]
            fits = len(declared) == array.ndim and all(
                size is None or size == actual for size, actual in zip(declared, array.shape, strict=True)
            )
            if not fits:
                return f"output {value.name!r} is declared {value.shape} but comes out as {list(array.shape)}"
    return ""


def _unstable(first: Sequence[Outputs], second: Sequence[Outputs]) -> frozenset[str]:
    """Names of outputs that differ between two runs of one module."""
    return frozenset(
        found.name
        for one, other in zip(first, second, strict=True)
        for found in compare_outputs(one, other, Fidelity.EXACT)
        if not found.ok
    )
