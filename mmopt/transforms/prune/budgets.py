"""How much is to be cut, as people write it: ``40%``, or by tower: ``towers.vision=30%,towers.text=10%``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from mmopt.errors import UserError, did_you_mean

PREFIX = "towers."


def share(text: str, where: str = "--prune") -> float:
    """``40%`` or ``0.4`` as 0.4.

    Raises:
        UserError: It is no share, or not between 0 and 1.
    """
    number = text.strip().removesuffix("%")
    try:
        value = float(number) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise UserError(f"{text!r} is no share to cut", where=where, hint="write more than 0% and less than 100%: 40%")
    return value


def parse(text: str, where: str = "--prune") -> dict[str | None, float]:
    """Shares by name of the tower; that of the whole model under None.

    Raises:
        UserError: A part has another form, or a tower is named twice.
    """
    found: dict[str | None, float] = {}
    for part in text.split(","):
        name, equals, value = part.strip().rpartition("=")
        if equals and not name.startswith(PREFIX):
            raise UserError(
                f"{part.strip()!r} names no tower", where=where, hint=f"write {PREFIX}NAME={value or '30%'}"
            )
        tower = name.removeprefix(PREFIX) if equals else None
        if tower in found:
            raise UserError(f"{part.strip()!r} is given twice", where=where)
        found[tower] = share(value, where)
    if None in found and len(found) > 1:
        raise UserError("a share of the whole model and shares of towers cannot be met together", where=where,
                        hint="give one or the other")  # fmt: skip
    return found


def check_towers(shares: Mapping[str | None, float], known: Sequence[str], where: str = "--prune") -> None:
    """Refuse towers that the model does not have.

    Raises:
        UserError: There is such a tower.
    """
    for name in shares:
        if name is not None and name not in known:
            raise UserError(f"there is no tower {name!r}", where=where, hint=did_you_mean(name, known))
