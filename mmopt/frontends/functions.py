"""Functions of the user, by name: finding them, and saying where their code fails."""

from __future__ import annotations

import importlib
import os
import pathlib
import sys
import traceback
from typing import Any

from mmopt.errors import LoadError, UserError, did_you_mean


def find_function(spec: str) -> Any:
    """The function ``package.module:function``. Importing runs the code of that package.

    The current folder is searched first.

    Raises:
        UserError: ``spec`` has another form, or there is no such module or function.
        LoadError: Importing the module fails.
    """
    module_name, colon, function_name = spec.partition(":")
    if not colon or not module_name or not function_name:
        raise UserError(f"{spec!r} is not of the form package.module:function", hint="for example mymodels.clip:build")
    sys.path.insert(0, os.getcwd())
    try:
        package = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        hint = "the current folder and the Python path are searched"
        raise UserError(f"there is no module {error.name!r}", where=module_name, hint=hint) from error
    except Exception as error:
        raise LoadError(f"importing it failed: {one_line(error)}", where=module_name, hint=user_line(error)) from error
    finally:
        sys.path.remove(os.getcwd())
    function = getattr(package, function_name, None)
    if not callable(function):
        names = [name for name, value in vars(package).items() if callable(value) and not name.startswith("_")]
        raise UserError(f"{module_name} has no function {function_name!r}", hint=did_you_mean(function_name, names))
    return function


def one_line(error: BaseException) -> str:
    """The message of the innermost cause on one line, without torch's closing advice."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = " ".join(str(cause).split("The error above occurred")[0].split())
    return f"{text[:300]}…" if len(text) > 300 else text or type(cause).__name__


def user_line(error: BaseException) -> str:
    """File and line of the innermost frame outside mmopt and installed packages: the line of the user's code."""
    place = ""
    link: BaseException | None = error
    while link is not None:
        for frame in traceback.extract_tb(link.__traceback__):
            if _is_user_code(frame.filename):
                place = f"{frame.filename}:{frame.lineno} ({(frame.line or '').strip()})"
        link = link.__cause__ or link.__context__
    return place


def _is_user_code(filename: str) -> bool:
    path = pathlib.Path(filename)
    installed = {"site-packages", "dist-packages"} & set(path.parts)
    homes = (pathlib.Path(__file__).parents[1], pathlib.Path(os.__file__).parent)
    return path.is_file() and not installed and not any(path.is_relative_to(home) for home in homes)
