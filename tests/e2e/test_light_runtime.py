"""Running an artifact in a fresh process: what it loads, and what it can do without."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

from mmopt.runtime.libraries import installed_libraries
from mmopt.runtime.writer import write_artifact
from tests import runtime_programs as rp

ROOT = pathlib.Path(__file__).parents[2]

RUN = """
import sys
{before}
import numpy as np
import mmopt.runtime
session = mmopt.runtime.load_artifact(sys.argv[1], threads=1)
out = session.entry("encode").run({{"x": np.ones((2, 16), np.float32)}})["h"]
loaded = [n for n in ("torch", "onnx", "onnx_ir", "tvm", "onnxruntime", "typer", "rich") if sys.modules.get(n)]
maps = open("/proc/self/maps").read()
libraries = [n for n in ("libtvm_compiler", "libtorch") if n in maps]
runtimes = sorted({{line.split()[-1] for line in maps.splitlines() if line.endswith("libtvm_runtime.so")}})
print(out.shape, loaded, libraries, *runtimes)
"""


@pytest.fixture(scope="module", params=["a.mmopt", "a.zip"])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    program = rp.program()
    for library in installed_libraries():
        program.fallback_models[f"runtime/{library.name}"] = library
    path = tmp_path_factory.mktemp("light") / request.param
    with write_artifact(path) as writer:
        writer.add_program(program)
        writer.commit()
    return path


def run(artifact: pathlib.Path, before: str = "") -> str:
    done = subprocess.run(
        [sys.executable, "-c", RUN.format(before=before), str(artifact)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
def test_nothing_heavy_is_loaded(artifact: pathlib.Path) -> None:
    assert run(artifact).startswith("(2, 8) [] []")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
def test_a_carried_runtime_needs_no_tvm_package(artifact: pathlib.Path) -> None:
    *_, library = run(artifact, before="sys.modules['tvm'] = None").split()
    assert "site-packages" not in library
    assert library.endswith("runtime/libtvm_runtime.so")


def test_without_any_runtime_the_error_says_so(tmp_path: pathlib.Path) -> None:
    with write_artifact(tmp_path / "a.mmopt") as writer:
        writer.add_program(rp.program())
        writer.commit()
    code = RUN.format(before="sys.modules['tvm'] = None")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.mmopt")], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode != 0
    assert "neither in the artifact nor installed" in done.stderr
    assert "install apache-tvm" in done.stderr


def test_torch_can_still_be_imported_after_the_runtime(artifact: pathlib.Path) -> None:
    pytest.importorskip("torch")
    code = (
        RUN.format(before="")
        + "import torch, tvm_ffi; print(torch.from_dlpack(session.native.convert.to_tvm(out)).shape)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(artifact)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("torch.Size([2, 8])")


def test_the_installed_runtime_and_tvm_itself_share_one_process(tmp_path: pathlib.Path) -> None:
    with write_artifact(tmp_path / "a.mmopt") as writer:
        writer.add_program(rp.program())
        writer.commit()
    for before, after in (("import tvm", ""), ("", "import tvm; print(tvm.__version__)")):
        code = RUN.format(before=before) + after
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "a.mmopt")],
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=False,
        )
        assert done.returncode == 0, done.stderr


FIRST_ANSWER = """
import sys, time
begin = time.perf_counter()
import numpy as np
import mmopt.runtime
session = mmopt.runtime.load_artifact(sys.argv[1], threads=2)
inputs = {}
for spec in session.inputs:
    shape = [size if isinstance(size, int) else 1 for size in spec.shape]
    inputs[spec.name] = np.ones(shape, spec.dtype)
session.run(inputs)
print(time.perf_counter() - begin)
"""


@pytest.mark.slow
def test_clip_answers_within_a_second_and_a_half(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("transformers")
    export = [sys.executable, "-m", "benchmarks.zoo", "export", "-o", str(tmp_path), "clip-vit-b32"]
    subprocess.run(export, cwd=ROOT, check=True, timeout=300)
    (model,) = (tmp_path / "clip-vit-b32").glob("*.onnx")
    optimize = [sys.executable, "-m", "mmopt.cli.main", "optimize", str(model), "-o", str(tmp_path / "a.mmopt"), "-q"]
    subprocess.run(optimize, cwd=ROOT, check=True, timeout=300)
    times = []
    for _ in range(3):
        command = [sys.executable, "-c", FIRST_ANSWER, str(tmp_path / "a.mmopt")]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=60)
        times.append(float(done.stdout))
    assert min(times) <= 1.5, times


def test_the_compiler_does_not_import_torch() -> None:
    code = "import sys, mmopt.lowering.compiler; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
