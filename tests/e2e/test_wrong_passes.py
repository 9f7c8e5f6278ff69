"""Deliberately wrong passes: every one is caught, rolled back and named, and what was there stays bit-identical."""

from __future__ import annotations

import dataclasses

import pytest

from mmopt.errors import PassError
from mmopt.ir.module import Module
from mmopt.pipeline.base import Pass, PassContext
from mmopt.pipeline.manager import PassManager
from tests.pass_models import serialized
from tests.wrong_passes import WRONG, WrongPass


@dataclasses.dataclass(frozen=True)
class LabelModel(Pass):
    """A right pass: writes a line into the model's documentation."""

    text: str = "seen"

    def run(self, module: Module, context: PassContext) -> bool:
        if module.model.doc_string == self.text:
            return False
        module.model.doc_string = self.text
        return True


def test_there_are_forty_at_least():
    assert len(WRONG) >= 40
    assert len({wrong.name for wrong in WRONG}) == len(WRONG)


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.name)
def test_wrong_pass_is_caught_named_and_rolled_back(wrong: WrongPass):
    module = wrong.model()
    before = serialized(module)

    report = PassManager([wrong.make()], threads=1).run(module)

    assert [record.name for record in report.failed] == [wrong.name]
    assert wrong.reason in report.failed[0].reason
    assert serialized(module) == before
    assert any(remark.source == wrong.name and "rolled back" in remark.message for remark in module.remarks)


@pytest.mark.parametrize("wrong", WRONG[::7], ids=lambda wrong: wrong.name)
def test_passes_around_a_wrong_one_are_kept(wrong: WrongPass):
    module, expected = wrong.model(), wrong.model()
    expected.model.doc_string = "after"

    report = PassManager([LabelModel("before"), wrong.make(), LabelModel("after")], threads=1).run(module)

    assert [record.status for record in report.passes] == ["applied", "failed", "applied"]
    assert serialized(module) == serialized(expected)


@pytest.mark.parametrize("wrong", WRONG[::7], ids=lambda wrong: wrong.name)
def test_strict_run_raises_and_names_the_pass(wrong: WrongPass):
    module = wrong.model()
    before = serialized(module)

    with pytest.raises(PassError, match=wrong.name):
        PassManager([wrong.make()], strict=True, threads=1).run(module)

    assert serialized(module) == before


@pytest.mark.parametrize("wrong", [wrong for wrong in WRONG if wrong.reason.startswith(("output", "no longer"))][::4])
def test_validation_at_the_end_still_names_the_guilty_pass(wrong: WrongPass):
    module = wrong.model()

    report = PassManager([LabelModel("a"), wrong.make(), LabelModel("b")], validate="end", threads=1).run(module)

    assert [record.name for record in report.failed] == [wrong.name]
    assert module.model.doc_string == "b"
    assert any("each pass was checked instead" in note for note in report.notes)
