"""Golden text of every pass of the family: what stands before ``---`` becomes what stands after it.

After a wanted change: ``python -m tests.unit.test_canonicalize_golden`` writes the second halves anew; review the diff.
"""

from __future__ import annotations

import pathlib

import pytest

import mmopt.transforms.canonicalize as family
from mmopt.ir.text import to_text
from mmopt.pipeline.base import Pass
from tests.canonical import check, module_from

FOLDER = pathlib.Path(__file__).parents[1] / "golden"
PASSES: list[Pass] = [getattr(family, name)() for name in family.__all__]
SEPARATOR = "---\n"


def _golden(pass_: Pass) -> pathlib.Path:
    return FOLDER / f"{pass_.name}.txt"


@pytest.mark.parametrize("pass_", PASSES, ids=lambda p: p.name)
def test_golden(pass_: Pass) -> None:
    before, _, after = _golden(pass_).read_text().partition(SEPARATOR)
    module = module_from(before, domains=', "my" : 1' if "my." in before else "")
    check(pass_, module)
    assert to_text(module) == after


def test_every_golden_file_has_its_pass() -> None:
    known = {_golden(pass_).stem for pass_ in PASSES}
    assert known <= {path.stem for path in FOLDER.glob("*.txt")}


if __name__ == "__main__":
    for one in PASSES:
        text, _, _ = _golden(one).read_text().partition(SEPARATOR)
        made = module_from(text, domains=', "my" : 1' if "my." in text else "")
        check(one, made)
        _golden(one).write_text(text + SEPARATOR + to_text(made))
