"""From a torch module to a file, through torch.export and the dynamo-based ONNX exporter."""

from __future__ import annotations

import contextlib
import logging
import pathlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from benchmarks.zoo.inputs import Inputs
from mmopt.frontends import torch_recurrent
from mmopt.ir.module import save_model


def write(
    module: torch.nn.Module,
    arrays: Inputs,
    outputs: Sequence[str],
    dynamic_shapes: Mapping[str, Mapping[int, Any]] | None,
    path: pathlib.Path,
) -> None:
    """Export ``module`` to ``path``.

    Args:
        module: The network in evaluation mode.
        arrays: Example inputs by parameter name.
        outputs: Names of the outputs in order.
        dynamic_shapes: Symbolic dimensions by input and axis; None for a static export.
        path: The file; weights above 1 MB go beside it.
    """
    with _quiet(), torch.no_grad(), torch_recurrent.symbolic_length(torch):
        program = torch.onnx.export(
            module,
            (),
            kwargs={name: torch.from_numpy(array) for name, array in arrays.items()},
            input_names=list(arrays),
            output_names=list(outputs),
            dynamic_shapes=dynamic_shapes,
            custom_translation_table=torch_recurrent.translations(torch),
            dynamo=True,
            verbose=False,
        )
    save_model(program.model, path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notes on its own internals off the terminal; errors still come through."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
