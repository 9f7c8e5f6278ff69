"""Sets single weights to zero: for size, and for targets with sparse arithmetic.

    W ← W ⊙ mask        all over the weight, or two of every four along the depth (2:4)

A dense kernel is no faster on zeros. What gets smaller is the model once it is compressed.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from mmopt.errors import UserError
from mmopt.ir.evaluate import ReferenceRunner
from mmopt.ir.module import Module
from mmopt.pipeline.base import Fidelity, Pass, PassContext
from mmopt.transforms.canonicalize.editing import tensor_of
from mmopt.transforms.prune.linear_maps import LinearMap, linear_maps
from mmopt.transforms.prune.observing import Sample, batches_of, stream
from mmopt.transforms.prune.padding import valid_rows
from mmopt.transforms.prune.reference import remember

Array = np.ndarray[Any, Any]

DAMPING = 0.01
"""Part of the mean diagonal added to a Gram matrix, which few samples leave singular."""

_PANEL = 128
"""Rows of the depth whose zeros are chosen together."""

_ROWS = 20000
_SMALLEST = 1024
"""Weights with fewer elements are left alone: there is nothing to gain."""


@dataclasses.dataclass(frozen=True)
class PruneWeights(Pass):
    """Set single weights to zero, which makes the compressed model smaller and nothing faster; 2:4 for sparse hardware.

    Attributes:
        sparsity: Share of the weights of each product that becomes zero; 2:4 is always half.
        pattern: ``unstructured``, or ``2:4``: two of any four along the depth.
        criterion: ``magnitude``; ``activation`` (|w| · ‖x‖: Wanda, Sun et al., 2024); ``second-order`` also fits the
            other weights again (SparseGPT, Frantar and Alistarh, 2023). ``auto`` is ``second-order`` with calibration
            samples, else ``magnitude``.
        include: Patterns of names of nodes; all when empty.
        exclude: Patterns of names of nodes to leave alone.
        samples: Calibration samples to use; 0 for all.
    """

    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY

    sparsity: float = 0.5
    pattern: Literal["unstructured", "2:4"] = "unstructured"
    criterion: Literal["auto", "magnitude", "activation", "second-order"] = "auto"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    samples: int = 0

    def run(self, module: Module, context: PassContext) -> bool:
        """Choose zeros product by product; the report says what the weights take compressed, before and after.

        Raises:
            UserError: A sparsity that is none, or nothing to calibrate on.
        """
        if not 0 < self.sparsity < 1:
            raise UserError(f"a sparsity of {self.sparsity:g} makes no sense", where=self.name, hint="0 < sparsity < 1")
        maps = [found for found in linear_maps(module.graph) if self._wants(found, context)]
        criterion = self.criterion
        if criterion == "auto":
            criterion = "magnitude" if context.inputs is None else "second-order"
        if criterion != "magnitude" and context.inputs is None:
            raise UserError(f"{criterion} needs samples", where=self.name, hint="give --calib, or use magnitude")
        grams: Mapping[str, Array] = {}
        if criterion != "magnitude":
            grams = _grams(module, maps, batches_of(module, context.inputs or {}, most=self.samples), context.seed)
        original = module.clone()
        before = after = changed = 0
        for found in {one.weight: one for one in maps}.values():
            weight = _array(found)
            matrix = found.matrix(weight).astype(np.float64)
            fitted = np.stack([
                self._sparse(block, grams[found.name][number] if grams else None, criterion)
                for number, block in enumerate(matrix)
            ])  # fmt: skip
            result = found.weight_of(fitted.astype(np.float32), weight.shape)
            found.weight.const_value = ir.tensor(np.ascontiguousarray(result), name=found.weight.name)
            before, after = before + _compressed(weight), after + _compressed(result)
            changed += 1
        if not changed:
            return False
        remember(module, original)
        share = 0.5 if self.pattern == "2:4" else self.sparsity
        self.remark(
            context,
            "applied",
            "",
            f"{share:.0%} of {changed} weights are zero ({self.pattern}), for size only: compressed, they take "
            f"{before / 1e6:.2f} MB → {after / 1e6:.2f} MB; dense kernels are no faster on zeros.",
        )
        return True

    def _wants(self, found: LinearMap, context: PassContext) -> bool:
        name = str(found.node.name)
        if self.include and not any(fnmatch.fnmatchcase(name, pattern) for pattern in self.include):
            return False
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in self.exclude):
            return False
        weight = _array(found)
        depth = found.matrix(weight).shape[1]
        reason = ""
        if weight.size < _SMALLEST:
            reason = f"{weight.size} elements are too few to gain anything"
        elif self.pattern == "2:4" and depth % 4:
            reason = f"its depth of {depth} is no multiple of 4"
        if reason:
            self.remark(context, "missed", name, f"stays dense: {reason}.")
        return not reason

    def _sparse(self, weight: Array, gram: Array | None, criterion: str) -> Array:
        """``weight``, ``[depth, results]``, with zeros in it."""
        if gram is None or criterion == "magnitude":
            return np.where(self._zeros(np.abs(weight)), 0.0, weight)
        if criterion == "activation":
            lengths = np.sqrt(np.maximum(np.diag(gram), 0))[:, None]
            return np.where(self._zeros(np.abs(weight) * lengths), 0.0, weight)
        return self._swept(weight, gram)

    def _zeros(self, scores: Array) -> Array:
        """Where the least of ``scores``, ``[depth, results]``, lie: for each result, or in each four."""
        if self.pattern == "2:4":
            fours = scores.reshape(-1, 4, scores.shape[1])
            ranks = fours.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
            return np.asarray((ranks < 2).reshape(scores.shape))
        count = round(self.sparsity * len(scores))
        ranks = scores.argsort(axis=0, kind="stable").argsort(axis=0, kind="stable")
        return np.asarray(ranks < count)

    def _swept(self, weight: Array, gram: Array) -> Array:
        """Go through the depth; what setting a weight to zero loses, the weights after it make up for."""
        damped = gram.copy()
        damped[np.diag_indices_from(damped)] += DAMPING * max(float(np.diag(gram).mean()), 1e-30)
        inverse = np.linalg.inv(damped)
        factor = np.linalg.cholesky((inverse + inverse.T) / 2).T
        result = weight.copy()
        for start in range(0, len(weight), _PANEL):
            stop = min(start + _PANEL, len(weight))
            pivots = np.diag(factor)[start:stop, None]
            zeros = self._zeros((result[start:stop] / pivots) ** 2)
            errors = np.zeros((stop - start, weight.shape[1]))
            for row in range(start, stop):
                error = np.where(zeros[row - start], result[row], 0.0) / factor[row, row]
                result[row:stop] -= factor[row, row:stop, None] * error
                errors[row - start] = error
            result[stop:] -= factor[start:stop, stop:].T @ errors
            result[start:stop][zeros] = 0.0
        return result


def _grams(
    module: Module, maps: Sequence[LinearMap], batches: Sequence[Mapping[str, Array]], seed: int
) -> dict[str, Array]:
    """``XᵀX`` of the rows that each product reads, ``[blocks, depth, depth]``, by its name."""
    valid = valid_rows(module)
    most = _ROWS // len(batches) + 1
    found: dict[str, Array] = {}
    with ReferenceRunner(seed=seed) as runner:
        values = stream(module, [str(one.data.name) for one in maps], batches, runner)
        for number, tensors in enumerate(values):
            for one in maps:
                data = tensors[str(one.data.name)]
                choose = Sample(valid(one, data, batches[number]), most, (seed, number))
                rows = one.rows(data, _array(one), choose).astype(np.float64)
                found[one.name] = found.get(one.name, 0.0) + rows.transpose(0, 2, 1) @ rows
    return found


def _array(found: LinearMap) -> Array:
    tensor = tensor_of(found.weight)
    assert tensor is not None
    return np.asarray(tensor.numpy())


def _compressed(weight: Array) -> int:
    return len(zlib.compress(np.ascontiguousarray(weight, dtype=np.float32).tobytes(), 1))
