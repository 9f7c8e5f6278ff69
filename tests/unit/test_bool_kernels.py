"""Booleans in memory are bytes; computed ones are bits. Kernels mix both."""

from __future__ import annotations

import numpy as np
import pytest

from tests.native import compiled


@pytest.mark.parametrize("operator", ["And", "Or", "Xor", "Equal"])
def test_stored_and_computed_booleans_go_together(operator: str) -> None:
    random = np.random.default_rng(0)
    feed = {"x": random.random((3, 4, 5)) > 0.5, "y": random.random((3, 4, 5)) > 0.5}
    feed["q"] = random.integers(0, 3, (3, 4, 5)).astype(np.int8)
    found = compiled(
        f"""<ir_version: 9, opset_import: ["" : 18]>
        g (bool[3,4,5] x, bool[3,4,5] y, int8[3,4,5] q) => (bool[3,4,5] z, float[3,4,5] w) {{
          a = {operator}(x, y)
          two = Constant<value = int8 {{2}}>()
          e = Less(q, two)
          z = And(a, e)
          n = Not(x)
          f = Cast<to=1>(n)
          c = Cast<to=1>(q)
          w = Where(y, f, c)
        }}""",
        feed,
    )
    assert found.kinds == ["native"]
