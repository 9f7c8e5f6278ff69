"""The Python interface: load, optimize, compile, verify. Running artifacts is :func:`mmopt.load_artifact`."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mmopt.building import Check, CompileResult, build_artifact
from mmopt.errors import UserError
from mmopt.ir.modality import Modality
from mmopt.ir.module import Module
from mmopt.loading import Shapes, fix_shapes, load_source, set_modalities
from mmopt.pipeline.report import PipelineReport
from mmopt.runnable import Inputs, as_runnable
from mmopt.verification import Verification, compare_runnables

if TYPE_CHECKING:
    from mmopt.autotune.runner import Budget, TuningReport
    from mmopt.backends.cpu.choosing import Chooser
    from mmopt.backends.profile import Profile
    from mmopt.evaluation import Evaluation
    from mmopt.pipeline.base import Pass
    from mmopt.pipeline.manager import Progress
    from mmopt.pipeline.recipe import Recipe

_LEVEL_RECIPES = {0: "o0", 1: "o1", 2: "o2", 3: "o2"}
LEVELS = tuple(_LEVEL_RECIPES)
"""Optimization levels."""
NARROW = ("bf16", "fp16")
"""Precisions that need nothing but to be asked for."""


@dataclasses.dataclass(frozen=True)
class OptimizeResult:
    """What :func:`optimize` gives.

    Attributes:
        module: The optimized module.
        report: What every pass did.
    """

    module: Module
    report: PipelineReport


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How kernels are tuned.

    Attributes:
        minutes: Time for measuring; None for no limit. With 0, only what the database knows is used.
        trials: Candidates to measure at most; None for no limit.
        database: The database's file; the one in the user's cache folder when None.
        jobs: Kernels compiled at the same time; one per core when None.
    """

    minutes: float | None = 5.0
    trials: int | None = None
    database: str | os.PathLike[str] | None = None
    jobs: int | None = None

    @property
    def budget(self) -> Budget:
        """When to stop.

        Raises:
            UserError: A limit makes no sense.
        """
        from mmopt.autotune.runner import Budget

        return Budget(self.minutes, self.trials)


def load(
    source: Any,
    example_inputs: Any = None,
    *,
    dynamic_shapes: Any = None,
    shapes: Shapes | None = None,
    modalities: Mapping[str, Modality | str] | None = None,
    fx_passes: Sequence[Any] = (),
    trust_code: bool = False,
) -> Module:
    """Read a model.

    Args:
        source: The path of a ``.onnx`` or ``.pt2`` file, ``package.module:function``, a ``torch.nn.Module``, an
            ``ExportedProgram`` or an ``onnx_ir.Model``.
        example_inputs: What a torch module takes, for export.
        dynamic_shapes: As for ``torch.export.export``.
        shapes: Shapes to fix, by input name.
        modalities: What inputs are, by name, where the analysis should not find out by itself.
        fx_passes: Passes on the FX graph of a torch model.
        trust_code: Allow ``.pt2`` files and functions, which can run code.

    Raises:
        LoadError: It cannot be read as a model.
        UserError: An argument does not fit.
    """
    module = load_source(
        source, example_inputs, dynamic_shapes=dynamic_shapes, fx_passes=fx_passes, trust_code=trust_code
    )
    set_modalities(module, {name: Modality(kind) for name, kind in (modalities or {}).items()})
    fix_shapes(module, shapes or {})
    return module


