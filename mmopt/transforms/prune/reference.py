"""What a module was before something was taken from it, for whoever repairs or trains it afterwards."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from mmopt.ir.module import Module

if TYPE_CHECKING:
    from mmopt.transforms.prune.choice import Cut

Array = np.ndarray[Any, Any]

KEY = "mmopt.reference"
"""Key of the :class:`Reference` in the ``meta`` of a model, which clones share and files do not have."""


@dataclasses.dataclass(frozen=True)
class Reference:
    """A module before something was taken from it.

    Attributes:
        module: The module; it shares its weights with others and is not to be changed.
        removed: What was cut since, cut after cut: positions that went, by name of the value and axis.
    """

    module: Module
    removed: tuple[Mapping[str, Mapping[int, frozenset[int]]], ...] = ()

    def take(self, value: str, axis: int, array: Array) -> Array:
        """``array``, which has the size that ``value`` had, with what is left of ``axis``."""
        axis %= array.ndim
        for cut in self.removed:
            gone = cut.get(value, {}).get(axis, frozenset())
            if gone:
                array = np.delete(array, sorted(gone), axis=axis)
        return array


def remember(module: Module, original: Module, cut: Cut | None = None) -> None:
    """Note on ``module`` what it was made from; of several steps, the first one counts."""
    known = reference_of(module) or Reference(original)
    steps = () if cut is None else (cut.tensors,)
    module.model.meta[KEY] = Reference(known.module, (*known.removed, *steps))


def reference_of(module: Module) -> Reference | None:
    """What ``module`` was before something was taken from it; None when nothing was."""
    found = module.model.meta.get(KEY)
    return found if isinstance(found, Reference) else None
