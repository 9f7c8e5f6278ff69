"""What a pass is: a frozen dataclass whose fields are its options, a fidelity, and a function on a module."""

from __future__ import annotations

import abc
import dataclasses
import enum
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mmopt.ir.module import Module, Remark

if TYPE_CHECKING:
    from mmopt.evaluation import Evaluation


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
        samples_from: ``given`` when the inputs are the user's, ``random`` when they were made up on request.
        evaluation: The user's evaluator, with the metrics of the original model, when there is one.
        predict: Cycles of one core that the target's kernels are predicted to take for one run of a module; None when
            no target predicts them.
    """

    target: str = ""
    seed: int = 0
    inputs: dict[str, np.ndarray] | None = None
    remarks: list[Remark] = dataclasses.field(default_factory=list)
    samples_from: str = "given"
    evaluation: Evaluation | None = None
    predict: Callable[[Module], float] | None = None


def kebab_case(name: str) -> str:
    """``FuseConvBN`` → ``fuse-conv-bn``."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", name)
    return spaced.replace("_", "-").lower()


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

    def spec(self) -> str:
        """The pass with the options that differ from their defaults, as ``--pass`` takes it."""
        options = [
            f"{field.name}={_option_text(getattr(self, field.name))}"
            for field in dataclasses.fields(self)
            if not _is_default(field, getattr(self, field.name))
        ]
        return f"{self.name}{{{','.join(options)}}}" if options else self.name

    def error_bound(self) -> float | None:
        """Largest error a ``LOSSY`` pass vouches for, as a fraction of each output's range; None when it has no bound.

        The manager holds the pass to it. Other fidelities have their bound from their dtype.
        """
        return None

    def remark(self, context: PassContext, kind: str, node: str, message: str) -> None:
        """Leave a remark: ``kind`` is ``applied``, ``missed`` or ``note``."""
        context.remarks.append(Remark(self.name, kind, node, message))


@dataclasses.dataclass(frozen=True)
class FxPass(Pass):
    """A rewrite of a ``torch.fx.GraphModule``: runs on models that come from torch, before they are exported."""

    @abc.abstractmethod
    def run_fx(self, graph_module: Any) -> Any:
        """Rewrite ``graph_module``, in place or not.

        Args:
            graph_module: The ``torch.fx.GraphModule``.

        Returns:
            The GraphModule to go on with.
        """

    def run(self, module: Module, context: PassContext) -> bool:
        """Leave a remark: the module is already ONNX, so it is too late for this pass."""
        self.remark(context, "missed", "", "an FX pass runs on models from torch, before export; this module is ONNX")
        return False


@dataclasses.dataclass(frozen=True)
class Phase:
    """Passes that belong together.

    Attributes:
        name: Name of the phase, for reports.
        passes: The passes, in order.
        max_rounds: The passes are run again until none of them changes anything, at most so many times.
    """

    name: str
    passes: tuple[Pass, ...]
    max_rounds: int = 1


def _is_default(field: dataclasses.Field[Any], value: object) -> bool:
    if field.default is not dataclasses.MISSING:
        return bool(field.default == value)
    return field.default_factory is not dataclasses.MISSING and bool(field.default_factory() == value)


def _option_text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, enum.Enum):
        return str(value.value)
    if isinstance(value, list | tuple | set | frozenset):
        return f"[{','.join(_option_text(item) for item in value)}]"
    text = str(value)
    return f'"{text}"' if isinstance(value, str) and re.search(r'[,={}\[\]"\s]|^$', text) else text
