"""What a pass is: a frozen dataclass whose fields are its options, a fidelity, and a function on a module."""

from __future__ import annotations

import abc
import dataclasses
import enum
import re
from typing import ClassVar

import numpy as np

from mmopt.ir.module import Module, Remark


class Fidelity(enum.Enum):
    """How far a pass may move the outputs; the validation tolerance follows from it.

    ``EXACT`` keeps every bit up to the order of commutative reductions the runtime itself chooses, ``ROUNDING`` may
    reassociate floating-point arithmetic, ``LOSSY`` changes values on purpose and is judged by its own contract.
    """

    EXACT = "exact"
    ROUNDING = "rounding"
    LOSSY = "lossy"


@dataclasses.dataclass
class PassContext:
    """What a running pass may use.

    Attributes:
        target: Name of the target profile the module is optimized for ("" when none).
        seed: Seed for anything random.
        inputs: Sample inputs by name, each with a leading axis of samples, when the user gave some.
        remarks: Where the pass leaves remarks; the manager moves them to the module (kept even on rollback).
    """

    target: str = ""
    seed: int = 0
    inputs: dict[str, np.ndarray] | None = None
    remarks: list[Remark] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Pass(abc.ABC):
    """A rewrite of a :class:`~mmopt.ir.module.Module` in place.

    Subclasses are frozen dataclasses: their fields are their options, on the command line as
    ``--pass 'my-pass{threshold=0.5}'``. The name is the class name in kebab case unless ``name`` is set.
    """

    name: ClassVar[str] = ""
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = kebab_case(cls.__name__)

    @abc.abstractmethod
    def run(self, module: Module, context: PassContext) -> bool:
        """Rewrite ``module`` in place.

        Returns:
            Whether anything changed. The manager compares the claim with a structural hash.
        """

    def remark(self, context: PassContext, kind: str, node: str, message: str) -> None:
        """Leave a remark: ``kind`` is ``applied``, ``missed`` or ``note``."""
        context.remarks.append(Remark(self.name, kind, node, message))


def kebab_case(name: str) -> str:
    """``FuseConvBN`` → ``fuse-conv-bn``."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", name)
    return spaced.replace("_", "-").lower()
