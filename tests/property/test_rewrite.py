"""Random small graphs through the rewrites: same answers, valid models, nothing left to do."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mmopt.transforms.portable as portable
import mmopt.transforms.rewrite as family
from mmopt.ir.verify import verify
from mmopt.pipeline.base import Fidelity, Pass, PassContext
from mmopt.transforms.canonicalize import Canonicalize
from tests.canonical import evaluate, inputs_for
from tests.property.test_canonicalize import draw_module

PASSES: list[Pass] = [
    *(getattr(family, name)() for name in family.__all__),
    *(getattr(portable, name)() for name in portable.__all__),
]


@pytest.mark.parametrize("canonical", [False, True])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data())
def test_rewrites_keep_the_answers(canonical: bool, data: st.DataObject) -> None:
    module = draw_module(data, 14)
    feeds = inputs_for(module)
    if canonical:
        Canonicalize().run(module, PassContext())
    for pass_ in PASSES:
        want, signature = evaluate(module, feeds), module.signature()
        pass_.run(module, PassContext())
        assert module.signature() == signature
        assert [problem for problem in verify(module) if problem.severity == "error"] == []
        for name, got in evaluate(module, feeds).items():
            if pass_.fidelity is Fidelity.EXACT or got.dtype.kind != "f":
                np.testing.assert_array_equal(got, want[name], err_msg=f"{pass_.name}: {name}")
            else:
                np.testing.assert_allclose(got, want[name], rtol=1e-4, atol=1e-5, err_msg=f"{pass_.name}: {name}")
        assert pass_.run(module, PassContext()) is False, pass_.name
