"""Inputs to run a model on when the user gave none: legal, varied, and made from the model's own structure."""

from __future__ import annotations

import itertools
import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from mmopt.analysis.input_facts import input_facts
from mmopt.analysis.input_sizes import REGIMES, Regime, concrete_shapes
from mmopt.analysis.input_values import Request, make_value
from mmopt.analysis.modalities import classify_inputs
from mmopt.errors import BackendError, MmoptError, UserError, did_you_mean
from mmopt.ir.evaluate import Outputs, ReferenceRunner
from mmopt.ir.module import Module

Inputs = dict[str, Any]

_logger = logging.getLogger(__name__)


def probe_inputs(
    module: Module,
    *,
    seeds: Sequence[int] = (0, 1),
    sizes: Mapping[str, int] | None = None,
    runner: ReferenceRunner | None = None,
) -> list[Inputs]:
    """Make one set of inputs a seed.

    Token ids stay within the table they index, masks are ones followed by a few zeros, positions count up, lengths stay
    within the time axis, images are normalised, waveforms lie in [-1, 1]. A symbol has one size in all inputs of a
    set; sets differ in their sizes.

    Args:
        module: The module.
        seeds: One seed a set.
        sizes: Sizes of symbolic dimensions, by name (``input.axis`` for one without a name).
        runner: Tries the inputs, and goes on to other sizes and values until the model runs. Without it the first
            guess is returned untried.

    Returns:
        Sets of arrays by input name (lists of arrays for sequences).

    Raises:
        BackendError: No guess runs; the reason is that of the first.
    """
    if runner is not None:
        return find_probes(module, runner, seeds=seeds, sizes=sizes)[0]
    maker = _Maker(module, sizes)
    return [maker.make(REGIMES[0], number, seed, 0) for number, seed in enumerate(seeds)]


def find_probes(
    module: Module, runner: ReferenceRunner, *, seeds: Sequence[int] = (0, 1), sizes: Mapping[str, int] | None = None
) -> tuple[list[Inputs], list[Outputs]]:
    """Make inputs that ``module`` runs on, as :func:`probe_inputs` does, and return its outputs on them too.

    Raises:
        BackendError: No guess runs; the reason is that of the first.
    """
    maker = _Maker(module, sizes)
    first_error: MmoptError | None = None
    for variant, regime in itertools.product(range(maker.variants), REGIMES if maker.symbolic else REGIMES[:1]):
        try:
            made = [maker.make(regime, number, seed, variant) for number, seed in enumerate(seeds)]
            return made, runner.run_all(module, made)
        except MmoptError as error:
            first_error = first_error or error
    raise BackendError(
        first_error.what if first_error is not None else "no seeds were given",
        where=first_error.where if first_error is not None else "",
        hint="give inputs with --inputs file.npz",
    )


def load_inputs(path: pathlib.Path, module: Module) -> Inputs:
    """Read one set of inputs from an ``.npz`` file keyed by input name.

    Args:
        path: The file. Pickled objects in it are not read.
        module: The module they are for; names, dtypes and shapes are checked against its inputs.

    Raises:
        UserError: The file cannot be read, or an input is missing, unknown, or of the wrong dtype or shape.
    """
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it holds one bare array, not arrays by name")
        with archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"cannot read inputs: {error}", where=str(path), hint="write it with numpy.savez") from error
    return check_inputs(arrays, module, where=str(path))


def check_inputs(arrays: Mapping[str, Any], module: Module, *, where: str = "inputs") -> Inputs:
    """Check ``arrays`` against the inputs of ``module``; text becomes the object arrays that onnxruntime takes.

    Raises:
        UserError: An input is missing, unknown, or of the wrong dtype or shape.
    """
    values = {str(value.name): value for value in module.graph.inputs}
    for name in arrays:
        if name not in values:
            raise UserError(f"the model has no input {name!r}", where=where, hint=did_you_mean(name, values))
    needed = [name for name in values if name not in module.graph.initializers]
    if missing := [name for name in needed if name not in arrays]:
        raise UserError(f"missing inputs: {', '.join(missing)}", where=where, hint=f"needed: {', '.join(needed)}")
    bound: dict[str, tuple[int, str]] = {}
    return {name: _checked(array, values[name], bound, f"{where}, input {name!r}") for name, array in arrays.items()}


