"""A package outside of mmopt that brings a pass."""

from __future__ import annotations

import dataclasses

from mmopt import Module, Pass, PassContext


@dataclasses.dataclass(frozen=True)
class StampModel(Pass):
    """Writes a stamp into the model's metadata.

    Attributes:
        text: The stamp.
    """

    text: str = "stamped"

    def run(self, module: Module, context: PassContext) -> bool:
        if module.model.metadata_props.get("stamp") == self.text:
            return False
        module.model.metadata_props["stamp"] = self.text
        return True
