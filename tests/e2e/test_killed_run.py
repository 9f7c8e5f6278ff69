"""A run that is killed leaves the complete old output, the complete new one or none, and the next run succeeds."""

from __future__ import annotations

import contextlib
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from mmopt.runtime import Program, atomic, writer
from mmopt.runtime.store import open_store
from tests.small_models import two_layers

ROOT = pathlib.Path(__file__).parents[2]


def start(model: pathlib.Path, output: pathlib.Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "mmopt.cli.main", "optimize", str(model), "-o", str(output), "-q"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def content(output: pathlib.Path) -> str:
    """The model an artifact was made from, after checking every file of it; "" when there is no artifact."""
    if not output.exists():
        return ""
    store = open_store(output)
    store.verify(store.manifest.files)
    return str(store.manifest.config["model"])


def finish(model: pathlib.Path, output: pathlib.Path) -> float:
    begin = time.monotonic()
    assert start(model, output).wait(timeout=120) == 0
    assert content(output) == str(model)
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    return time.monotonic() - begin


def kill_at_random_moments(folder: pathlib.Path, name: str, kills: int) -> None:
    models = [two_layers(folder / f"{k}.onnx", seed=k) for k in range(2)]
    (folder / "out").mkdir()
    output = folder / "out" / name
    rng = random.Random(0)
    seconds = finish(models[0], output)
    hit = number = 0
    while number < kills or not hit:
        assert number < kills + 10, "no run lived long enough to be killed"
        before = content(output)
        other = models[before == str(models[0])]
        process = start(other, output)
        # Most of a run is starting up; two of three kills fall into its last third, where files are written.
        share = rng.uniform(0.05, 0.66) if number % 3 == 2 else rng.uniform(0.66, 1.0)
        time.sleep(share * seconds)
        if process.poll() is None:
            hit += 1
        else:
            seconds *= 0.8  # the machine has become faster than it was
        number += 1
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert content(output) in (before, str(other))
    finish(models[0], output)


def test_a_kill_in_the_last_third(tmp_path: pathlib.Path) -> None:
    kill_at_random_moments(tmp_path, "a.mmopt", 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.mmopt", "a.zip"])
def test_twenty_kills(tmp_path: pathlib.Path, name: str) -> None:
    kill_at_random_moments(tmp_path, name, 20)


STEPS = [
    ("atomic._make_locked", "after"),
    ("writer.record_file", "before"),
    ("writer.write_zip", "after"),
    ("atomic.sync_tree", "after"),
    ("atomic.publish", "before"),
    ("Path.rename", "after"),
    ("atomic._delete", "before"),
    ("atomic._delete", "after"),
    ("atomic.publish", "after"),
]


HOMES = {"atomic": atomic, "writer": writer, "Path": pathlib.Path}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def write(output: pathlib.Path, note: str, where: str = "", when: str = "", *, can_exchange: bool = True) -> int:
    """Write an artifact in a process that kills itself ``when`` it comes to the function ``where``; its exit status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        if not can_exchange:
            atomic.exchange = lambda first, second: False
        if where:
            module, _, name = where.partition(".")
            function = getattr(HOMES[module], name)

            def last(*arguments: object) -> None:
                if when == "after":
                    function(*arguments)
                die()

            setattr(HOMES[module], name, last)
        with writer.write_artifact(output) as made:
            made.add_program(Program(None, {}, {}, {"data.bin": note.encode() * 100000}, {"name": "any"}, notes=[note]))
            made.commit()
        os._exit(0)
    finally:
        os._exit(99)


@pytest.mark.parametrize("can_exchange", [True, False])
@pytest.mark.parametrize("name", ["a.mmopt", "a.zip"])
def test_killed_at_each_step_of_writing(tmp_path: pathlib.Path, name: str, can_exchange: bool) -> None:
    output = tmp_path / name
    assert write(output, "old", can_exchange=can_exchange) == 0
    killed = 0
    for where, when in STEPS:
        code = write(output, "new", where, when, can_exchange=can_exchange)
        assert code in (0, -signal.SIGKILL), (where, when)
        killed += code != 0
        if output.exists():
            store = open_store(output)
            store.verify(store.manifest.files)
            assert store.manifest.notes[0] in ("old", "new")
        else:
            # Only where the file system cannot exchange, and only between two renames.
            assert not can_exchange
            assert where == "Path.rename"
        assert write(output, "old", can_exchange=can_exchange) == 0
        assert os.listdir(tmp_path) == [name], (where, when)
        assert open_store(output).manifest.notes == ["old"]
    assert killed >= 5