def optimize(
    module: Module,
    *,
    target: str = "cpu",
    level: int = 2,
    precision: str | None = None,
    recipe: str | os.PathLike[str] | Recipe | None = None,
    passes: Sequence[Pass | str] = (),
    inputs: Inputs | Sequence[Inputs] | None = None,
    samples: dict[str, np.ndarray[Any, Any]] | Literal["random"] | None = None,
    validate: str | None = None,
    strict: bool | None = None,
    evaluation: Evaluation | None = None,
    seed: int | None = None,
    threads: int = 0,
    dump_dir: str | os.PathLike[str] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> OptimizeResult:
    """Rewrite ``module``; it is left as it is, and the result shares its weights.

    Args:
        module: What to optimize.
        target: Name of the target, for passes that ask.
        level: 0 only works out shapes, 1 runs exact rewrites, 2 also those that round differently, 3 the same (what it
            adds is in compiling).
        precision: ``fp32``, or ``bf16`` or ``fp16`` to round what matrix products, convolutions, attention and
            recurrence read, and to store weights so, or ``int8`` to compute linear layers in integers, with ranges from
            ``samples``; what the recipe says, or ``fp32``, when None.
        recipe: A recipe, or its name or file, instead of the level's own.
        passes: Further passes: objects, or as on the command line (``my-pass{threshold=0.5}``).
        inputs: Inputs to validate on; probes when None.
        samples: Calibration samples by input name, with a leading axis of samples; ``random`` makes some up, and has
            the module, its report and every artifact of it say so.
        validate: ``each``, ``end`` or ``off``; what the recipe says, or ``each``, when None.
        strict: A pass that fails its validation is an error; what the recipe says, or False, when None.
        evaluation: How the task judges a model (:func:`mmopt.evaluation.load_evaluation`), for passes that ask.
        seed: Seed of everything random; what the recipe says, or 0, when None.
        threads: Threads of the reference runtime; 0 takes all cores.
        dump_dir: Folder for the module as text after each pass.
        progress: Told before and after each pass.

    Raises:
        UserError: An unknown recipe, pass or option, or inputs that do not run.
        PassError: A pass failed and ``strict`` is set.
    """
    from mmopt.analysis.calibration import GIVEN, MADE_UP, RANDOM, made_up
    from mmopt.pipeline.manager import PassManager

    chosen = choose_recipe(level, precision, recipe, passes, target)
    settings = chosen.merged(validate=validate, strict=strict, seed=seed)
    result = module.clone()
    if chosen_precision(chosen, precision) in NARROW:
        _note_arithmetic(result, target, chosen_precision(chosen, precision))
    if isinstance(samples, str):
        samples, samples_from = made_up(result, settings["seed"]), RANDOM
        result.remark("calibration", "note", "", MADE_UP)
    else:
        samples_from = GIVEN
    if evaluation is not None and not evaluation.original:
        evaluation = evaluation.against(module, threads=threads, seed=settings["seed"])
    manager = PassManager(
        chosen.phases,
        validate=settings["validate"],
        strict=settings["strict"],
        seed=settings["seed"],
        inputs=inputs,
        samples=samples,
        samples_from=samples_from,
        evaluation=evaluation,
        predict=predictor(target),
        dump_dir=None if dump_dir is None else pathlib.Path(dump_dir),
        target=target,
        progress=progress,
        threads=threads,
    )
    return OptimizeResult(result, manager.run(result))


def predictor(target: str) -> Callable[[Module], float]:
    """The cost model of a target's kernels; the profile is read when it is first asked."""

    @functools.cache
    def profile() -> Profile:
        from mmopt.backends.profile import load_profile

        return load_profile(target)

    def predict(module: Module) -> float:
        from mmopt.lowering.prediction import predicted_cycles

        return predicted_cycles(module, profile())

    return predict


def choose_recipe(
    level: int = 2,
    precision: str | None = None,
    recipe: str | os.PathLike[str] | Recipe | None = None,
    passes: Sequence[Pass | str] = (),
    target: str = "",
) -> Recipe:
    """The recipe that :func:`optimize` runs for these arguments, for any runtime when no target is given.

    Raises:
        UserError: An unknown level, precision, recipe, pass or option.
    """
    from mmopt.pipeline.base import Phase
    from mmopt.pipeline.recipe import Recipe, before_fusion, load_recipe

    if level not in LEVELS:
        raise UserError(f"there is no level {level}", hint=f"one of {', '.join(map(str, LEVELS))}")
    specs = [pass_ for pass_ in passes if isinstance(pass_, str)]
    if isinstance(recipe, Recipe):
        chosen = recipe
        from mmopt.pipeline.registry import resolve

        objects = [resolve(pass_) if isinstance(pass_, str) else pass_ for pass_ in passes]
    else:
        chosen = load_recipe(str(recipe or _LEVEL_RECIPES[level]), extra=specs)
        objects = [pass_ for pass_ in passes if not isinstance(pass_, str)]
    phases = [Phase("given", tuple(objects))] if objects else []
    if rounding := _rounding(chosen, chosen_precision(chosen, precision), target):
        phases.append(Phase("precision", rounding))
    for phase in phases:
        chosen = dataclasses.replace(chosen, phases=before_fusion(chosen.phases, phase))
    return chosen


def chosen_precision(recipe: Recipe, given: str | None) -> str:
    """The number format by precedence: what was given, then what the recipe says, then ``fp32``."""
    return str(given or recipe.settings.get("precision", "fp32"))


def _rounding(recipe: Recipe, precision: str, target: str) -> tuple[Pass, ...]:
    """The passes that bring ``precision``, when the recipe lacks them.

    What is quantized has attention read bfloat16 where ``target`` multiplies it: its softmax has no integers.

    Raises:
        UserError: No pass here or in the recipe does.
    """
    from mmopt.transforms.precision import NarrowFloats

    if precision == "fp32":
        return ()
    if precision == "int8":
        from mmopt.transforms.quantize import QuantizeStatic

        if any(isinstance(pass_, QuantizeStatic) for phase in recipe.phases for pass_ in phase.passes):
            return ()
        return _integers(target) if target else _integers_for_others()
    if precision in NARROW:
        pass_ = NarrowFloats(format=precision)  # type: ignore[arg-type]
        return () if any(pass_ in phase.passes for phase in recipe.phases) else (pass_,)
    if precision == recipe.settings.get("precision"):
        return ()
    raise UserError(
        f"no pass here brings the precision {precision!r}",
        hint="fp32, bf16, fp16 and int8 work by themselves; others need a recipe that brings them",
    )


def _integers(target: str) -> tuple[Pass, ...]:
    """W8A8 for the kernels of a target."""
    from mmopt.transforms.precision import NarrowFloats
    from mmopt.transforms.quantize import QuantizeStatic, QuantizeWeights

    narrow = (NarrowFloats(kinds=("Attention",)),) if _multiplies_bf16(target) else ()
    # First bfloat16: behind a quantization, its error is judged by steps that happen to be taken otherwise.
    # Layers whose result leaves the model read floats, but their weights are as large as others'.
    return (*narrow, QuantizeStatic(balance=True), QuantizeWeights(logits=True))


def _integers_for_others() -> tuple[Pass, ...]:
    """W8A8 for runtimes that read ONNX, with what they compute in integers where they look for it."""
    from mmopt.transforms.quantize import QuantizeAttention, QuantizeStatic, SeparateProjections

    static = QuantizeStatic(balance=True, portable=True, logits=True)
    return (SeparateProjections(), static, QuantizeAttention())


def _multiplies_bf16(target: str) -> bool:
    from mmopt.backends.profile import load_profile

    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(load_profile(target).features))


