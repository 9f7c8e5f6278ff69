"""Recipes: a named pipeline with options, as TOML.

    schema_version = 1
    description = "Exact rewrites only."
    extends = "o0"                      # its phases come first
    validate = "each"                   # also: strict, seed, target, precision
    eval = "mytask:accuracy"            # judged by the task; --trust-code has to allow it
    metrics = ["accuracy=-0.003"]

    [[phase]]
    name = "canonicalize"
    max_rounds = 4                      # until nothing changes, at most four times
    passes = ["infer-shapes", "fold-constants"]

    [options.fold-constants]
    max_bytes = 1048576

What the command line says goes before a recipe, a recipe before the defaults.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from mmopt.errors import UserError, did_you_mean
from mmopt.pipeline.base import Pass, Phase
from mmopt.pipeline.manager import VALIDATE
from mmopt.pipeline.options import split_spec
from mmopt.pipeline.registry import resolve

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]

SCHEMA_VERSION = 1

SETTINGS: dict[str, type] = {
    "validate": str, "strict": bool, "seed": int, "target": str, "precision": str, "jobs": int, "eval": str,
    "metrics": list,
}  # fmt: skip
"""Settings of a run that a recipe may give, and their types."""

DEFAULTS: dict[str, Any] = {"validate": "each", "strict": False, "seed": 0}
"""What holds when neither the command line nor the recipe says otherwise."""

FUSION = "fuse"
"""Name of the phase that forms fusion groups; passes of one's own run before it."""

PORTABLE = "portable"
"""Name of the recipe for other runtimes, and of its last phase, which spells the model as they run it fastest."""

