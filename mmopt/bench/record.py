"""What one benchmark run found, and its JSON form."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterable
from typing import Any

from mmopt.bench.answers import Agreement
from mmopt.bench.stats import Interval, paired_ratio, percentile, throughput
from mmopt.errors import UserError

SCHEMA_VERSION = 1
KIND = "mmopt-bench"

RoundTimes = list[list[float]]


@dataclasses.dataclass(frozen=True)
class Start:
    """One start of a contender in a fresh process.

    Attributes:
        load_s: Seconds to import the runtime and load the model.
        first_answer_s: Seconds to the first answer, loading included; starting Python itself is not.
        peak_bytes: Greatest resident size of the process after two runs, mapped weights that were touched included.
        baseline_bytes: The same before loading: Python, numpy and the inputs.
    """

    load_s: float
    first_answer_s: float
    peak_bytes: int
    baseline_bytes: int


@dataclasses.dataclass
class Result:
    """What was measured of one contender.

    Attributes:
        label: Its name in tables.
        kind: What runs it: ``mmopt``, ``onnxruntime``, …
        version: Version of that runtime.
        source: What it ran.
        digest: SHA-256 of the model file a peer ran, shortened; "" where there is none.
        precision: Precision OpenVINO was told to compute in.
        size_bytes: Size of all its files on disk.
        rounds: Times of runs in seconds, by round.
        towers: The same for each other entry point of an artifact.
        towers_left_out: Entry points that could not be timed, and why.
        starts: Starts in fresh processes.
        agreement: How its answers compare with the first contender's; None for the first.
    """

    label: str
    kind: str
    version: str
    source: str = ""
    digest: str = ""
    precision: str = "fp32"
    size_bytes: int = 0
    rounds: RoundTimes = dataclasses.field(default_factory=list)
    towers: dict[str, RoundTimes] = dataclasses.field(default_factory=dict)
    towers_left_out: dict[str, str] = dataclasses.field(default_factory=dict)
    starts: list[Start] = dataclasses.field(default_factory=list)
    agreement: Agreement | None = None

    def summary(self) -> dict[str, float]:
        """The figures of the table: percentiles in ms, runs a second, medians over starts."""
        figures = {f"p{q}_ms": percentile(self.rounds, q) * 1e3 for q in (50, 90, 99)}
        figures["throughput_per_s"] = throughput(self.rounds)
        if self.starts:
            for field in ("load_s", "first_answer_s", "peak_bytes", "baseline_bytes"):
                figures[field] = percentile([[getattr(start, field)] for start in self.starts], 50)
        figures["size_bytes"] = self.size_bytes
        figures.update({f"{tower}_p50_ms": percentile(rounds, 50) * 1e3 for tower, rounds in self.towers.items()})
        return figures


@dataclasses.dataclass
class Report:
    """One benchmark run.

    Attributes:
        machine: See :func:`mmopt.bench.machine.facts`.
        settings: ``threads``, ``rounds``, ``seconds``, ``pause_s``, ``isolate``, ``tolerance``, ``inputs`` (name →
            dtype and shape), ``inputs_digest``, ``inputs_from``.
        results: One for each contender, in the order given.
        left_out: Peers that did not take part, and why.
    """

    machine: dict[str, Any]
    settings: dict[str, Any]
    results: list[Result]
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def disagreements(self) -> list[Result]:
        """Contenders whose answers differ from the first one's."""
        return [result for result in self.results if result.agreement is not None and not result.agreement.ok]

    def ratios(self) -> dict[str, Interval]:
        """For each contender but the first: its time over the first one's; above 1 the first is faster."""
        first = self.results[0]
        return {other.label: paired_ratio(other.rounds, first.rounds) for other in self.results[1:]}

    def to_json(self) -> dict[str, Any]:
        """The form of the file. ``summary`` and ``ratios`` are there for readers; reading back ignores them."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": KIND,
            "machine": self.machine,
            "settings": self.settings,
            "contenders": [_result_to_json(result) for result in self.results],
            "ratios": {label: dataclasses.asdict(ratio) for label, ratio in self.ratios().items()},
            "left_out": self.left_out,
        }


def read_report(path: pathlib.Path) -> Report:
    """Read what ``mmopt bench --json`` wrote.

    Raises:
        UserError: The file cannot be read, is not JSON, is of another kind or a newer schema, or a key is missing or
            of a wrong type. The message names the place inside the file.
    """
    data = _load_object(path)
    version = data.get("schema_version")
    if data.get("kind") != KIND or not isinstance(version, int):
        raise UserError("not a benchmark result", where=str(path), hint="write one with `mmopt bench … --json FILE`")
    if version > SCHEMA_VERSION:
        hint = "read it with the mmopt that wrote it, or a newer one"
        raise UserError(f"schema version {version}, known are up to {SCHEMA_VERSION}", where=str(path), hint=hint)
    root = _Place(data, str(path))
    contenders = [_Place(item, f"{path}: contenders[{i}]") for i, item in enumerate(root.get("contenders", list))]
    if not contenders:
        raise UserError("no contenders", where=str(path), hint="measure again")
    return Report(
        machine=root.get("machine", dict),
        settings=root.get("settings", dict),
        results=[_result_from_json(place) for place in contenders],
        left_out=root.get("left_out", dict),
    )


def _load_object(path: pathlib.Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise UserError(error.strerror or "cannot be read", where=str(path), hint="check the path") from error
    except ValueError as error:
        raise UserError(f"not JSON: {error}", where=str(path), hint="write it with `mmopt bench … --json`") from error
    if not isinstance(data, dict):
        raise UserError("not a JSON object", where=str(path), hint="write it with `mmopt bench … --json`")
    return data


def _result_to_json(result: Result) -> dict[str, Any]:
    def rounded(rounds: RoundTimes) -> RoundTimes:
        return [[round(t, 9) for t in times] for times in rounds]

    return {
        **dataclasses.asdict(result),
        "rounds": rounded(result.rounds),
        "towers": {name: rounded(rounds) for name, rounds in result.towers.items()},
        "agreement": result.agreement.to_json() if result.agreement else None,
        "summary": result.summary(),
    }


def _result_from_json(place: _Place) -> Result:
    agreement = place.get("agreement", dict, optional=True)
    towers = _Place(place.get("towers", dict), f"{place.where}: towers")
    starts = [_Place(item, f"{place.where}: starts[{i}]") for i, item in enumerate(place.get("starts", list))]
    return Result(
        **{name: place.get(name, str) for name in ("label", "kind", "version", "source", "digest", "precision")},
        size_bytes=place.get("size_bytes", int),
        rounds=place.rounds("rounds"),
        towers={name: towers.rounds(name) for name in towers.data},
        towers_left_out=place.get("towers_left_out", dict),
        starts=[Start(**{f.name: item.number(f.name) for f in dataclasses.fields(Start)}) for item in starts],
        agreement=_agreement_from_json(_Place(agreement, f"{place.where}: agreement")) if agreement else None,
    )


def _agreement_from_json(place: _Place) -> Agreement:
    error = place.data.get("error")
    return Agreement(
        place.get("reference", str),
        place.get("ok", bool),
        math.inf if error is None else place.number("error"),
        place.get("detail", str),
    )


class _Place:
    """One object inside a file, which knows where it stands."""

    def __init__(self, data: Any, where: str) -> None:
        if not isinstance(data, dict):
            raise _malformed("an object is expected here", where)
        self.data: dict[str, Any] = data
        self.where = where

    def get(self, key: str, kind: type, *, optional: bool = False) -> Any:
        value = self.data.get(key)
        if value is None and optional:
            return None
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            raise _malformed(f"{key!r} is missing or no {kind.__name__}", self.where)
        return value

    def number(self, key: str) -> Any:
        value = self.data.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise _malformed(f"{key!r} is missing or no finite number", self.where)
        return value

    def rounds(self, key: str) -> RoundTimes:
        rounds = self.get(key, list)
        if not rounds or not all(isinstance(times, list) and _positive(times) for times in rounds):
            raise _malformed(f"{key!r} must be a list of non-empty lists of positive numbers", self.where)
        return [[float(t) for t in times] for times in rounds]


def _positive(times: Iterable[Any]) -> bool:
    listed = list(times)
    numbers = (isinstance(t, (int, float)) and not isinstance(t, bool) and math.isfinite(t) and t > 0 for t in listed)
    return bool(listed) and all(numbers)


def _malformed(what: str, where: str) -> UserError:
    return UserError(what, where=where, hint="the file is damaged or was edited; measure again")
