"""Where passes come from: built in, from installed packages, or from a file or module that the user names."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import pathlib
import pkgutil
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

from mmopt.errors import UserError, did_you_mean
from mmopt.pipeline.base import Pass
from mmopt.pipeline.options import Option, build, options_of, split_spec

ENTRY_POINT_GROUP = "mmopt.passes"
BUILT_IN = "built-in"


@dataclasses.dataclass(frozen=True)
class PassInfo:
    """One known pass.

    Attributes:
        name: Kebab-case name.
        cls: Its class.
        source: ``built-in``, or the package that brings it.
        family: Family of a built-in pass (``canonicalize``, ``fuse``, …), else "".
        doc: First line of its docstring.
        fidelity: ``exact``, ``rounding`` or ``lossy``.
        options: Its options.
    """

    name: str
    cls: type[Pass]
    source: str
    family: str
    doc: str
    fidelity: str
    options: tuple[Option, ...]

    def to_dict(self) -> dict[str, Any]:
        """The pass as JSON-ready values."""
        values = {key: getattr(self, key) for key in ("name", "source", "family", "doc", "fidelity")}
        return {**values, "options": [dataclasses.asdict(option) for option in self.options]}


def all_passes() -> dict[str, PassInfo]:
    """Every built-in pass and every pass of an installed package, by name.

    A built-in pass cannot be replaced by a package: names of passes in reports must mean one thing.

    Raises:
        UserError: A package's pass does not load, or takes a name that is taken.
    """
    found = dict(_built_in())
    for entry in sorted(importlib.metadata.entry_points(group=ENTRY_POINT_GROUP), key=lambda entry: entry.name):
        info = _from_entry_point(entry)
        if info.name in found:
            raise UserError(
                f"pass {info.name!r} of package {info.source} has the name of a pass of {found[info.name].source}",
                where=f"entry point {entry.name}",
                hint="rename one of them, or uninstall the package",
            )
        found[info.name] = info
    return found


def resolve(spec: str, *, defaults: Mapping[str, Any] | None = None) -> Pass:
    """Make the pass that ``spec`` names.

    Args:
        spec: ``name``, ``package.module:Class`` or ``path/to/file.py:Class``, each with options or without:
            ``name{threshold=0.5,flag=true}``.
        defaults: Options that hold where ``spec`` does not give them.

    Raises:
        UserError: There is no such pass, or an option is wrong.
    """
    name, options = split_spec(spec)
    return build(find(name), {**(defaults or {}), **options}, where=f"pass {name}")


def find(name: str) -> type[Pass]:
    """The class that ``name`` stands for: a known pass, ``module:Class`` or ``file.py:Class``.

    Raises:
        UserError: There is no such pass.
    """
    if ":" in name:
        return _from_location(name)
    # Built-in names first: they must work even when some installed package's pass does not load.
    if name in _built_in():
        return _built_in()[name].cls
    known = all_passes()
    if name not in known:
        raise UserError(f"there is no pass {name!r}", hint=did_you_mean(name, known))
    return known[name].cls


def describe(cls: type[Pass], source: str, family: str = "") -> PassInfo:
    """What ``mmopt passes`` shows of a pass."""
    doc = (inspect.getdoc(cls) or "").strip().splitlines()
    return PassInfo(cls.name, cls, source, family, doc[0] if doc else "", cls.fidelity.value, tuple(options_of(cls)))


@functools.cache
def _built_in() -> Mapping[str, PassInfo]:
    found: dict[str, PassInfo] = {}
    # By name: transforms build on the pipeline, so the pipeline must not import them up front.
    for module in _modules(importlib.import_module("mmopt.transforms")):
        family = module.__name__.split(".")[2]
        for cls in _passes_in(module):
            if cls.name in found:
                raise RuntimeError(f"two built-in passes are named {cls.name!r}: {found[cls.name].cls} and {cls}")
            found[cls.name] = describe(cls, BUILT_IN, family)
    return types.MappingProxyType(dict(sorted(found.items())))


def _modules(package: types.ModuleType) -> Iterator[types.ModuleType]:
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if not info.ispkg:
            yield importlib.import_module(info.name)


def _passes_in(module: types.ModuleType) -> Iterator[type[Pass]]:
    """The passes that ``module`` itself defines; bases that others build on are abstract or start with "_"."""
    for value in vars(module).values():
        if _is_pass(value) and value.__module__ == module.__name__ and not value.__name__.startswith("_"):
            yield value


def _is_pass(value: object) -> bool:
    if isinstance(value, types.GenericAlias):  # Python 3.10 takes list[int] for a class, until issubclass does not
        return False
    return isinstance(value, type) and issubclass(value, Pass) and not inspect.isabstract(value)


def _from_entry_point(entry: importlib.metadata.EntryPoint) -> PassInfo:
    source = entry.dist.name if entry.dist is not None else "unknown package"
    try:
        value = entry.load()
    except Exception as error:  # foreign code, imported: anything can be raised
        raise UserError(
            f"pass {entry.name!r} of package {source} does not load: {type(error).__name__}: {error}",
            where=entry.value,
            hint="update or uninstall the package",
        ) from error
    return describe(_require_pass(value, entry.value), source)


def _from_location(location: str) -> type[Pass]:
    """``file.py:Class`` or ``package.module:Class``. Runs the module's code, as the user asked by naming it."""
    place, _, attribute = location.rpartition(":")
    try:
        module = _load_file(pathlib.Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except UserError:
        raise
    except Exception as error:  # the user's code: anything can be raised
        raise UserError(
            f"cannot import {place!r}: {type(error).__name__}: {error}",
            where=location,
            hint="write package.module:Class or path/to/file.py:Class",
        ) from error
    if not hasattr(module, attribute):
        passes = [name for name, value in vars(module).items() if _is_pass(value)]
        raise UserError(f"{place} has no {attribute!r}", where=location, hint=did_you_mean(attribute, passes))
    return _require_pass(getattr(module, attribute), location)


def _load_file(path: pathlib.Path) -> types.ModuleType:
    if not path.is_file():
        raise UserError("there is no such file", where=str(path), hint="write path/to/file.py:Class")
    # One module object for a file however often it is named, so that its classes stay the same.
    name = f"mmopt_pass_file_{path.resolve()}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError("is no Python file", where=str(path))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _require_pass(value: object, where: str) -> type[Pass]:
    if not _is_pass(value):
        raise UserError(
            f"is no pass but a {type(value).__name__}",
            where=where,
            hint="a pass is a frozen dataclass derived from mmopt.Pass, or a function with one of the pass decorators",
        )
    assert isinstance(value, type)  # narrows the type for the checker; _is_pass has looked
    return value
