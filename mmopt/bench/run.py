"""One benchmark run: start every contender alone, compare the answers, then take turns."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmopt.bench import arrays, machine
from mmopt.bench.answers import TOLERANCE, compare_answers
from mmopt.bench.measure import LocalRacer, Plan, Racer, take_turns
from mmopt.bench.peers import Spec, Values, files_of, open_contender
from mmopt.bench.record import Report, Result, Start
from mmopt.bench.towers import tower_racers
from mmopt.bench.worker import Worker
from mmopt.errors import BackendError, MmoptError

START_SECONDS = 20.0
"""A contender whose starts have taken this long together is not started again."""

Progress = Callable[[str, int, int, str], None]
"""Told before each step: what kind it is (``start``, ``round``, …), its number from 0, how many, and who is at it."""
Entrant = tuple[Racer, Mapping[str, Racer]]
"""A contender that is ready, and its towers by entry point."""


@dataclasses.dataclass(frozen=True)
class Options:
    """How to run a benchmark.

    Attributes:
        plan: Rounds and time.
        starts: Fresh processes per contender, for load time and memory.
        isolate: Measure every contender in a process of its own; turns are taken all the same.
        tolerance: Greatest error allowed between answers, as a fraction of an output's range.
        timeout: Seconds after which a start counts as hung.
    """

    plan: Plan = dataclasses.field(default_factory=Plan)
    starts: int = 5
    isolate: bool = False
    tolerance: float = TOLERANCE
    timeout: float = 600.0


def benchmark(
    specs: Sequence[Spec],
    inputs: Values,
    options: Options,
    *,
    left_out: dict[str, str] | None = None,
    inputs_from: str = "given",
    progress: Progress = lambda kind, index, count, name: None,
) -> Report:
    """Measure all contenders on the same inputs.

    A peer that fails to start is left out and the reason recorded; an artifact that fails ends the run.

    Args:
        specs: Contenders; the first is the reference for answers and ratios. Labels differ.
        inputs: Inputs of the model by name.
        options: How to measure.
        left_out: Peers already known not to take part, and why.
        inputs_from: Where the inputs come from, for the record.
        progress: Told what goes on.

    Raises:
        UserError: The inputs do not fit an artifact, or it is damaged.
        BackendError: An artifact failed, or nothing could be started.
    """
    left_out = dict(left_out or {})
    facts = machine.facts()  # before anything runs: the load average should show others' work, not ours
    results = _start_all(specs, inputs, options, left_out, progress)
    kept = [spec for spec in specs if spec.label in results]
    with contextlib.ExitStack() as stack:
        racers = _isolated(kept, inputs, options, stack) if options.isolate else _together(kept, inputs, stack)
        _race(results, racers, options.plan, progress)
    return Report(
        machine=facts,
        settings=_settings(kept[0].threads, inputs, options, inputs_from),
        results=list(results.values()),
        left_out=left_out,
    )


def _start_all(
    specs: Sequence[Spec], inputs: Values, options: Options, left_out: dict[str, str], progress: Progress
) -> dict[str, Result]:
    """First answers, load times and memory, each from fresh processes, in turns too."""
    results: dict[str, Result] = {}
    reference: tuple[str, Values] | None = None
    count = len(specs) * options.starts
    for index, spec in enumerate(specs):
        progress("start", index, count, spec.label)
        started = _start_one(spec, inputs, options, left_out)
        if started is None:
            continue
        result, outputs = _describe(spec, started[0]), started[1]
        if reference is None:
            reference = (spec.label, outputs)
        else:
            result.agreement = compare_answers(reference[1], outputs, reference[0], options.tolerance)
        results[spec.label] = result
    if not results:
        raise BackendError("no contender could be started", hint="; ".join(f"{k}: {v}" for k, v in left_out.items()))
    for index in range(len(specs), count):
        spec = specs[index % len(specs)]
        if spec.label in results and _time_left(results[spec.label]):
            progress("start", index, count, spec.label)
            started = _start_one(spec, inputs, options, left_out)
            if started is None:
                del results[spec.label]
            else:
                results[spec.label].starts.append(_start(started[0]))
    return results


def _start_one(
    spec: Spec, inputs: Values, options: Options, left_out: dict[str, str]
) -> tuple[dict[str, Any], Values] | None:
    """What a fresh process said of its start, and its answer; None when a peer fails, which is then left out."""
    try:
        with Worker(spec, inputs, options.timeout) as worker:
            return worker.start, worker.outputs
    except MmoptError as error:
        if spec.kind == "mmopt":
            raise
        left_out[spec.label] = f"failed: {error.what}"
        return None


def _time_left(result: Result) -> bool:
    return sum(start.first_answer_s for start in result.starts) < START_SECONDS


def _start(facts: dict[str, Any]) -> Start:
    return Start(**{field.name: facts[field.name] for field in dataclasses.fields(Start)})


def _describe(spec: Spec, start: dict[str, Any]) -> Result:
    files = files_of(spec)
    return Result(
        label=spec.label,
        kind=spec.kind,
        version=start["version"],
        source=spec.source,
        digest="" if spec.kind == "mmopt" or not files else _digest(files),
        precision=spec.precision,
        size_bytes=sum(path.stat().st_size for path in files),
        towers_left_out=start["towers_left_out"],
        starts=[_start(start)],
    )


def _digest(files: Sequence[pathlib.Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()[:16]


def _together(specs: Sequence[Spec], inputs: Values, stack: contextlib.ExitStack) -> list[Entrant]:
    racers: list[Entrant] = []
    for spec in specs:
        contender = open_contender(spec)
        contender.load()
        stack.callback(contender.unload)
        racers.append((LocalRacer(contender, inputs), tower_racers(contender, inputs)[0]))
    return racers


def _isolated(specs: Sequence[Spec], inputs: Values, options: Options, stack: contextlib.ExitStack) -> list[Entrant]:
    racers: list[Entrant] = []
    for spec in specs:
        worker = stack.enter_context(Worker(spec, inputs, options.timeout))
        racers.append((worker, worker.towers()))
    return racers


def _race(results: dict[str, Result], racers: Sequence[Entrant], plan: Plan, progress: Progress) -> None:
    def tell(kind: str) -> Callable[[int], None]:
        return lambda index: progress(kind, index, plan.rounds, "")

    timed = take_turns([racer for racer, _ in racers], plan, progress=tell("round"))
    for label, rounds in timed.items():
        results[label].rounds = rounds
    towers = [tower for _, found in racers for tower in found.values()]
    if not towers:
        return
    timed = take_turns(towers, plan, progress=tell("round of entry points"))
    for racer, found in racers:
        results[racer.name].towers = {entry: timed[tower.name] for entry, tower in found.items()}


def _settings(threads: int, inputs: Values, options: Options, inputs_from: str) -> dict[str, Any]:
    return {
        "threads": threads,
        "rounds": options.plan.rounds,
        "seconds": options.plan.seconds,
        "pause_s": options.plan.pause,
        "isolate": options.isolate,
        "tolerance": options.tolerance,
        "inputs": arrays.describe(inputs),
        "inputs_digest": arrays.digest(inputs),
        "inputs_from": inputs_from,
    }
