"""One model through the whole of mmopt, and what became of it."""

from __future__ import annotations

import contextlib
import pathlib
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import onnx

from mmopt.errors import BackendError, LoadError, UnsupportedError, UserError, VerifyError
from tests.compat.cases import Case

NATIVE, PARTLY, FALLBACK = "native", "partly", "fallback"
REFUSED, WRONG, ERROR, CRASHED = "refused", "wrong", "error", "crashed"
STATUSES = (NATIVE, PARTLY, FALLBACK, REFUSED, WRONG, ERROR, CRASHED)
"""``native``: no onnxruntime; ``partly``: some nodes in it; ``fallback``: all of them; ``refused``: an error that names
the reason; ``wrong``: other outputs than expected; ``error``: an internal error; ``crashed``: no process left."""

RIGHT = (NATIVE, PARTLY, FALLBACK)


def judge(case: Case) -> dict[str, Any]:
    """Run ``case``; the record that goes to the results."""
    started = time.perf_counter()
    record: dict[str, Any] = {"name": case.name, "family": case.family, "operators": case.operators}
    try:
        status, notes, wrong = _through_mmopt(case)
        record.update(status=WRONG if wrong else status, engines=status, notes=notes, reason=wrong, verified=True)
    except (UnsupportedError, LoadError, UserError) as error:
        record.update(status=REFUSED, reason=str(error))
    except VerifyError as error:
        record.update(_despite(case, error))
    except Exception as error:
        trace = "" if isinstance(error, BackendError) else traceback.format_exc()
        record.update(status=ERROR, reason=f"{type(error).__name__}: {error}"[:2000], trace=trace[-3000:])
    if record["status"] not in RIGHT:
        record["onnxruntime"] = onnxruntime_says(case)
        if (
            record["status"] == ERROR
            and record["onnxruntime"] != "right"
            and "could not run the model" in record["reason"]
        ):
            record["status"] = REFUSED  # there is nothing to verify the artifact against
        if record["onnxruntime"] == "misses" and record.get("verified"):
            record.update(status=record["engines"], differs="onnxruntime gives what mmopt gives, not what is expected")
    record["seconds"] = round(time.perf_counter() - started, 3)
    return record


def _despite(case: Case, error: VerifyError) -> dict[str, Any]:
    """Where mmopt refuses to write because onnxruntime disagrees: who is right by the suite?"""
    try:
        status, notes, wrong = _through_mmopt(case, allow_mismatch=True)
    except Exception:  # the first error says it better
        return {"status": WRONG, "reason": str(error)}
    if wrong:
        return {"status": WRONG, "engines": status, "notes": notes, "reason": f"{error}; {wrong}"}
    differs = f"right, while onnxruntime is not; mmopt writes it only with --allow-mismatch: {error.what}"
    return {"status": status, "engines": status, "notes": notes, "reason": "", "differs": differs}


def _through_mmopt(case: Case, allow_mismatch: bool = False) -> tuple[str, list[str], str]:
    """Which engines ran the model, the compiler's notes, and what is wrong with the outputs ("" for nothing)."""
    with _outputs(case, allow_mismatch) as (built, results):
        kinds = {segment.kind for segment in built.manifest.entries["main"].segments}
        status = NATIVE if kinds <= {"native"} else FALLBACK if kinds == {"onnxruntime"} else PARTLY
        problems = [
            _compare(case, expected, outputs) for (_, expected), outputs in zip(case.content[1], results, strict=True)
        ]
    return status, list(built.manifest.notes), next(filter(None, problems), "")