def _note_arithmetic(module: Module, target: str, precision: str) -> None:
    """Say what a narrow format is good for on a target that has no arithmetic in it. It is used all the same: weights
    and stored values take half the memory, and the model means the same wherever it runs."""
    if precision == "fp16" or not _multiplies_bf16(target):
        module.remark(
            "narrow-floats",
            "note",
            "",
            f"target {target} multiplies in fp32: {precision} halves memory there, and arithmetic is as fast as before",
        )


def compile(
    module: Module,
    *,
    output: str | os.PathLike[str],
    target: str = "cpu",
    multi_isa: bool = False,
    tuning: Tuning | None = None,
    entries: Mapping[str, Module] | None = None,
    reference: Module | None = None,
    inputs: Inputs | Sequence[Inputs] | None = None,
    tolerance: float | None = None,
    allow_mismatch: bool = False,
    evaluation: Evaluation | None = None,
    seed: int = 0,
    report: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    progress: Callable[[int, int, str], None] = lambda index, total, name: None,
) -> CompileResult:
    """Compile ``module`` to an artifact, verify it, and move it to ``output`` in one step.

    Args:
        module: What to compile.
        output: Folder to write, or one zip when the name ends in ``.zip``.
        target: Name or file of the target profile.
        multi_isa: Compile for levels (instruction sets, GPUs) below the target too; loading takes the best that runs.
        tuning: Choose the parameters of kernels by measuring (level 3); by prediction when None.
        entries: Entry points besides ``main``; when None, the towers and the fusion of a model that can be cut.
        reference: What the artifact has to agree with, for example the module before :func:`optimize`; ``module``
            itself when None.
        inputs: Inputs to compare on; probes when None.
        tolerance: Largest error as a fraction of an output's range; by default it follows from the number formats.
        allow_mismatch: Write the artifact even when it disagrees.
        evaluation: How the task judges the artifact, which must keep the limits of its metrics.
        seed: Seed of the probes.
        report: Content of ``report.json``, to which the towers are added.
        config: The resolved configuration, for the manifest.
        progress: Told step, number of steps and what it does.

    Raises:
        UserError: An unknown target, or an output that cannot be written.
        UnsupportedError: Something in the model runs nowhere.
        BackendError: Compiling or running failed.
        VerifyError: The artifact disagrees with the reference; nothing was written.
        ContractError: It misses a limit of a metric; nothing was written.
    """
    from mmopt.backends.levels import levels_below
    from mmopt.backends.profile import load_profile

    profile = load_profile(target)
    further = levels_below(profile) if multi_isa else []
    if entries is None:
        from mmopt.analysis.towers import analyze_towers, extract_entry_points

        towers = analyze_towers(module)
        entries = {} if towers.uncut else extract_entry_points(module, towers)
        report = {"schema_version": 1, **(report or {}), "towers": towers.to_dict()}
    chooser, found = None, None
    if tuning is not None:
        chooser, found = _decide({"main": module, **entries}, profile, tuning, inputs, progress)
        report = {"schema_version": 1, **(report or {}), "tuning": found}
    if evaluation is not None and not evaluation.original:
        evaluation = evaluation.against(reference or module, seed=seed)
    check = Check(reference, inputs, tolerance, seed, allow_mismatch, evaluation)
    built = build_artifact(
        module,
        profile,
        output,
        entries=entries,
        further=further,
        check=check,
        report=report,
        config=config,
        chooser=chooser,
        progress=progress,
    )
    return dataclasses.replace(built, tuning=found)


