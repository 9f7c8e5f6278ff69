"""Which examples property tests draw."""

from __future__ import annotations

import pytest
from hypothesis import settings


def pytest_configure(config: pytest.Config) -> None:
    """Draw the same examples in every run of ``make test``, so that it fails for what changed.

    ``make test-all`` selects no tests by mark, draws new examples every time, and keeps those that fail.
    """
    settings.register_profile("same-examples", derandomize=True)
    if config.option.markexpr:
        settings.load_profile("same-examples")
