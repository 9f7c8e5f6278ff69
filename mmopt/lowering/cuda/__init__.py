"""Lowerings to the kernel templates of NVIDIA GPUs."""

from __future__ import annotations

from mmopt.backends.cpu.kernels.attention import Rules
from mmopt.backends.cpu.kernels.recurrent import Recurrence
from mmopt.backends.cuda.kernels.recurrence import CudaRecurrence
from mmopt.backends.cuda.threads import WARP
from mmopt.backends.profile import Profile
from mmopt.lowering.cuda.attention import tensor_attention
from mmopt.lowering.cuda.convolutions import tensor_convolution
from mmopt.lowering.cuda.products import tensor_product
from mmopt.lowering.ops.conv import Geometry, generic_convolution
from mmopt.lowering.ops.conv_narrow import known_widened
from mmopt.lowering.ops.matmul import plain_product
from mmopt.lowering.registry import OpNode
from mmopt.lowering.values import NotLowered, Value


class CudaTemplates:
    """See :class:`mmopt.lowering.targets.Templates`."""

    recurrence: type[Recurrence] = CudaRecurrence
    lanes: int = WARP

    def __init__(self, profile: Profile) -> None:
        self.profile = profile

    def product(self, node: OpNode, a: Value, b: Value) -> Value:
        """``a @ b``: on tensor cores where they have the type, else by ordinary threads."""
        return tensor_product(node, a, b) or plain_product(node, a, b)

    def convolution(self, node: OpNode, x: Value, w: Value, bias: Value | None, groups: int, shape: Geometry) -> Value:
        """A convolution: on tensor cores where they have the type and the filters are known, else by threads."""
        made = tensor_convolution(node, x, w, bias, groups, shape)
        return made or generic_convolution(node, x, known_widened(w), bias, groups, shape)

    def attention(
        self,
        node: OpNode,
        operands: tuple[Value, Value, Value],
        mask: Value | None,
        lengths: Value | None,
        rules: Rules,
        order: str,
    ) -> Value:
        """Attention by one kernel on tensor cores.

        Raises:
            NotLowered: They do not have the type, or the operator asks for more than the template has.
        """
        if lengths is not None:
            raise NotLowered("lengths of sequences have no attention template")
        return tensor_attention(node, operands, mask, rules, order)
