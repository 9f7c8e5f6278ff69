"""What kind of data an input carries."""

from __future__ import annotations

import enum


class Modality(str, enum.Enum):
    """Kind of data an input carries. Unknown kinds are spelled ``modality k`` in reports, never guessed."""

    TEXT = "text"
    IMAGE = "image"
    AUDIO = "audio"
    VIDEO = "video"
    TABULAR = "tabular"
    UNKNOWN = "unknown"
