"""Kernels joined into runs: lifetimes in the workspace, views, weights, unknown sizes, and the clock."""

from __future__ import annotations

import concurrent.futures
import itertools
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from mmopt.backends.cpu.arena import ALIGNMENT, Block, aligned, arrange, share
from mmopt.errors import UserError
from mmopt.ir.module import Module
from mmopt.lowering.compiler import compile_module
from mmopt.runtime import load_artifact
from mmopt.runtime.profiling import time_kernels
from mmopt.runtime.writer import write_artifact
from tests.kernels import WIDEST, profiles
from tests.programs import Example, check, model_of


@st.composite
def blocks(draw: st.DrawFn) -> list[Block]:
    made = []
    for _ in range(draw(st.integers(0, 12))):
        first = draw(st.integers(0, 9))
        made.append(Block(draw(st.integers(0, 500)), first, first + draw(st.integers(0, 5))))
    return made


@given(blocks())
def test_blocks_needed_together_do_not_overlap(given: list[Block]) -> None:
    offsets, total = arrange(given)
    assert all(offset % ALIGNMENT == 0 for offset in offsets)
    ends = [offset + block.size for offset, block in zip(offsets, given, strict=True)]
    assert max(ends, default=0) <= total <= sum(aligned(block.size) for block in given)
    for (a, x), (b, y) in itertools.combinations(enumerate(given), 2):
        if x.meets(y) and x.size and y.size:
            assert ends[a] <= offsets[b] or ends[b] <= offsets[a]


@given(blocks())
def test_blocks_of_one_size_share_places_when_they_do_not_meet(given: list[Block]) -> None:
    places = share(given)
    for (a, x), (b, y) in itertools.combinations(enumerate(given), 2):
        assert not x.meets(y) or places[a] != places[b]
    most = max((sum(b.first <= step <= b.last for b in given) for step in range(16)), default=0)
    assert len(set(places)) == most


def test_a_chain_needs_no_more_memory_than_two_of_its_results() -> None:
    chain = [Block(100, step, step + 1) for step in range(10)]
    assert arrange(chain)[1] == 2 * aligned(100)


RANDOM = np.random.default_rng(0)


