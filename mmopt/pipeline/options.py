"""Options of passes as text: ``name{threshold=0.5,axes=[0,1]}`` to values of the right types and back."""

from __future__ import annotations

import dataclasses
import enum
import pathlib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from mmopt.errors import UserError, did_you_mean
from mmopt.pipeline.base import Pass

_TRUTH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_SEQUENCES = (tuple, list, set, frozenset)


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a pass.

    Attributes:
        name: Name of the dataclass field.
        type: Its type, as written.
        default: The default as text; None when the option must be given.
        doc: Its line under ``Attributes`` in the docstring of the pass.
    """

    name: str
    type: str
    default: str | None
    doc: str


def split_spec(spec: str) -> tuple[str, dict[str, str]]:
    """Split ``name{key=value,…}`` into the name and the options as text.

    Raises:
        UserError: Braces, brackets or quotes do not match, or an option has no value.
    """
    name, brace, rest = spec.partition("{")
    name = name.strip()
    if not name:
        raise UserError("a pass needs a name", where=spec, hint="write name{option=value}")
    if not brace:
        return name, {}
    if not rest.rstrip().endswith("}"):
        raise UserError(
            "the options are not closed", where=spec, hint="write name{option=value} and quote it for the shell"
        )
    options: dict[str, str] = {}
    for item in split_list(rest.rstrip()[:-1], where=spec):
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise UserError(f"option {item!r} has no value", where=spec, hint="write name{option=value,flag=true}")
        if key.strip() in options:
            raise UserError(f"option {key.strip()!r} is given twice", where=spec)
        options[key.strip()] = value.strip()
    return name, options


def split_list(text: str, *, where: str) -> list[str]:
    """Split at commas outside of brackets and quotes.

    Raises:
        UserError: A bracket or quote is not closed.
    """
    items, depth, quote, current = [], 0, "", ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        else:
            depth += (char in "[({") - (char in "])}")
        if char == "," and depth == 0 and not quote:
            items.append(current)
            current = ""
        else:
            current += char
    if depth or quote:
        raise UserError(f"{'a quote' if quote else 'a bracket'} in {text!r} is not closed", where=where)
    return [item.strip() for item in (*items, current) if item.strip()]


def options_of(cls: type[Pass]) -> list[Option]:
    """The options of a pass: its dataclass fields."""
    hints = _hints(cls)
    return [
        Option(field.name, _type_text(hints[field.name]), _default_text(field), _field_doc(cls, field.name))
        for field in dataclasses.fields(cls)
        if field.init
    ]


def build(cls: type[Pass], options: Mapping[str, Any], *, where: str) -> Pass:
    """Make a pass from options given as text or, from TOML, as values.

    Raises:
        UserError: An option is unknown, missing, or cannot be read as its type.
    """
    hints = _hints(cls)
    known = {field.name: field for field in dataclasses.fields(cls) if field.init}
    values: dict[str, Any] = {}
    for key, value in options.items():
        name = key.replace("-", "_")
        if name not in known:
            raise UserError(f"pass {cls.name!r} has no option {key!r}", where=where, hint=did_you_mean(key, known))
        values[name] = convert(value, hints[name], where=f"{where}, option {name}")
    missing = [name for name, field in known.items() if name not in values and _default_text(field) is None]
    if missing:
        hint = f"write {cls.name}{{{missing[0]}=…}}"
        raise UserError(f"pass {cls.name!r} needs option {', '.join(missing)}", where=where, hint=hint)
    try:
        return cls(**values)
    except (ValueError, TypeError) as error:
        raise UserError(f"pass {cls.name!r} refuses its options: {error}", where=where) from error


def convert(value: Any, type_: Any, *, where: str) -> Any:
    """Turn ``value``, text or a TOML value, into an instance of ``type_``.

    Raises:
        UserError: It cannot be read as that type.
    """
    origin, arguments = typing.get_origin(type_), typing.get_args(type_)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, arguments, where)
    if origin is typing.Literal:
        return _convert_choice(value, {str(choice): choice for choice in arguments}, where)
    if origin in _SEQUENCES or type_ in _SEQUENCES:
        return _convert_sequence(value, type_, where)
    if isinstance(type_, enum.EnumMeta):
        return _convert_choice(value, _members(type_), where)
    return _convert_scalar(value, type_, where)


def _convert_scalar(value: Any, type_: Any, where: str) -> Any:
    text = _unquoted(value)
    try:
        if type_ is bool:
            return _TRUTH[str(text).lower()]
        if type_ is int:
            return _whole(text)
        if type_ is float:
            return _real(text)
        if type_ in (str, pathlib.Path):
            return type_(text)
    except (KeyError, ValueError, TypeError):
        raise UserError(f"{value!r} is no {_type_text(type_)}", where=where, hint=_HINTS.get(type_, "")) from None
    raise UserError(f"options of type {_type_text(type_)} cannot be given as text", where=where)


_HINTS: dict[Any, str] = {bool: "write true or false", int: "write a whole number", float: "write a number"}


def _whole(text: Any) -> int:
    if isinstance(text, bool) or (isinstance(text, float) and text != int(text)):
        raise ValueError(text)
    return int(text, 0) if isinstance(text, str) else int(text)


def _real(text: Any) -> float:
    if isinstance(text, bool):
        raise ValueError(text)
    return float(text)


def _convert_union(value: Any, arguments: Sequence[Any], where: str) -> Any:
    if type(None) in arguments and (value is None or str(value).lower() == "none"):
        return None
    errors = []
    for type_ in arguments:
        if type_ is type(None):
            continue
        try:
            return convert(value, type_, where=where)
        except UserError as error:
            errors.append(error)
    raise errors[0]


def _convert_choice(value: Any, choices: Mapping[str, Any], where: str) -> Any:
    text = str(_unquoted(value))
    if text not in choices:
        raise UserError(f"{text!r} is not allowed", where=where, hint=did_you_mean(text, choices))
    return choices[text]


def _convert_sequence(value: Any, type_: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(type_) or type_, typing.get_args(type_)
    if isinstance(value, str):
        text = value.strip()
        value = split_list(text[1:-1] if text[:1] == "[" and text[-1:] == "]" else text, where=where)
    if not isinstance(value, list | tuple):
        raise UserError(f"{value!r} is no list", where=where, hint="write [a,b]")
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
        if len(value) != len(arguments):
            raise UserError(f"needs {len(arguments)} values, got {len(value)}", where=where)
        return tuple(convert(item, kind, where=where) for item, kind in zip(value, arguments, strict=True))
    kind = arguments[0] if arguments else str
    return origin(convert(item, kind, where=where) for item in value)


def _unquoted(value: Any) -> Any:
    if isinstance(value, str) and len(value) >= 2 and value[0] == value[-1] and value[0] in "\"'":
        return value[1:-1]
    return value


def _hints(cls: type[Pass]) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _type_text(type_: Any) -> str:
    if typing.get_origin(type_) is typing.Literal:
        return "|".join(str(choice) for choice in typing.get_args(type_))
    if isinstance(type_, enum.EnumMeta):
        return "|".join(_members(type_))
    return (
        type_.__name__ if isinstance(type_, type) and not typing.get_args(type_) else str(type_).replace("typing.", "")
    )


def _members(type_: Any) -> dict[str, enum.Enum]:
    """Members of an enum by how they are written."""
    return {str(member.value): member for member in type_}


def _default_text(field: dataclasses.Field[Any]) -> str | None:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return None
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return str(value.value if isinstance(value, enum.Enum) else value)


def _field_doc(cls: type[Pass], name: str) -> str:
    match = re.search(rf"^\s+{re.escape(name)}:\s*(.+)$", cls.__doc__ or "", flags=re.MULTILINE)
    return match.group(1).strip() if match else ""
