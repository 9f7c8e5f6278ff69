"""The file of measurements: what it keeps, whatever happens to it, and what it recommends."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import multiprocessing
import pathlib

import pytest

from mmopt.autotune import database as module
from mmopt.autotune.database import Database, Record, Scope, default_path, identity, kernel_version, profile_digest
from mmopt.autotune.measuring import append_line
from mmopt.backends.cpu.choosing import Workload
from mmopt.backends.profile import Profile
from mmopt.errors import UserError

SCOPE = Scope("some-profile", "some-version", 2)
WORKLOAD = Workload("matmul", (("m", 3),), ("float32",))


def record(rows: int, relative: float | None = 1.0, scope: Scope = SCOPE, **more: object) -> Record:
    seconds = None if relative is None else relative / 1000
    fields = {"scope": scope, "workload": WORKLOAD.key(), "parameters": {"rows": rows}, "seconds": seconds}
    return Record(**{**fields, "relative": relative, **more})  # type: ignore[arg-type]


def test_what_was_added_is_there_after_opening_again(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "deep" / "tuning.jsonl"
    first = Database(path)
    first.add([record(1), record(2, 0.5), record(3, None, error="crashed")])
    second = Database(path)
    assert len(second) == len(first) == 3
    assert second.damaged == []
    expected = {identity({"rows": 1}): 1.0, identity({"rows": 2}): 0.5, identity({"rows": 3}): None}
    assert second.measured(SCOPE, WORKLOAD.key()) == first.measured(SCOPE, WORKLOAD.key()) == expected
    assert second.best(SCOPE, WORKLOAD.key()) == {"rows": 2}
    assert second.known(SCOPE)(WORKLOAD) == {"rows": 2}


def test_other_scopes_and_workloads_know_nothing(tmp_path: pathlib.Path) -> None:
    found = Database(tmp_path / "t.jsonl")
    found.add([record(1), record(2, 0.5)])
    for field, value in (("profile", "other"), ("kernels", "other"), ("threads", 3)):
        assert found.best(dataclasses.replace(SCOPE, **{field: value}), WORKLOAD.key()) is None
    assert found.known(SCOPE)(Workload("matmul", (("m", 4),), ("float32",))) is None


def test_a_small_gain_is_not_worth_leaving_the_prediction(tmp_path: pathlib.Path) -> None:
    found = Database(tmp_path / "t.jsonl")
    found.add([record(1), record(2, 0.99)])
    assert found.best(SCOPE, WORKLOAD.key()) == {"rows": 1}


def test_the_median_of_repeated_measurements_counts(tmp_path: pathlib.Path) -> None:
    found = Database(tmp_path / "t.jsonl")
    found.add([record(1), record(2, 0.2), record(2, 1.2), record(2, 1.3), record(3, 0.9)])
    assert found.measured(SCOPE, WORKLOAD.key())[identity({"rows": 2})] == 1.2
    assert found.best(SCOPE, WORKLOAD.key()) == {"rows": 3}


@pytest.mark.parametrize("torn", ["", '{"format": 1, "scope": {"prof', "\0\0\0"])
def test_a_killed_run_leaves_at_most_half_a_line_which_costs_nothing_else(tmp_path: pathlib.Path, torn: str) -> None:
    path = tmp_path / "t.jsonl"
    Database(path).add([record(1), record(2, 0.5)])
    with path.open("a") as file:
        file.write(torn)
    found = Database(path)
    assert len(found) == 2
    assert len(found.damaged) == bool(torn)
    assert all(str(path) in line and "line 3" in line for line in found.damaged)
    before = path.read_bytes()
    found.add([record(3, 0.1)])
    assert path.read_bytes().startswith(before)
    assert len(Database(path)) == 3
    assert Database(path).best(SCOPE, WORKLOAD.key()) == {"rows": 3}


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"seconds": "fast"},
        {"seconds": -1.0},
        {"scope": {"profile": "p"}},
        {"parameters": [1]},
        {"workload": 3},
    ],
)
def test_lines_that_make_no_sense_are_named_and_passed_over(tmp_path: pathlib.Path, change: dict[str, object]) -> None:
    path = tmp_path / "t.jsonl"
    good = record(1).to_json()
    append_line(path, json.dumps({**good, **change}))
    append_line(path, json.dumps(good))
    found = Database(path)
    assert len(found) == 1
    assert len(found.damaged) == 1
    assert "line 1 is passed over" in found.damaged[0]


def write_many(path: str, first: int) -> None:
    for n in range(50):
        Database(path).add([record(first + n)])


def test_two_runs_may_write_at_the_same_time(tmp_path: pathlib.Path) -> None:
    path = str(tmp_path / "t.jsonl")
    with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        for job in [pool.submit(write_many, path, first) for first in (0, 1000)]:
            job.result(120)
    found = Database(path)
    assert found.damaged == []
    assert len(found) == 100


def test_where_the_file_is(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(module.VARIABLE, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module.sys, "platform", "linux")
    assert default_path() == tmp_path / "cache" / "mmopt" / "tuning.jsonl"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the standard says to ignore it
    assert default_path() == tmp_path / ".cache" / "mmopt" / "tuning.jsonl"
    monkeypatch.setattr(module.sys, "platform", "darwin")
    assert default_path() == tmp_path / "Library" / "Caches" / "mmopt" / "tuning.jsonl"
    monkeypatch.setenv(module.VARIABLE, str(tmp_path / "mine"))
    assert default_path() == tmp_path / "mine"


def test_a_place_that_cannot_be_used_is_an_error(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        Database(tmp_path)
    found = Database(tmp_path / "folder" / "t.jsonl")
    (tmp_path / "folder").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        found.add([record(1)])


def test_versions_tell_profiles_and_kernels_apart() -> None:
    assert profile_digest(Profile("p")) == profile_digest(Profile("p"))
    assert profile_digest(Profile("p")) != profile_digest(Profile("p", l1_bytes=1))
    assert len(kernel_version()) == 12