def _decide(
    modules: Mapping[str, Module],
    profile: Profile,
    tuning: Tuning,
    inputs: Inputs | Sequence[Inputs] | None,
    progress: Callable[[int, int, str], None],
) -> tuple[Chooser, dict[str, Any]]:
    """What to compile with, and what the report says about it."""
    from mmopt.autotune.contest import decide
    from mmopt.autotune.database import Database

    first = inputs if inputs is None or isinstance(inputs, Mapping) else next(iter(inputs), None)
    decision = decide(
        modules, profile, Database(tuning.database), tuning.budget, inputs=first, jobs=tuning.jobs, progress=progress
    )
    return decision.chooser, decision.to_json()


def tune(
    module: Module,
    *,
    target: str = "cpu",
    tuning: Tuning | None = None,
    entries: Mapping[str, Module] | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> TuningReport:
    """Measure the candidates of the module's kernels on this machine, into a database that later runs use.

    Args:
        module: What :func:`optimize` gave: the module that will be compiled.
        target: Name or file of the target profile, which must fit this machine.
        tuning: How long, and where results are kept.
        entries: Entry points besides ``main``; when None, the towers and the fusion of a model that can be cut.
        progress: Told candidates measured, candidates to measure, and the best so far.

    Raises:
        UserError: An unknown target, or a database that cannot be used.
        UnsupportedError: The target is not this machine.
    """
    from mmopt.autotune.contest import scope_threads
    from mmopt.autotune.database import Database
    from mmopt.autotune.runner import tune as search
    from mmopt.backends.profile import load_profile

    profile, options = load_profile(target), tuning or Tuning()
    modules = {"main": module, **(entry_points(module) if entries is None else entries)}
    return search(
        modules,
        profile,
        Database(options.database),
        options.budget,
        threads=scope_threads(profile),
        jobs=options.jobs,
        progress=progress,
    )


def entry_points(module: Module) -> dict[str, Module]:
    """The entry points besides ``main`` that :func:`compile` makes: the towers and the fusion, where there are any."""
    from mmopt.analysis.towers import analyze_towers, extract_entry_points

    towers = analyze_towers(module)
    return {} if towers.uncut else dict(extract_entry_points(module, towers))


def verify(
    actual: Any,
    reference: Any,
    *,
    inputs: Inputs | Sequence[Inputs] | None = None,
    tolerance: float | None = None,
    threads: int | None = None,
    seed: int = 0,
    trust_code: bool = False,
) -> Verification:
    """Run two models or artifacts on the same inputs and compare every output.

    Args:
        actual: What is checked: a path, a session of :func:`load_artifact`, or a module.
        reference: What is right.
        inputs: One set of inputs by name, or several; probes when None.
        tolerance: Largest error as a fraction of an output's range; by default it follows from the number formats.
        threads: Threads of either side.
        seed: Seed of the probes.
        trust_code: Allow ``.pt2`` files and functions, which can run code.

    Raises:
        LoadError: One of them cannot be read.
        UserError: They do not take the same inputs or give the same outputs.
        BackendError: One of them failed.
    """
    return compare_runnables(
        as_runnable(actual, threads=threads, seed=seed, trust_code=trust_code),
        as_runnable(reference, threads=threads, seed=seed, trust_code=trust_code),
        inputs=inputs,
        seed=seed,
        tolerance=tolerance,
    )
