"""What ``--quant`` and ``--recover`` stand for."""

from __future__ import annotations

import math

from mmopt.errors import UserError, did_you_mean
from mmopt.transforms.quantize import Quantize, QuantizeStatic

PRESETS = ("full", "hierarchical", "mixed")


def quantization(quant: str | None, precision: str | None = None, *, recover: bool = False) -> list[str]:
    """The passes that the options stand for, as ``--pass`` takes them.

    Args:
        quant: A preset, with a budget or without; ``None`` when not given.
        precision: The number format.
        recover: Whether what quantization loses is reconstructed.

    Raises:
        UserError: An unknown preset, a budget that is none, or nothing to recover.
    """
    if quant is None:
        if recover and precision != "int8":
            raise UserError("nothing is quantized", where="--recover", hint="add --quant or --precision int8")
        # Where weights and what they multiply are integers, choosing the integers of weights is all there is to do.
        return [f"{QuantizeStatic.name}{{rounding=adaround,balance=true}}"] if recover else []
    options = [*_options(quant), *(["rounding=adaround", "recover=true"] if recover else [])]
    return [f"{Quantize.name}{{{','.join(options)}}}"]


def _options(quant: str) -> list[str]:
    preset, given, budget = quant.partition("=")
    if preset not in PRESETS:
        raise UserError(f"there is no preset {preset!r}", where="--quant", hint=did_you_mean(preset, PRESETS))
    if not given:
        return [f"preset={preset}"]
    if quant == "mixed=metrics":
        return ["preset=mixed", "by_metrics=true"]
    try:
        share = float(budget.removesuffix("bits")) / (32 if budget.endswith("bits") else 1)
    except ValueError:
        share = math.nan
    if preset != "mixed" or not 0 < share <= 1:
        hint = "for example --quant mixed=0.2, mixed=5bits or mixed=metrics"
        raise UserError(f"{quant!r} gives no budget", where="--quant", hint=hint)
    return ["preset=mixed", f"budget={share:g}"]