def _checked(array: Any, value: ir.Value, bound: dict[str, tuple[int, str]], where: str) -> Any:
    if not isinstance(value.type, ir.TensorType) or value.dtype is None:
        return array
    array = np.asarray(array)
    wanted = value.dtype.numpy()
    if value.dtype == ir.DataType.STRING and array.dtype.kind in "USO":
        array = array.astype(object)
    elif array.dtype != wanted:
        # numpy writes bfloat16 and float8 as raw bytes of the same width.
        if array.dtype.kind != "V" or array.dtype.itemsize != wanted.itemsize:
            raise UserError(f"dtype is {array.dtype}, should be {wanted}", where=where, hint=f"use .astype('{wanted}')")
        array = array.view(wanted)
    if value.shape is None:
        return array
    if array.ndim != len(value.shape):
        raise UserError(f"shape is {list(array.shape)}, should be {value.shape}", where=where, hint="check the rank")
    for axis, (dim, size) in enumerate(zip(value.shape, array.shape, strict=True)):
        _check_size(dim, size, bound, f"{where}, axis {axis}")
    return array


def _check_size(dim: int | ir.SymbolicDim, size: int, bound: dict[str, tuple[int, str]], where: str) -> None:
    if isinstance(dim, int):
        if dim != size:
            raise UserError(f"size is {size}, should be {dim}", where=where, hint="the model fixes this size")
        return
    if dim.value is None:
        return
    other, place = bound.setdefault(dim.value, (size, where))
    if other != size:
        raise UserError(
            f"size {dim.value!r} is {size} here but {other} in {place}", where=where, hint="make them equal"
        )


class _Maker:
    """Makes inputs of one module."""

    def __init__(self, module: Module, sizes: Mapping[str, int] | None) -> None:
        self._module = module
        self._sizes = sizes or {}
        self._facts = input_facts(module)
        self._roles = _roles(module)
        self._values = [value for value in module.graph.inputs if value.name not in module.graph.initializers]
        self.symbolic = any(
            value.shape is None or any(not isinstance(dim, int) for dim in value.shape) for value in self._values
        )
        self.variants = 2 * max([1, *(len(facts.compared) for facts in self._facts.values())])

    def make(self, regime: Regime, number: int, seed: int, variant: int) -> Inputs:
        shapes = concrete_shapes(self._module, regime, number=number, sizes=self._sizes)
        sizes = self._bind(shapes)
        made: Inputs = {}
        for position, value in enumerate(self._values):
            name = str(value.name)
            rng = np.random.default_rng([seed, position])
            dtype = value.dtype or ir.DataType.FLOAT
            request = Request(
                name, dtype, shapes[name], self._facts[name], self._roles.get(name, ""), sizes, number, variant, rng
            )
            made[name] = make_value(request, value.type)
        return made

    def _bind(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """Sizes of the plain symbols in the inputs' shapes; unnamed ones under the names that shape inference uses."""
        return {
            dim.value or f"{value.name}_d{axis}": shapes[str(value.name)][axis]
            for value in self._values
            for axis, dim in enumerate(value.shape or ())
            if not isinstance(dim, int)
        }


def _roles(module: Module) -> dict[str, str]:
    """What each input is. Probes do not hang on it: they are legal without, only less like the real thing."""
    try:
        return {name: found.role for name, found in classify_inputs(module).items()}
    except Exception as error:  # an odd model may trip the classification, but must still be validated
        _logger.warning("inputs could not be classified: %s: %s", type(error).__name__, error)
        return {}
