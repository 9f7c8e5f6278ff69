"""Seeded weights that behave like trained ones: no bias is zero, no norm is the identity, no activation explodes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from benchmarks.zoo.inputs import Inputs

SEED = 20_240


def seeded(network: Callable[[], nn.Module], *, trained: bool, inputs: Inputs) -> nn.Module:
    """Make a network whose weights are the same on every call.

    Fresh biases are zero and fresh norms do nothing, so an optimizer could remove what it never could in a trained
    model. Vectors are therefore moved by a little noise, and batch norms take their statistics from ``inputs``.

    Args:
        network: Makes the module.
        trained: Leave the weights as they are.
        inputs: A realistic batch by input name.

    Returns:
        The module in evaluation mode, without gradients.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(SEED)
        module = network().eval().requires_grad_(False)
        if not trained:
            for parameter in module.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.05)
            _measure_batch_norms(module, inputs)
    return module


def _measure_batch_norms(module: nn.Module, inputs: Inputs) -> None:
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    module(**{name: torch.from_numpy(array) for name, array in inputs.items()})
    for norm in norms:
        norm.eval()
        norm.momentum = 0.1
