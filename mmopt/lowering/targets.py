"""What a kind of target supplies: how kernels are emitted, its templates, how a library is made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import tvm

from mmopt.backends.cpu.emit import KernelEmitter
from mmopt.backends.linking import Library
from mmopt.backends.profile import Profile

if TYPE_CHECKING:
    from mmopt.backends.cpu.kernels.attention import Rules
    from mmopt.backends.cpu.kernels.recurrent import Recurrence
    from mmopt.lowering.ops.conv import Geometry
    from mmopt.lowering.registry import OpNode
    from mmopt.lowering.values import Value

LibraryBuilder = Callable[[tvm.IRModule, Profile, Sequence[str]], Library]
"""Makes the shared library of a module and the kernels with the names given."""


class Templates(Protocol):
    """Kernels for the operators that take most of the time. All other lowerings are the same for every target.

    Attributes:
        recurrence: The template of LSTM, GRU and RNN.
        lanes: Hidden units that it takes together.
    """

    recurrence: type[Recurrence]
    lanes: int

    def product(self, node: OpNode, a: Value, b: Value) -> Value:
        """``a @ b`` of two operands of at least two axes each."""

    def convolution(self, node: OpNode, x: Value, w: Value, bias: Value | None, groups: int, shape: Geometry) -> Value:
        """Convolution of ``[N, C, *space]`` by ``[O, C/groups, *kernel]``."""

    def attention(
        self,
        node: OpNode,
        operands: tuple[Value, Value, Value],
        mask: Value | None,
        lengths: Value | None,
        rules: Rules,
        order: str,
    ) -> Value:
        """Attention of queries, keys and values ``[batch, heads, sequence, size]``.

        The result has the axes that ``order`` names: ``bhsd``, ``bshd``, or ``bsm`` with heads and sizes in one.

        Raises:
            NotLowered: The standard's definition has to do.
        """


def emitter_for(profile: Profile) -> type[KernelEmitter]:
    """What turns a group of lazy tensors into a kernel."""
    if profile.kind != "cuda":
        return KernelEmitter
    from mmopt.backends.cuda.emit import CudaEmitter

    return CudaEmitter


def templates_for(profile: Profile) -> Templates | None:
    """The target's templates; None for those of the CPU, which the lowerings know themselves."""
    if profile.kind != "cuda":
        return None
    from mmopt.lowering.cuda import CudaTemplates

    return CudaTemplates(profile)


def library_builder(profile: Profile) -> LibraryBuilder:
    """What makes a library of kernels."""
    if profile.kind == "cuda":
        from mmopt.backends.cuda.pipeline import build_library as build_cuda

        return build_cuda
    from mmopt.backends.cpu.pipeline import build_library

    return build_library
