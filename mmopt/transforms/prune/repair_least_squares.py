"""Fits the weights behind a cut to what the model computed before it: closed form, no labels, no gradients.

    min ‖X' M' + b' − X M‖² + λ ‖M' − M_cut‖²        M' = (G + λ)⁻¹ (X'ᵀ X M + λ M_cut)        G = X'ᵀ X'

X are rows that a product reads in the model as it was, X' the same rows in the model after the cut, with everything
before them repaired already; M_cut is what the cut left of M. The offset b' goes into the bias (so biases are corrected
too). λ is the one that predicts the half of the samples best that it was not fitted to, and where none is better than
leaving the weights alone, they are left alone.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from mmopt.errors import UserError
from mmopt.ir.evaluate import ReferenceRunner
from mmopt.ir.module import Module
from mmopt.pipeline.base import Fidelity, Pass, PassContext
from mmopt.transforms.canonicalize.editing import tensor_of
from mmopt.transforms.prune.linear_maps import LinearMap, linear_maps, norm_maps
from mmopt.transforms.prune.modalities import with_each_modality_alone
from mmopt.transforms.prune.observing import Sample, batches_of, levels, stream
from mmopt.transforms.prune.padding import valid_rows
from mmopt.transforms.prune.reference import Reference, reference_of
from mmopt.transforms.prune.sensitivity import outputs_moved

Array = np.ndarray[Any, Any]

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Values of λ to try, as a part of the mean diagonal of G."""

ROWS_PER_COLUMN = 12
"""Rows of data for each unknown of a product, where there are so many."""

FEWEST_ROWS = 4096

JUDGED = 4
"""Sets of inputs on which a repair must bring the outputs of the model nearer to what they were."""

SPARSE = 0.1
"""Share of zeros from which a weight counts as sparse: then only its bias is corrected."""


@dataclasses.dataclass(frozen=True)
class RepairLeastSquares(Pass):
    """Fit the weights behind a cut to what the model computed before it, on calibration samples, without labels.

    Attributes:
        mode: ``weights`` fits weights and biases; ``bias`` only puts means right.
        reference: The model as it was, a file; the one that `prune-structured` or `prune-weights` started from when
            empty.
        samples: Calibration samples to use; 0 for all.
    """

    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY

    mode: Literal["weights", "bias"] = "weights"
    reference: str = ""
    samples: int = 0

    def run(self, module: Module, context: PassContext) -> bool:
        """Repair every product with a constant weight behind the first change, one after the other.

        Raises:
            UserError: There is nothing to calibrate on, or nothing to compare with.
        """
        reference = self._reference(module)
        if reference is None:
            self.remark(context, "missed", "", "nothing was cut from this module, and no reference is given.")
            return False
        if context.inputs is None:
            raise UserError("there is nothing to repair on", where=self.name, hint="give samples with --calib")
        batches = with_each_modality_alone(module, batches_of(module, context.inputs, most=self.samples))
        repair = _Repair(module, reference, batches, bias_only=self.mode == "bias", seed=context.seed)
        fits = repair.run()
        for fit in fits:
            if fit.strength is None:
                self.remark(
                    context,
                    "note",
                    fit.name,
                    "left as it is: no fit brings it nearer on other samples, or the outputs.",
                )
            else:
                message = f"relative error of what it computes {fit.before:.3f} → {fit.after:.3f} on other samples."
                self.remark(context, "note", fit.name, message)
        done = [fit for fit in fits if fit.strength is not None]
        if done:
            before, after = (float(np.mean([getattr(fit, part) for fit in done])) for part in ("before", "after"))
            message = f"{len(done)} of {len(fits)} products repaired; mean relative error {before:.3f} → {after:.3f}."
            self.remark(context, "applied", "", message)
        for name in repair.skipped:
            self.remark(context, "missed", name, "it cannot be told which parts of the original it corresponds to.")
        return bool(done)

    def _reference(self, module: Module) -> Reference | None:
        if not self.reference:
            return reference_of(module)
        from mmopt.frontends.onnx import load_onnx

        return Reference(load_onnx(pathlib.Path(self.reference)))


@dataclasses.dataclass(frozen=True)
class Fit:
    """How one product was repaired.

    Attributes:
        name: The product.
        before: Root of the squared error, of the root of the squared results, before; on samples not fitted to.
        after: The same after the repair.
        strength: λ chosen, as a part of the mean diagonal; infinite when only the bias changed; None when nothing did.
        constants: What its weights and biases become.
    """

    name: str
    before: float
    after: float
    strength: float | None
    constants: Mapping[ir.Value, Array] = dataclasses.field(default_factory=dict, repr=False)

    def dropped(self) -> Fit:
        """The same with nothing changed."""
        return Fit(self.name, self.before, self.before, None)


