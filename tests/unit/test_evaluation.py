"""Judging by the task: limits of metrics, evaluators and what they may not do, and ``--eval`` from end to end."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

import mmopt
from mmopt.cli import main
from mmopt.errors import BackendError, ContractError, UserError
from mmopt.evaluation import Evaluation, Judgement, Limit, load_evaluation, parse_limits
from tests.canonical import module_from
from tests.small_models import two_layers


class TestLimits:
    @pytest.mark.parametrize(
        ("text", "limit", "good", "bad"),
        [
            ("accuracy=-0.003", Limit("accuracy", "fall", 0.003), 0.957, 0.9569),
            ("loss=+0.01", Limit("loss", "rise", 0.01), 0.97, 0.9701),
            ("accuracy=-1%", Limit("accuracy", "fall", 1.0, relative=True), 0.9504, 0.9503),
            ("loss=+2%", Limit("loss", "rise", 2.0, relative=True), 0.9792, 0.9793),
            ("accuracy=.95..", Limit("accuracy", "least", 0.95), 0.95, 0.9499),
            ("loss=..1e-1", Limit("loss", "most", 0.1), 0.1, 0.1001),
            ("top-5=-2..", Limit("top-5", "least", -2.0), -2.0, -2.1),
        ],
    )
    def test_forms(self, text: str, limit: Limit, good: float, bad: float) -> None:
        assert parse_limits([text]) == (limit,)
        assert limit.keeps(good, 0.96)
        assert not limit.keeps(bad, 0.96)

    def test_rounding_of_floats_is_forgiven(self) -> None:
        assert 0.3 - 0.1 < 0.2
        assert Limit("accuracy", "least", 0.2).keeps(0.3 - 0.1, 1.0)

    def test_several(self) -> None:
        found = parse_limits(["accuracy=-0.003, accuracy=..1", "loss=+1%"])
        assert [limit.metric for limit in found] == ["accuracy", "accuracy", "loss"]

    @pytest.mark.parametrize(
        "text", ["accuracy", "accuracy=0.9", "=-1", "a=-", "a=..", "a=1..2", "a=-1%..", "a=-x", ""]
    )
    def test_other_texts_are_refused(self, text: str) -> None:
        with pytest.raises(UserError, match=r"no limit of a metric[\s\S]*may fall"):
            parse_limits([text])

    def test_two_of_the_same_direction(self) -> None:
        with pytest.raises(UserError, match="'a' has two limits"):
            parse_limits(["a=-0.1", "a=0.5.."])

    def test_part_of_the_allowance_that_is_used(self) -> None:
        assert Limit("a", "fall", 0.02).used(0.89, 0.9) == pytest.approx(0.5)
        assert Limit("a", "most", 1.0).used(0.95, 0.9) == pytest.approx(0.5)
        assert Limit("a", "fall", 0.02).used(0.92, 0.9) == pytest.approx(-1)


def constant(**metrics: Any) -> Any:
    return lambda run: metrics


class TestEvaluation:
    def test_metrics_of_a_module(self) -> None:
        module = module_from("g (float[2] x) => (float[2] y) { y = Neg(x) }")

        def total(run: Any) -> Mapping[str, float]:
            return {"total": sum(run({"x": np.full(2, n, np.float32)})["y"].sum() for n in range(4))}

        found = Evaluation(total).against(module)
        assert found.original == {"total": -12}
        assert found.judge_module(module).on == "optimized model"
        assert isinstance(found.measure(lambda inputs: {"y": inputs["x"]})["total"], float)

    def test_limit_of_a_metric_that_is_not_there(self) -> None:
        module = module_from("g (float[2] x) => (float[2] y) { y = Neg(x) }")
        with pytest.raises(UserError, match=r"no metric 'acuracy'[\s\S]*'accuracy'"):
            load_evaluation(constant(accuracy=1.0), ["acuracy=-0.1"]).against(module)

    @pytest.mark.parametrize(
        ("returned", "message"),
        [
            (None, "returned NoneType, not metrics"),
            ({}, "not metrics"),
            ({"a": "good"}, "'a' is no number"),
            ({"a": np.zeros(3)}, "'a' is no number"),
            ({1: 0.5}, "metric 1 is no number"),
            ({"a": float("nan")}, "'a' is nan"),
            ({"a": np.inf}, "'a' is inf"),
        ],
    )
    def test_what_is_no_metrics(self, returned: Any, message: str) -> None:
        with pytest.raises(UserError, match=message):
            Evaluation(lambda run: returned).measure(dict)

    def test_an_evaluator_that_raises_is_quoted_with_its_line(self) -> None:
        def broken(run: Any) -> Mapping[str, float]:
            raise KeyError("logits")

        with pytest.raises(UserError, match=r"evaluator mine: it raised KeyError: 'logits'[\s\S]*test_evaluation"):
            Evaluation(broken, name="mine").measure(dict)

    def test_what_the_model_does_not_take_is_its_own_error(self) -> None:
        module = module_from("g (float[2] x) => (float[2] y) { y = Neg(x) }")
        with pytest.raises(BackendError, match="could not run"):
            Evaluation(lambda run: run({"x": np.zeros(3, np.float32)})).against(module)

    def test_share_is_passed_to_who_takes_it(self) -> None:
        told: list[float] = []

        def partial(run: Any, share: float = 1.0) -> Mapping[str, float]:
            told.append(share)
            return {"a": 1.0}

        Evaluation(partial).measure(dict, share=0.25)
        assert told == [0.25]
        assert Evaluation(partial).partial
        assert not Evaluation(constant(a=1)).partial
        assert Evaluation(constant(a=1)).measure(dict, share=0.25) == {"a": 1.0}

    def test_damage(self) -> None:
        limited = Evaluation(constant(), parse_limits(["a=-0.1", "b=+1"]), original={"a": 0.9, "b": 2.0})
        assert limited.damage({"a": 0.85, "b": 2.1}) == pytest.approx(0.5)
        assert limited.damage({"a": 0.95, "b": 1.9}) < 0
        assert Evaluation(constant(), original={"a": 2.0}).damage({"a": 1.9}) == pytest.approx(0.05)

    def test_judgement(self) -> None:
        limits = parse_limits(["a=-0.1", "b=..1"])
        kept = Judgement({"a": 0.8, "b": 1.0}, {"a": 0.9, "b": 1.0}, limits)
        kept.check()
        assert str(kept) == "a 0.9 → 0.8 (may fall by 0.1), b 1 → 1 (at most 1)"
        missed = Judgement({"a": 0.7, "b": 1.0}, {"a": 0.9, "b": 1.0}, limits)
        with pytest.raises(ContractError, match=r"a is 0\.7, was 0\.9 \(may fall by 0\.1\)") as caught:
            missed.check()
        assert caught.value.exit_code == 6
        assert missed.to_dict()["missed"] == missed.missed

    def test_metrics_that_come_and_go(self) -> None:
        with pytest.raises(UserError, match="gives 'b' for one model and not for another"):
            Evaluation(constant(a=1, b=1), original={"a": 1}).judge(dict)

    def test_names_need_trust(self) -> None:
        with pytest.raises(UserError, match="--trust-code"):
            load_evaluation("os.path:join")


EVALUATORS = """
import numpy as np

