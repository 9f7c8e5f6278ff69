"""Where a pass gets its statistics from."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable

from mmopt.analysis.calibration import MADE_UP, RANDOM, Calibration, collect, load
from mmopt.errors import UserError
from mmopt.ir.module import Module, Remark
from mmopt.pipeline.base import Pass, PassContext


def calibration_of(
    pass_: Pass, stats: str, module: Module, context: PassContext, *, gram: Iterable[str] = ()
) -> Calibration:
    """Statistics from a file, or from the samples of the run, with Gram matrices of the tensors in ``gram``.

    Raises:
        UserError: There is nothing to calibrate on.
    """
    if stats:
        loaded = load(pathlib.Path(stats))
        if loaded.source == RANDOM:
            context.remarks.append(Remark("calibration", "note", "", MADE_UP))
        return loaded
    if context.inputs is None:
        raise UserError(
            "there is nothing to calibrate on",
            where=pass_.name,
            hint="give samples with --calib, or statistics of mmopt calibrate as the option stats",
        )
    return collect(module, context.inputs, gram=gram, source=context.samples_from)
