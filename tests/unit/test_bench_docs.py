"""The commands and the workflow of ``docs/ci.md`` are ones that exist."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import pytest

from mmopt.backends.profile import profile_names
from mmopt.cli.main import run

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "ci.md").read_text(encoding="utf-8")


def workflow() -> Any:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    return yaml.safe_load(re.search(r"```yaml\n(.*?)```", PAGE, re.S).group(1))  # type: ignore[union-attr]


def commands() -> list[str]:
    joined = PAGE.replace("\\\n", " ")
    found = re.findall(r"^\s*(?:run: )?mmopt ((?:optimize|verify|bench compare|bench) .*)$", joined, re.M)
    return [re.sub(r"\s+", " ", command) for command in found]


def test_the_page_shows_every_command_it_is_about() -> None:
    starts = {command.split(" ")[0] for command in commands()}
    assert starts == {"optimize", "verify", "bench"}
    assert len(commands()) >= 6


@pytest.mark.parametrize("command", commands())
def test_every_flag_exists(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    name = re.match(r"bench compare|\w+", command).group()  # type: ignore[union-attr]
    assert run([*name.split(), "--help"]) == 0
    known = set(re.findall(r"(?<!\S)-{1,2}[a-zO][a-z-]*", capsys.readouterr().out.replace(",", " ")))
    flags = set(re.findall(r" (-{1,2}[a-zO][a-z-]*)", command))
    assert flags <= known


def test_the_workflow_builds_both_sides_on_one_runner_and_judges_them_in_one_run() -> None:
    jobs = workflow()["jobs"]
    assert list(jobs) == ["bench"]
    steps = {step["name"]: step for step in jobs["bench"]["steps"] if "name" in step}
    bench = steps["Bench base and head in turns"]["run"]
    assert bench.index("artifacts/base") < bench.index("artifacts/head") < bench.index("--fail-over")
    assert steps["Keep the results"]["if"] == "always()"
    for file in ("bench.json", "bench.md", "bench.xml"):
        assert file in bench
        assert file in steps["Keep the results"]["with"]["path"]


def test_the_workflows_target_exists() -> None:
    assert workflow()["jobs"]["bench"]["env"]["TARGET"] in {"cpu", *profile_names()}