@dataclasses.dataclass
class _Sums:
    """What is summed over rows for one product: with a column of ones when it has a bias. Float64."""

    gram: Array
    cross: Array
    power: Array

    @classmethod
    def empty(cls, blocks: int, depth: int, results: int) -> _Sums:
        return cls(np.zeros((blocks, depth, depth)), np.zeros((blocks, depth, results)), np.zeros(blocks))

    def add(self, rows: Array, wanted: Array) -> None:
        turned = rows.transpose(0, 2, 1)
        self.gram += turned @ rows
        self.cross += turned @ wanted
        self.power += np.einsum("bnr,bnr->b", wanted, wanted, dtype=np.float64)

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(self.gram + other.gram, self.cross + other.cross, self.power + other.power)

    def error(self, matrix: Array) -> float:
        """Squared error of all rows when the product is ``matrix``."""
        fitted = 2 * np.einsum("bdr,bdr->b", matrix, self.cross)
        own = np.einsum("bdr,bdr->b", matrix, self.gram @ matrix)
        return float(np.maximum(self.power - fitted + own, 0).sum())


class _Repair:
    """One repair of one module."""

    def __init__(
        self,
        module: Module,
        reference: Reference,
        batches: Sequence[Mapping[str, Array]],
        *,
        bias_only: bool,
        seed: int,
    ) -> None:
        self._module, self._reference, self._batches = module, reference, batches
        self._bias_only, self._seed = bias_only, seed
        self._originals = {found.name: found for found in _all_maps(reference.module)}
        self._valid = valid_rows(module)
        self.skipped: list[str] = []

    def run(self) -> list[Fit]:
        maps = [found for found in _all_maps(self._module) if self._corresponds(found)]
        owners = {found.node: 1 for found in maps}
        owners.update({found.node: 2 for found in maps if found.kind == "state"})
        depth = levels(self._module.graph, owners)
        dirty = self._dirty()
        stages: dict[int, list[LinearMap]] = {}
        for found in maps:
            if found.data in dirty or self._is_changed(found):
                # A state is read one step after the layer's input has been repaired; the result of a normalization
                # stands for what it reads.
                is_behind = found.kind in ("state", "norm")
                level = depth[found.data] - 1 if is_behind else depth.get(found.data, 0)
                stages.setdefault(level, []).append(found)
        fits: list[Fit] = []
        with ReferenceRunner(seed=self._seed) as runner:
            judge = _Judge(self._module, self._reference.module, self._batches, runner)
            for level in sorted(stages):
                fits += judge.accepted(self._stage(stages[level], runner))
        return fits

    def _corresponds(self, found: LinearMap) -> bool:
        original = self._originals.get(found.name)
        if original is None or original.kind != found.kind:
            self.skipped.append(found.name)
            return False
        try:
            wanted, now = self._original_matrix(original), _matrix(found)
        except (ValueError, IndexError):
            self.skipped.append(found.name)
            return False
        if wanted.shape[0] != now.shape[0] or wanted.shape[2] != now.shape[2]:
            self.skipped.append(found.name)
            return False
        return True

    def _is_changed(self, found: LinearMap) -> bool:
        """Whether a weight is not what the cut of its results alone would have left."""
        wanted, now = self._original_matrix(self._originals[found.name]), _matrix(found)
        return wanted.shape != now.shape or not np.array_equal(wanted, now)

    def _original_matrix(self, original: LinearMap) -> Array:
        """The original weight with the results that were kept, and all that it reads (in groups: what was kept)."""
        weight = np.asarray(_tensor(original.weight).numpy())
        weight = self._reference.take(str(original.weight.name), original.out_axis, weight)
        groups = original.groups
        if groups > 1:
            channels = weight.shape[0]
            per_group = _shape(original.weight)[0] // groups
            return weight.reshape(channels // per_group, per_group, -1).transpose(0, 2, 1)
        return original.matrix(weight)

    def _dirty(self) -> set[ir.Value]:
        """Values that may differ from those of the reference."""
        before = {str(v.name): v for v in self._reference.module.graph.initializers.values()}
        dirty: set[ir.Value] = set()
        for name, value in self._module.graph.initializers.items():
            old, new = before.get(name), value.const_value
            if old is None or old.const_value is None or new is None or not _same(old.const_value, new):
                dirty.add(value)
        for node in self._module.graph:
            if any(value in dirty for value in node.inputs if value is not None):
                dirty.update(node.outputs)
        return dirty

    def _stage(self, maps: Sequence[LinearMap], runner: ReferenceRunner) -> list[Fit]:
        """Fit products that do not depend on each other, from one run over the samples."""
        names = [str(found.data.name) for found in maps]
        originals = [self._originals[found.name] for found in maps]
        old_names = [str(found.data.name) for found in originals]
        tied = _tied(maps)
        sums: dict[ir.Value, tuple[_Sums, _Sums]] = {}
        for found in maps:
            if found.weight not in sums:
                blocks, depth, results = _matrix(found).shape
                depth += found.bias is not None
                sums[found.weight] = (_Sums.empty(blocks, depth, results), _Sums.empty(blocks, depth, results))
        wanted = {found: self._original_matrix(original) for found, original in zip(maps, originals, strict=True)}
        now = stream(self._module, names, self._batches, runner)
        then = stream(self._reference.module, old_names, self._batches, runner)
        for number, (new, old) in enumerate(zip(now, then, strict=True)):
            for found in maps:
                rows, results = self._rows(found, new, old, wanted[found], number)
                half = number % 2 if len(self._batches) > 1 else 0
                sums[found.weight][half].add(rows, results)
        return [self._solve(tied[weight], *sums[weight]) for weight in sums]

    def _rows(
        self,
        found: LinearMap,
        new: Mapping[str, Array],
        old: Mapping[str, Array],
        matrix: Array,
        number: int,
    ) -> tuple[Array, Array]:
        """What the product reads now, with a column of ones for its bias, and what it gave in the reference."""
        original = self._originals[found.name]
        weight = np.asarray(_tensor(found.weight).numpy())
        depth = int(np.prod(weight.shape)) // max(1, weight.shape[found.out_axis])
        most = max(FEWEST_ROWS, ROWS_PER_COLUMN * depth) // len(self._batches) + 1
        data, before = new[str(found.data.name)], old[str(original.data.name)]
        feeds = self._batches[number]
        choose = Sample(self._valid(found, data, feeds), most, (self._seed, number))
        rows = found.rows(data, weight, choose).astype(np.float64)
        if original.groups > 1 or original.kind == "norm":
            kept = self._reference.take(str(original.data.name), original.channel_axis, before)
            old_rows = found.rows(kept, weight, choose)
        else:
            old_rows = original.rows(before, np.asarray(_tensor(original.weight).numpy()), choose)
        if found.bias is not None:
            rows = np.concatenate([rows, np.ones((*rows.shape[:2], 1))], axis=2)
        return rows, old_rows.astype(np.float64) @ matrix

    def _solve(self, maps: Sequence[LinearMap], even: _Sums, odd: _Sums) -> Fit:
        found = maps[0]
        start = _matrix(found).astype(np.float64)
        if found.bias is not None:
            start = np.concatenate([start, np.zeros((len(start), 1, start.shape[2]))], axis=1)
        total = even + odd
        power = max(float(total.power.sum()), 1e-30)
        before = np.sqrt(total.error(start) / power)
        strength, error = self._strength(start, even, odd, found.bias is not None)
        after = np.sqrt(error / power)
        if strength is None or after >= before:
            return Fit(found.name, before, before, None)
        constants = _constants(maps, _fitted(total, start, strength, found.bias is not None))
        return Fit(found.name, before, after, strength, constants)

    def _strength(self, start: Array, even: _Sums, odd: _Sums, has_bias: bool) -> tuple[float | None, float]:
        """The λ with the least error on the half that it is not fitted to, and that error; of both halves together."""
        halves = [(even, odd), (odd, even)] if odd.power.any() else [(even, even)]
        # Zeros that were put into a weight are to stay.
        weights = start[:, : start.shape[1] - has_bias]
        is_sparse = np.count_nonzero(weights) < (1 - SPARSE) * weights.size
        tried: list[float] = [] if self._bias_only or is_sparse else list(STRENGTHS)
        tried += [np.inf] if has_bias else []
        errors = {
            strength: sum(test.error(_fitted(train, start, strength, has_bias)) for train, test in halves)
            for strength in tried
        }
        if not errors:
            return None, 0.0
        best = min(errors, key=lambda strength: errors[strength])
        return best, errors[best]


def _fitted(sums: _Sums, start: Array, strength: float, has_bias: bool) -> Array:
    """The matrix with the least error and λ‖M' − start‖²; λ does not weigh on the bias, the last row."""
    if np.isinf(strength):
        result = start.copy()
        count = np.maximum(sums.gram[:, -1:, -1:], 1)
        result[:, -1:] += (sums.cross[:, -1:] - sums.gram[:, -1:] @ start) / count
        return result
    size = start.shape[1]
    diagonal = np.einsum("bdd->bd", sums.gram)
    scale = diagonal[:, : size - has_bias].mean(axis=1)
    damping = np.where(scale > 0, strength * scale, 1.0)[:, None] * np.ones(size)
    if has_bias:
        damping[:, -1] = 1e-9 * np.maximum(diagonal[:, -1], 1)
    system = sums.gram + damping[:, :, None] * np.eye(size)
    return np.asarray(np.linalg.solve(system, sums.cross + damping[:, :, None] * start))


def _constants(maps: Sequence[LinearMap], matrix: Array) -> dict[ir.Value, Array]:
    """What a weight and the biases beside it become."""
    found, result = maps[0], {}
    if found.kind == "norm":
        factor = matrix[:, 0, 0]
        result[found.weight] = factor * _tensor(found.weight).numpy()
        if found.bias is not None:
            result[found.bias] = factor * _tensor(found.bias).numpy() + matrix[:, -1, 0]
        return result
    if found.bias is not None:
        offset, matrix = matrix[:, -1].astype(np.float32), matrix[:, :-1]
        for each in maps:
            assert each.bias is not None
            result[each.bias] = each.add_bias(np.asarray(_tensor(each.bias).numpy()), offset)
    result[found.weight] = found.weight_of(matrix, _shape(found.weight))
    return result


class _Judge:
    """Takes fits back that bring a product nearer to what it was, but not the outputs of the model.

    Args:
        module: The module under repair.
        reference: What its outputs were.
        batches: Sets of inputs.
        runner: An open runner.
    """

    def __init__(
        self, module: Module, reference: Module, batches: Sequence[Mapping[str, Array]], runner: ReferenceRunner
    ) -> None:
        count = min(JUDGED, len(batches))
        self._batches = [batches[number * len(batches) // count] for number in range(count)]
        self._module, self._runner = module, runner
        self._wanted = runner.run_all(reference, self._batches)
        self._moved = self._measure()

    def accepted(self, fits: Sequence[Fit]) -> list[Fit]:
        """Apply the fits that bring the outputs nearer: all together, or else one by one."""
        fresh = [fit for fit in fits if fit.constants]
        if fresh and self._improves(fresh):
            return list(fits)
        return [
            fit if not fit.constants or (len(fresh) > 1 and self._improves([fit])) else fit.dropped() for fit in fits
        ]

    def _improves(self, fits: Sequence[Fit]) -> bool:
        changes = [(value, array) for fit in fits for value, array in fit.constants.items()]
        before = [(value, value.const_value) for value, _ in changes]
        for value, array in changes:
            value.const_value = ir.tensor(np.ascontiguousarray(array, dtype=np.float32), name=value.name)
        moved = self._measure()
        if moved < self._moved:
            self._moved = moved
            return True
        for value, tensor in before:
            value.const_value = tensor
        return False

    def _measure(self) -> float:
        return outputs_moved(self._runner.run_all(self._module, self._batches), self._wanted)


def _all_maps(module: Module) -> list[LinearMap]:
    return [*linear_maps(module.graph), *norm_maps(module.graph)]


def _tied(maps: Iterable[LinearMap]) -> dict[ir.Value, list[LinearMap]]:
    found: dict[ir.Value, list[LinearMap]] = {}
    for each in maps:
        found.setdefault(each.weight, []).append(each)
    return found


def _matrix(found: LinearMap) -> Array:
    return found.matrix(np.asarray(_tensor(found.weight).numpy()))


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    tensor = tensor_of(value)
    if tensor is None:
        raise ValueError(f"{value.name!r} is no constant")
    return tensor


def _shape(value: ir.Value) -> tuple[int, ...]:
    return tuple(_tensor(value).shape.numpy())


def _same(one: ir.TensorProtocol, other: ir.TensorProtocol) -> bool:
    if one is other:
        return True
    if one.dtype != other.dtype or tuple(one.shape) != tuple(other.shape):
        return False
    return bool(np.array_equal(one.numpy(), other.numpy()))
