from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from mmopt.ir.module import Module
from mmopt.pipeline.base import Pass, PassContext
from mmopt.testing import check_pass
from tests.pass_models import fused_model, serialized, text_image_model
from tests.wrong_passes import WRONG


@dataclasses.dataclass(frozen=True)
class Stamp(Pass):
    count: int = 1
    state: list[int] = dataclasses.field(default_factory=list)
    repeat: bool = False
    vary: bool = False

    def run(self, module: Module, context: PassContext) -> bool:
        number = len(module.model.doc_string or "")
        if number >= self.count and not self.repeat:
            return False
        self.state.append(0)
        module.model.doc_string = "x" * (number + 1) + (str(len(self.state)) if self.vary else "")
        self.remark(context, "applied", "", "Stamped the model.")
        return True


def test_right_pass_passes_and_the_module_stays():
    module = text_image_model()
    before = serialized(module)
    checked = check_pass(Stamp(), module)

    assert checked.module.model.doc_string == "x"
    assert [remark.message for remark in checked.record.remarks] == ["Stamped the model."]
    assert serialized(module) == before


def test_pass_that_must_not_fire():
    done = check_pass(Stamp(), text_image_model()).module
    check_pass(Stamp(), done, fires=False)
    with pytest.raises(AssertionError, match="should change this module, but left it alone"):
        check_pass(Stamp(), done)
    with pytest.raises(AssertionError, match=r"must leave this module alone, but changed it \(: Stamped"):
        check_pass(Stamp(), text_image_model(), fires=False)


def test_pass_that_is_not_idempotent():
    with pytest.raises(AssertionError, match="stamp is not idempotent"):
        check_pass(Stamp(count=2), text_image_model())


def test_pass_that_depends_on_more_than_the_module():
    with pytest.raises(AssertionError, match="gives another result every time"):
        check_pass(Stamp(vary=True), text_image_model())


@pytest.mark.parametrize("wrong", WRONG[::6], ids=lambda wrong: wrong.name)
def test_wrong_pass_is_an_assertion_error_with_its_reason(wrong):
    with pytest.raises(AssertionError) as caught:
        check_pass(wrong.make(), wrong.model())
    assert wrong.reason in str(caught.value)


def test_given_inputs_are_used():
    check_pass(Stamp(), fused_model(), inputs={"x": np.ones((1, 4), np.float32)})