def data(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def node(op: str, inputs: str, outputs: str, **attributes: object) -> object:
    return helper.make_node(op, inputs.split(), outputs.split(), **attributes)


def example(name: str, symbolic: bool = False) -> Example:
    """Products of one input that meet again; views used inside and handed out; a result that is used twice."""
    x = data(4, 8)
    weights = {"w": data(8, 8), "v": data(8, 8), "flat": np.array([-1], np.int64), "rows": np.array([-1, 8], np.int64)}
    nodes = [
        node("MatMul", "x w", "a"),
        node("MatMul", "a v", "b"),
        node("Reshape", "b flat", "c"),
        node("Softmax", "c", "d", axis=0),
        node("Reshape", "d rows", "e"),
        node("MatMul", "e w", "f"),
        node("Add", "f a", "g"),
        node("TopK", "g k", "top at", axis=1),
    ]
    weights["k"] = np.array([3], np.int64)
    shapes = {"x": ["n", 8]} if symbolic else None
    return Example(name, model_of(nodes, {"x": x}, ["g", "c", "e", "top", "at"], weights, symbolic=shapes), {"x": x})


def test_runs_give_what_single_kernels_give() -> None:
    check([example("known sizes"), example("unknown sizes", symbolic=True)], WIDEST)


def test_sizes_that_are_data_end_a_run() -> None:
    x = np.array([[0.0, 2.0, 0.0], [1.0, 0.0, 3.0]], np.float32)
    weights = {"w": data(2, 5)}
    nodes = [
        node("Relu", "x", "a"),
        node("NonZero", "a", "b"),
        node("Cast", "b", "c", to=1),
        node("Transpose", "c", "d"),
    ]
    nodes.append(node("MatMul", "d w", "y"))
    check([Example("nonzero", model_of(nodes, {"x": x}, ["y", "a"], weights), {"x": x})], WIDEST)


def deep(layers: int = 12) -> tuple[Example, int]:
    """A stack of products, and the bytes of all their results."""
    x = data(64, 64)
    weights = {f"w{n}": data(64, 64) / 8 for n in range(layers)}
    nodes = [node("MatMul", f"{'x' if not n else f'h{n - 1}'} w{n}", f"h{n}") for n in range(layers)]
    return Example("deep", model_of(nodes, {"x": x}, [f"h{layers - 1}"], weights), {"x": x}), layers * x.nbytes


def artifact(folder: pathlib.Path, example: Example) -> pathlib.Path:
    import onnx_ir as ir

    program = compile_module(Module(ir.from_proto(example.model)), profiles()[WIDEST])
    with write_artifact(folder / "a.mmopt") as writer:
        writer.add_program(program)
        writer.commit()
    return folder / "a.mmopt"


def test_memory_is_used_again_and_kernels_are_timed(tmp_path: pathlib.Path) -> None:
    example, everything = deep()
    with load_artifact(artifact(tmp_path, example), threads=1) as session:
        (segment,) = session.manifest.entries["main"].segments
        assert 0 < segment.workspace <= everything // 4
        times = time_kernels(session, example.feeds, runs=4)
        assert sum(kernel.calls for kernel in times.kernels) == 12
        assert 0 < sum(kernel.seconds for kernel in times.kernels) < 3 * times.seconds
        (want,) = example.expected()
        np.testing.assert_allclose(session.run(example.feeds)["h11"], want, atol=1e-4)


def test_runs_at_the_same_time_do_not_share_a_workspace(tmp_path: pathlib.Path) -> None:
    example, _ = deep()
    inputs = [data(64, 64) for _ in range(4)]
    with load_artifact(artifact(tmp_path, example), threads=1) as session:
        alone = [session.run({"x": x})["h11"].copy() for x in inputs]
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            jobs = [(n, pool.submit(session.run, {"x": inputs[n]})) for _ in range(50) for n in range(4)]
            for n, job in jobs:
                np.testing.assert_array_equal(job.result()["h11"], alone[n])


def test_results_outlive_later_runs_and_the_session(tmp_path: pathlib.Path) -> None:
    example, _ = deep(3)
    with load_artifact(artifact(tmp_path, example), threads=1) as session:
        first = session.run(example.feeds)["h2"]
        kept = first.copy()
        for _ in range(5):
            session.run({"x": data(64, 64)})
    first += 0.0
    np.testing.assert_array_equal(first, kept)


def test_weights_are_read_where_they_lie(tmp_path: pathlib.Path) -> None:
    """The table has the addresses of the weights in the order of the segment, whoever else uses them."""
    w = data(8, 8)
    nodes = [node("MatMul", "x w", "a"), node("Relu", "a", "r"), node("MatMul", "r w", "b"), node("Add", "b w", "y")]
    model = model_of(nodes, {"x": data(8, 8)}, ["y"], {"w": w})
    assert numpy_helper.to_array(model.graph.initializer[0]).shape == (8, 8)
    check([Example("shared", model, {"x": data(8, 8)})], WIDEST)


def test_inputs_are_taken_as_they_are_in_every_form(tmp_path: pathlib.Path) -> None:
    """Small ones are copied to memory of the session, large ones used where they lie; neither is seen by the next."""
    example, _ = deep(2)
    with load_artifact(artifact(tmp_path, example), threads=1) as session:
        x = example.feeds["x"]
        want = session.run({"x": x})["h1"]
        np.testing.assert_array_equal(session.run({"x": np.asfortranarray(x)})["h1"], want)
        np.testing.assert_array_equal(session.run({"x": np.repeat(x, 2, axis=1)[:, ::2]})["h1"], want)
        unaligned = np.empty(x.nbytes + 4, np.uint8)[4:].view(np.float32).reshape(x.shape)
        unaligned[...] = x
        assert not session.run({"x": x * 0})["h1"].any()
        np.testing.assert_array_equal(session.run({"x": unaligned})["h1"], want)
        with pytest.raises(UserError, match="dtype float64"):
            session.run({"x": x.astype(np.float64)})
        with pytest.raises(UserError, match="shape"):
            session.run({"x": x[:3]})
        with pytest.raises(UserError, match="no input"):
            session.run({"y": x})


def test_results_of_two_calls_are_apart(tmp_path: pathlib.Path) -> None:
    example, _ = deep(1)
    with load_artifact(artifact(tmp_path, example), threads=1) as session:
        results = [session.run({"x": example.feeds["x"] * n})["h0"] for n in range(4)]
        for n, result in enumerate(results):
            np.testing.assert_allclose(result, results[1] * n, atol=1e-5)


def test_threads_sleep_soon_after_a_run(tmp_path: pathlib.Path) -> None:
    """In a process of its own, for the pool asks once how long to look for work."""
    x = data(256, 512)
    model = model_of([node("MatMul", "x w", "y")], {"x": x}, ["y"], {"w": data(512, 512)})
    path = artifact(tmp_path, Example("product", model, {"x": x}))
    program = """
import sys, time
import numpy as np
from mmopt.runtime import load_artifact
with load_artifact(sys.argv[1], threads=2) as session:
    idle = []
    for _ in range(5):
        session.run({"x": np.ones((256, 512), np.float32)})
        before = time.process_time()
        time.sleep(0.2)
        idle.append(time.process_time() - before)
print(min(idle))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TVM_THREAD_POOL_SPIN_COUNT"}
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, env=environment)
    assert float(done.stdout) < 0.01, done.stderr