def closeness(run):
    x = np.linspace(-1, 1, 64, dtype=np.float32).reshape(4, 16)
    y = run({"x": x})["y"]
    return {"mean": float(y.mean()), "spread": float(y.std())}

def first_call_only(run, calls=[]):
    calls.append(run)
    if len(calls) > 1:
        raise RuntimeError("no data left")
    return {"mean": 1.0}

def falling(run, calls=[]):
    calls.append(run)
    return {"mean": 1.0 / len(calls)}
"""


class TestCommand:
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
        two_layers(tmp_path / "model.onnx")
        # A name of its own for each test: Python keeps what it has imported.
        self.module = f"mytask_{tmp_path.name}"
        (tmp_path / f"{self.module}.py").write_text(EVALUATORS)
        monkeypatch.chdir(tmp_path)
        return tmp_path

    def run(self, function: str, *arguments: str, output: str = "a.mmopt") -> int:
        given = ["--eval", f"{self.module}:{function}", "--trust-code", *arguments]
        return main.run(["optimize", "model.onnx", "-o", output, "-q", *given])

    def test_metrics_are_shown_and_stored(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert (
            self.run("closeness", "--metrics", "mean=-1%,mean=+1%", "--metrics", "spread=+1%", "--json", "r.json") == 0
        )
        (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("task:"))
        assert "(may fall by 1 %, may rise by 1 %), spread" in line
        assert "(of the artifact)" in line
        task = json.loads(pathlib.Path("r.json").read_text())["task"]
        assert task["metrics"]["mean"] == pytest.approx(task["original"]["mean"], rel=1e-4)
        assert task == json.loads(pathlib.Path("a.mmopt/verify.json").read_text())["task"]
        config = json.loads(pathlib.Path("a.mmopt/manifest.json").read_text())["config"]
        assert config["metrics"] == ["mean=-1%,mean=+1%", "spread=+1%"]

    @pytest.mark.parametrize("output", ["a.mmopt", "a.onnx"])
    def test_missed_limit(self, output: str, capsys: pytest.CaptureFixture[str]) -> None:
        before = sorted(os.listdir())
        assert self.run("falling", "--metrics", "mean=0.75..", output=output) == 6
        assert "mean is 0.5, was 1 (at least 0.75)" in capsys.readouterr().err
        assert set(os.listdir()) - {"__pycache__"} == set(before)

    def test_missed_limit_is_written_on_request_alone(self) -> None:
        assert self.run("falling", "--metrics", "mean=0.75..", "--allow-mismatch", output="a.onnx") == 6
        assert os.path.exists("a.onnx")

    @pytest.mark.parametrize("output", ["a.mmopt", "a.onnx"])
    def test_evaluator_that_raises_leaves_nothing(self, output: str, capsys: pytest.CaptureFixture[str]) -> None:
        before = sorted(os.listdir())
        assert self.run("first_call_only", output=output) == 2
        said = capsys.readouterr().err
        assert "first_call_only: it raised RuntimeError: no data left" in said
        assert f"{self.module}.py:12" in said
        assert set(os.listdir()) - {"__pycache__"} == set(before)

    def test_a_recipe_can_say_both(self, capsys: pytest.CaptureFixture[str]) -> None:
        recipe = f'schema_version = 1\nextends = "o1"\neval = "{self.module}:falling"\nmetrics = ["mean=0.75.."]\n'
        pathlib.Path("task.toml").write_text(recipe)
        command = ["optimize", "model.onnx", "-o", "a.onnx", "-q", "--recipe", "task.toml"]
        assert main.run(command) == 2
        assert "--trust-code" in capsys.readouterr().err
        assert main.run([*command, "--trust-code"]) == 6
        assert "mean is 0.5, was 1 (at least 0.75)" in capsys.readouterr().err
        # The command line goes before the recipe.
        assert main.run([*command, "--trust-code", "--eval", f"{self.module}:closeness", "--metrics", "mean=-1"]) == 0
        pathlib.Path("task.toml").write_text('schema_version = 1\nextends = "o1"\nmetrics = [1]\n')
        assert main.run(command) == 2
        assert "1 is no limit" in capsys.readouterr().err

    def test_wrong_use(self, capsys: pytest.CaptureFixture[str]) -> None:
        base = ["optimize", "model.onnx", "-o", "a.mmopt", "-q"]
        for arguments, message in (
            (["--metrics", "mean=-0.1"], "add --eval"),
            (["--eval", f"{self.module}:closeness"], "--trust-code"),
            (["--eval", f"{self.module}:closenes", "--trust-code"], "did you mean 'closeness'"),
            (["--eval", "nowhere_xyz:f", "--trust-code"], "there is no module 'nowhere_xyz'"),
            (["--eval", f"{self.module}:closeness", "--trust-code", "--metrics", "mean"], "no limit of a metric"),
            (["--eval", f"{self.module}:closeness", "--trust-code", "--metrics", "men=-1"], "no metric 'men'"),
        ):
            assert main.run([*base, *arguments]) == 2
            assert message in capsys.readouterr().err
        assert not os.path.exists("a.mmopt")


def test_python(tmp_path: pathlib.Path) -> None:
    module = mmopt.load(two_layers(tmp_path / "m.onnx"))
    x = {"x": np.ones((2, 16), np.float32)}
    evaluation = load_evaluation(lambda run: {"sum": float(run(x)["y"].sum())}, ["sum=-1%", "sum=+1%"])
    result = mmopt.optimize(module, evaluation=evaluation)
    built = mmopt.compile(result.module, output=tmp_path / "a.mmopt", reference=module, evaluation=evaluation)
    assert built.judgement is not None
    assert built.judgement.missed == []
    assert built.to_dict()["task"]["on"] == "artifact"
