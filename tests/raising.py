"""One check that does everything a raising pass owes: truth about changes, a valid module, equal values, a fixpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmopt.ir.fingerprint import fingerprint
from mmopt.ir.module import Module
from mmopt.ir.verify import verify
from mmopt.pipeline.base import Pass, PassContext
from mmopt.transforms.canonicalize import Canonicalize
from tests.canonical import evaluate

SIZES = {"batch": 2, "seq": 5}


def close(want: Mapping[str, Any], got: Mapping[str, Any]) -> None:
    """Equal up to rounding."""
    assert list(want) == list(got)
    for name, expected in want.items():
        assert got[name].dtype == expected.dtype, name
        scale = float(np.abs(expected[np.isfinite(expected)]).max(initial=0.0))
        np.testing.assert_allclose(got[name], expected, rtol=1e-4, atol=2e-6 * max(scale, 1.0), err_msg=name)


def normal_inputs(module: Module, seed: int = 0) -> dict[str, Any]:
    """Seeded normal floats; small whole numbers elsewhere."""
    random, feeds = np.random.default_rng(seed), {}
    for value in module.graph.inputs:
        shape = [dim if isinstance(dim, int) else SIZES[str(dim)] for dim in value.shape or ()]
        dtype = value.dtype.numpy() if value.dtype is not None else np.dtype(np.float32)
        array = random.standard_normal(shape) * 2 if dtype.kind == "f" else random.integers(0, 2, shape)
        feeds[str(value.name)] = np.asarray(array).astype(dtype)
    return feeds


def raise_and_check(
    pass_: Pass, module: Module, feeds: Mapping[str, Any] | None = None
) -> tuple[Module, list[tuple[str, str]]]:
    """``module`` in canonical form and raised by ``pass_``, and the misses it reports as ``(node, reason)``."""
    feeds = normal_inputs(module) if feeds is None else feeds
    want = evaluate(module, feeds)
    Canonicalize().run(module, PassContext())
    signature, before = module.signature(), fingerprint(module.model)
    context = PassContext()
    changed = pass_.run(module, context)
    assert changed is (fingerprint(module.model) != before)
    assert module.signature() == signature
    assert [problem for problem in verify(module) if problem.severity == "error"] == []
    close(want, evaluate(module, feeds))
    settled = fingerprint(module.model)
    assert pass_.run(module, PassContext()) is False
    assert fingerprint(module.model) == settled
    return module, [(remark.node, remark.message) for remark in context.remarks if remark.kind == "missed"]
