"""If, Loop and Scan, against onnxruntime."""

from __future__ import annotations

import pathlib

import numpy as np
import onnx
import pytest

from mmopt.errors import BackendError
from tests.native import compiled

MODELS = pathlib.Path(__file__).resolve().parents[3] / "shared" / "models"
HEAD = '<ir_version: 9, opset_import: ["" : 18]>'
RANDOM = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def test_if_with_captured_values_and_branches_of_different_extents() -> None:
    model = f"""{HEAD}
    g (float[N,4] x, bool c) => (float[M,4] y) {{
      e = Exp(x)
      y = If (c) <then_branch = a () => (float[N,4] p) {{ p = Add(e, x) }},
                  else_branch = b () => (float[K,4] q) {{ q = Concat<axis=0>(x, e, x) }}>
    }}"""
    x = floats(3, 4)
    found = compiled(model, {"x": x, "c": np.array(True)}, {"x": x, "c": np.array(False)})
    assert found.kinds == ["native"]
    assert [o["y"].shape for o in found.outputs] == [(3, 4), (9, 4)]


def test_if_in_an_if_and_weights_of_a_branch() -> None:
    model = f"""{HEAD}
    g (float[N,3] x, bool c, bool d) => (float[N,3] y) {{
      y = If (c) <then_branch = a () => (float[N,3] p) {{
            w = Constant<value = float[3] {{1.0, 2.0, 3.0}}>()
            p = If (d) <then_branch = aa () => (float[N,3] pp) {{ pp = Mul(x, w) }},
                        else_branch = ab () => (float[N,3] pq) {{ pq = Sub(x, w) }}>
          }},
          else_branch = b () => (float[N,3] q) {{ q = Neg(x) }}>
    }}"""
    x = floats(2, 3)
    feeds = [{"x": x, "c": np.array(c), "d": np.array(d)} for c in (True, False) for d in (True, False)]
    assert compiled(model, *feeds).kinds == ["native"]


def test_branches_of_different_ranks_take_what_follows_with_them() -> None:
    model = f"""{HEAD}
    g (float[N,4] x, bool c) => (float[M] y) {{
      i = Constant<value = int64[1] {{0}}>()
      m = Constant<value = int64[1] {{-1}}>()
      s = If (c) <then_branch = a () => (p) {{ p = ReduceSum<keepdims=0>(x, i) }},
                  else_branch = b () => (q) {{ q = Exp(x) }}>
      t = Tanh(s)
      y = Reshape(t, m)
    }}"""
    x = floats(3, 4)
    found = compiled(model, {"x": x, "c": np.array(True)}, {"x": x, "c": np.array(False)})
    assert found.kinds == ["native"]
    assert [o["y"].shape for o in found.outputs] == [(4,), (12,)]


def test_a_branch_that_leads_to_an_illegal_node_is_an_error_at_run_time() -> None:
    model = f"""{HEAD}
    g (float[T,B,4] x) => (float[A,1,B,4] y) {{
      t = Shape<start=0, end=1>(x)
      one = Constant<value = int64[1] {{1}}>()
      zero = Constant<value = int64[1] {{0}}>()
      w = Constant<value = float[1,16,4] {{{", ".join(["0.1"] * 64)}}}>()
      c = Equal(t, one)
      s = If (c) <then_branch = a () => (p) {{ p = Squeeze(x, zero) }}, else_branch = b () => (q) {{ q = Exp(x) }}>
      u = Unsqueeze(s, zero)
      y = LSTM<hidden_size = 4>(u, w, w)
    }}"""
    found = compiled(model, {"x": floats(1, 3, 4)})
    assert found.kinds == ["native"]
    with pytest.raises(BackendError):
        compiled(model, {"x": floats(2, 3, 4)})


LOOP = f"""{HEAD}
g (int64 n, float[K] x) => (float[K] y, float[T,K] z) {{
  c = Constant<value = bool {{1}}>()
  y, z = Loop (n, c, x) <body = a (int64 i, bool ci, float[K] v) => (bool co, float[K] w, float[K] s) {{
    co = Identity(ci)
    f = Cast<to=1>(i)
    w = Add(v, f)
    s = Mul(w, x)
  }}>
}}"""


def test_loop_with_a_number_of_trips_known_at_run_time() -> None:
    feeds = [{"n": np.array(n), "x": floats(3)} for n in (1, 2, 3, 4, 5, 100)]
    found = compiled(LOOP, *feeds)
    assert found.kinds == ["native"]
    assert [o["z"].shape for o in found.outputs] == [(n, 3) for n in (1, 2, 3, 4, 5, 100)]