_PHASE_KEYS = ("name", "passes", "max_rounds")
_KEYS = ("schema_version", "description", "extends", "phase", "options", *SETTINGS)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A named pipeline.

    Attributes:
        name: Its name: that of its file.
        description: One line for people.
        phases: Its phases, those of the recipe that it extends first.
        settings: Settings of the run that it gives (``validate``, ``strict``, ``seed``, …).
    """

    name: str
    description: str
    phases: tuple[Phase, ...]
    settings: Mapping[str, Any]

    def merged(self, **given: Any) -> dict[str, Any]:
        """Settings by precedence: ``given`` (None: not given), then the recipe, then the defaults."""
        said = {key: value for key, value in given.items() if value is not None}
        return {**DEFAULTS, **self.settings, **said}

    def describe(self, settings: Mapping[str, Any] | None = None) -> list[str]:
        """What would run, line by line: for ``--dry-run``."""
        lines = [f"recipe {self.name}: {self.description}"]
        lines += [f"{key} = {value}" for key, value in sorted((settings or self.merged()).items())]
        for phase in self.phases:
            rounds = f" (up to {phase.max_rounds} rounds)" if phase.max_rounds > 1 else ""
            lines.append(f"phase {phase.name or 'passes'}{rounds}:")
            lines += [f"  {pass_.spec()}  [{pass_.fidelity.value}]" for pass_ in phase.passes]
        return lines


def recipe_names() -> dict[str, str]:
    """Name and description of every recipe that ships with mmopt."""
    folder = recipe_folder()
    return {path.stem: str(_read(path).get("description", "")) for path in sorted(folder.glob("*.toml"))}


def load_recipe(name: str, *, extra: Sequence[str] = ()) -> Recipe:
    """Load a recipe that ships with mmopt, by name, or one of the user's own, by path.

    Args:
        name: ``o2``, or ``path/to/mine.toml``.
        extra: Passes from the command line (``--pass``). One that the recipe has takes the place of its first
            occurrence and with these options; others run in a phase of their own, before fusion hides single
            operators in groups (a phase called ``fuse``, or ``portable``), or at the end when there is none.

    Raises:
        UserError: There is no such recipe, or it has unknown keys, passes, options or values.
    """
    recipe = _load(_locate(name), ())
    return dataclasses.replace(recipe, phases=_with_extra(recipe.phases, extra)) if extra else recipe


def recipe_folder() -> pathlib.Path:
    """Where the recipes that ship with mmopt are: package data, or the source tree of a checkout."""
    package = pathlib.Path(str(importlib.resources.files("mmopt")))
    for folder in (package / "data" / "recipes", package.parent / "passes" / "recipes"):
        if folder.is_dir():
            return folder
    raise UserError("the recipes that ship with mmopt are missing", where=str(package), hint="install mmopt again")


def _locate(name: str) -> pathlib.Path:
    if name.endswith(".toml"):
        path = pathlib.Path(name)
        if not path.is_file():
            raise UserError("there is no such recipe file", where=name)
        return path
    path = recipe_folder() / f"{name.lower()}.toml"
    if not path.is_file():
        known = [found.stem for found in recipe_folder().glob("*.toml")]
        raise UserError(f"there is no recipe {name!r}", hint=did_you_mean(name, known))
    return path


def _read(path: pathlib.Path) -> dict[str, Any]:
    try:
        return dict(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"is no valid TOML: {error}", where=str(path)) from error


def _load(path: pathlib.Path, chain: tuple[pathlib.Path, ...]) -> Recipe:
    where = str(path)
    if path.resolve() in chain:
        raise UserError("recipes extend each other in a circle", where=where, hint="remove one `extends`")
    content = _read(path)
    _check_keys(content, _KEYS, where)
    if content.get("schema_version") != SCHEMA_VERSION:
        found = content.get("schema_version", "missing")
        raise UserError(f"schema_version is {found}", where=where, hint=f"write schema_version = {SCHEMA_VERSION}")
    base = _base(content, path, (*chain, path.resolve()))
    options = _typed(content, "options", dict, where, {})
    phases = tuple(_phase(entry, options, where) for entry in _typed(content, "phase", list, where, []))
    used = {pass_.name for phase in phases for pass_ in phase.passes} | _spec_names(content)
    if unused := [name for name in options if name not in used]:
        raise UserError(f"[options.{unused[0]}] is for no pass here", where=where, hint=did_you_mean(unused[0], used))
    return Recipe(
        path.stem,
        _typed(content, "description", str, where, ""),
        (*(base.phases if base is not None else ()), *phases),
        {**(base.settings if base is not None else {}), **_settings(content, where)},
    )


def _base(content: Mapping[str, Any], path: pathlib.Path, chain: tuple[pathlib.Path, ...]) -> Recipe | None:
    name = _typed(content, "extends", str, str(path), "")
    if not name:
        return None
    # A path is meant relative to the recipe that says it.
    return _load(_locate(str(path.parent / name) if name.endswith(".toml") else name), chain)


def _settings(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    settings = {key: _typed(content, key, kind, where, None) for key, kind in SETTINGS.items() if key in content}
    mode = settings.get("validate", "each")
    if mode not in VALIDATE:
        raise UserError(f"validate is {mode!r}", where=where, hint=did_you_mean(mode, VALIDATE))
    if odd := [limit for limit in settings.get("metrics", ()) if not isinstance(limit, str)]:
        raise UserError(f"{odd[0]!r} is no limit", where=f"{where}, metrics", hint='write metrics = ["name=-0.01"]')
    return settings


def _phase(entry: Any, options: Mapping[str, Any], where: str) -> Phase:
    if not isinstance(entry, dict):
        raise UserError("a phase must be a table", where=where, hint="write [[phase]]")
    _check_keys(entry, _PHASE_KEYS, f"{where}, [[phase]]")
    name = _typed(entry, "name", str, where, "")
    place = f"{where}, phase {name!r}"
    rounds = _typed(entry, "max_rounds", int, place, 1)
    if rounds < 1:
        raise UserError(f"max_rounds is {rounds}", where=place, hint="write 1 or more")
    return Phase(name, tuple(_pass(spec, options, place) for spec in _typed(entry, "passes", list, place, [])), rounds)


def _pass(spec: Any, options: Mapping[str, Any], where: str) -> Pass:
    if not isinstance(spec, str):
        raise UserError(f"{spec!r} is no pass", where=where, hint='write passes = ["name", "name{option=value}"]')
    try:
        return resolve(spec, defaults=options.get(split_spec(spec)[0]))
    except UserError as error:
        raise UserError(error.what, where=f"{where}, {error.where or spec}", hint=error.hint) from error


def _with_extra(phases: Sequence[Phase], extra: Sequence[str]) -> tuple[Phase, ...]:
    changed, added = list(phases), []
    for spec in extra:
        pass_ = resolve(spec)
        for number, phase in enumerate(changed):
            if any(type(mine) is type(pass_) for mine in phase.passes):
                passes = tuple(pass_ if type(mine) is type(pass_) else mine for mine in phase.passes)
                changed[number] = dataclasses.replace(phase, passes=passes)
                break
        else:
            added.append(pass_)
    return before_fusion(changed, Phase("command line", tuple(added))) if added else tuple(changed)


def before_fusion(phases: Sequence[Phase], added: Phase) -> tuple[Phase, ...]:
    """``phases`` with ``added`` before the one that respells or groups what it finds, at the end when there is none."""
    place = next((n for n, phase in enumerate(phases) if phase.name in (FUSION, PORTABLE)), len(phases))
    return (*phases[:place], added, *phases[place:])


def _spec_names(content: Mapping[str, Any]) -> set[str]:
    """Names of passes as they are written, for options of passes that a file defines under another name."""
    entries = [entry for entry in content.get("phase", []) if isinstance(entry, dict)]
    return {split_spec(spec)[0] for entry in entries for spec in entry.get("passes", []) if isinstance(spec, str)}


def _check_keys(table: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in table:
        if key not in known:
            raise UserError(f"unknown key {key!r}", where=where, hint=did_you_mean(key, known))


def _typed(table: Mapping[str, Any], key: str, kind: type, where: str, default: Any) -> Any:
    value = table.get(key, default)
    if value is default or (isinstance(value, kind) and not (kind is int and isinstance(value, bool))):
        return value
    raise UserError(f"{key} is {value!r}, must be a {kind.__name__}", where=where)