@contextlib.contextmanager
def _outputs(case: Case, allow_mismatch: bool) -> Any:
    import mmopt

    model, sets = case.content
    with tempfile.TemporaryDirectory(prefix="compat-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = pathlib.Path(folder, "model.onnx")
        path.write_bytes(model.SerializeToString())
        feeds = [_feed(model, given) for given, _ in sets]
        original = mmopt.load(path)
        optimized = mmopt.optimize(original, level=2, inputs=feeds)
        built = mmopt.compile(
            optimized.module,
            output=pathlib.Path(folder, "a.mmopt"),
            reference=original,
            inputs=feeds,
            allow_mismatch=allow_mismatch,
        )
        with mmopt.load_artifact(built.path, threads=1) as session:
            names = [v.name for v in model.graph.output]
            results = []
            for feed in feeds:
                made = session.run(feed)
                results.append([made[name] for name in names])
        yield built, results


def _feed(model: onnx.ModelProto, given: Sequence[Any]) -> dict[str, Any]:
    """Inputs by name. A set with fewer arrays than inputs leaves out those that have a default."""
    inputs = list(model.graph.input)
    if len(given) < len(inputs):
        defaults = {tensor.name for tensor in model.graph.initializer}
        inputs = [v for v in inputs if v.name not in defaults]
    feed = {}
    for value, array in zip(inputs, given, strict=False):
        optional = value.type.WhichOneof("value") == "optional_type"
        if array is not None or optional:
            feed[value.name] = array
    return feed


def _compare(case: Case, expected: Sequence[Any], outputs: Sequence[Any]) -> str:
    """What is wrong, by the suite's own comparison.

    It allows two units in the last place of bfloat16; the same is allowed for float16, whose unit alone is as much as
    the usual tolerance: ``-O2`` may round in other places.
    """
    from onnx.backend.test.runner import Runner

    try:
        if case.random:
            for want, got in zip(expected, outputs, strict=True):
                np.testing.assert_equal((got.shape, got.dtype), (want.shape, want.dtype))
        else:
            wanted, got = _flat(expected), _flat(outputs)
            np.testing.assert_equal([len(v) for v in got], [len(v) for v in wanted])
            for want, have in zip(chain(*wanted), chain(*got), strict=True):
                half = want.dtype == np.float16
                rtol = max(case.rtol, 2 * float(np.finfo(np.float16).eps)) if half else case.rtol
                Runner.assert_similar_outputs([want], [have], rtol, case.atol)
    except (AssertionError, TypeError, ValueError) as error:
        return " ".join(str(error).split())[:1000] or type(error).__name__
    return ""


def _flat(values: Sequence[Any]) -> list[list[Any]]:
    """The tensors in each value: one, those of a sequence, none for an absent optional."""
    return [
        [_plain(item) for item in v] if isinstance(v, list | tuple) else [] if v is None else [_plain(v)]
        for v in values
    ]


def _plain(value: Any) -> Any:
    """An array of a dtype whose comparison numpy knows."""
    array = np.asarray(value)
    if array.dtype.kind in "US":
        return array.astype(object)
    own = array.dtype.isbuiltin == 1 or array.dtype.kind == "O" or array.dtype.name == "bfloat16"
    return array if own else array.astype(np.float32)


# -- onnxruntime alone -------------------------------------------------------------------------------------------------


def onnxruntime_says(case: Case) -> str:
    """Whether onnxruntime gives the expected outputs of the original model: ``right``, ``misses`` or ``cannot``."""
    outputs = _onnxruntime(case)
    if outputs is None:
        return "cannot"
    wrong = [_compare(case, expected, got) for (_, expected), got in zip(case.content[1], outputs, strict=True)]
    return "misses" if any(wrong) else "right"


def _onnxruntime(case: Case) -> list[list[Any]] | None:
    import onnx_ir as ir

    from mmopt.ir.evaluate import ONNXRUNTIME, ReferenceRunner
    from mmopt.ir.module import Module

    model, sets = case.content
    try:
        with ReferenceRunner(threads=1) as runner:
            made = runner.run_all(Module(ir.from_proto(model)), [_feed(model, given) for given, _ in sets])
    except Exception:  # whatever it raises, it cannot run the model
        return None
    if any(outputs.engine != ONNXRUNTIME for outputs in made):
        return None
    return [[outputs[v.name] for v in model.graph.output] for outputs in made]