@pytest.mark.parametrize("trips", [0, -2])
def test_loop_without_a_trip(trips: int) -> None:
    model = LOOP.replace("float[K]", "float[3]").replace("float[T,K]", "float[T,3]")
    x = floats(3)
    found = compiled(model, {"n": np.array(trips), "x": x})
    assert found.outputs[0]["z"].shape == (0, 3)
    np.testing.assert_array_equal(found.outputs[0]["y"], x)


def test_hundred_thousand_trips_need_no_deep_stack() -> None:
    found = compiled(LOOP.replace("float[K]", "float[1]"), {"n": np.array(100_000), "x": np.ones(1, np.float32)})
    assert found.kinds == ["native"]


def test_loop_until_a_condition_with_a_carried_value_that_grows() -> None:
    model = onnx.parser.parse_model(f"""{HEAD}
    g (float limit, float[K] x) => (float[L] y, float[T] z) {{
      c = Constant<value = bool {{1}}>()
      y, z = Loop ("", c, x) <body = a (int64 i, bool ci, float[Q] v) => (bool co, float[R] w, float s) {{
        w = Concat<axis=0>(v, x)
        s = ReduceSum<keepdims=0>(w)
        t = Cast<to=1>(i)
        co = Less(t, limit)
      }}>
    }}""")
    model.graph.node[1].input[0] = ""
    feeds = [{"limit": np.array(n, np.float32), "x": floats(3)} for n in (0, 1, 6)]
    found = compiled(model, *feeds)
    assert found.kinds == ["native"]
    assert [o["y"].shape for o in found.outputs] == [(6,), (9,), (24,)]


def test_a_first_condition_that_fails_makes_no_trip() -> None:
    model = f"""{HEAD}
    g (int64 n, bool c, float[3] x) => (float[3] y) {{
      y = Loop (n, c, x) <body = a (int64 i, bool ci, float[3] v) => (bool co, float[3] w) {{
        co = Identity(ci)
        w = Add(v, v)
      }}>
    }}"""
    feeds = [{"n": np.array(4), "c": np.array(c), "x": floats(3)} for c in (True, False)]
    assert compiled(model, *feeds).kinds == ["native"]


def test_few_trips_are_unrolled() -> None:
    model = LOOP.replace("int64 n, ", "").replace(
        "c = Constant", "n = Constant<value = int64 {4}>()\n  c = Constant", 1
    )
    found = compiled(model, {"x": floats(5)})
    assert found.kinds == ["native"]
    assert found.outputs[0]["z"].shape == (4, 5)


def test_scan_backwards_along_other_axes() -> None:
    model = f"""{HEAD}
    g (float[K] x, float[K,T] s) => (float[K] y, float[K,T] z) {{
      y, z = Scan <num_scan_inputs = 1, scan_input_axes = [1], scan_input_directions = [1], scan_output_axes = [1],
                   scan_output_directions = [1],
                   body = a (float[K] v, float[K] e) => (float[K] w, float[K] o) {{
                     w = Add(v, e)
                     o = Mul(w, e)
                   }}> (x, s)
    }}"""
    found = compiled(model, {"x": floats(3), "s": floats(3, 17)}, {"x": floats(2), "s": floats(2, 1)})
    assert found.kinds == ["native"]


def test_a_carried_sequence_stays_in_onnxruntime() -> None:
    model = f"""{HEAD}
    g (int64 n, float[3] x) => (float[L] y) {{
      c = Constant<value = bool {{1}}>()
      e = SequenceConstruct(x)
      q = Loop (n, c, e) <body = a (int64 i, bool ci, seq(float[3]) v) => (bool co, seq(float[3]) w) {{
        co = Identity(ci)
        w = SequenceInsert(v, x)
      }}>
      y = ConcatFromSequence<axis=0>(q)
    }}"""
    found = compiled(model, {"n": np.array(3), "x": floats(3)})
    assert found.kinds == ["onnxruntime"]
    assert any("Loop" in note for note in found.notes)


@pytest.mark.parametrize(("name", "sizes"), [("silero_vad_op18_ifless", [576]), ("silero_vad", [576, 288])])
@pytest.mark.slow
def test_voice_activity_detector_is_native(name: str, sizes: list[int]) -> None:
    path = MODELS / f"{name}.onnx"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    feeds = [
        {"input": floats(n, size), "state": floats(2, n, 128), "sr": np.array(16000 if size == 576 else 8000)}
        for size in sizes
        for n in (1, 3)
    ]
    assert compiled(path, *feeds).kinds == ["native"]
