"""No kernel touches memory beyond the end of an array: each runs right before a page that cannot be touched."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.guarded_kernels import OPERATORS
from tests.kernels import PROFILES, WIDEST
from tests.unit.test_narrow_products import levels


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.guarded_kernels", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("profile", PROFILES)
def test_kernels_stay_within_their_arrays(profile: str) -> None:
    done = run(profile)
    last = done.stdout.splitlines()[-1:]
    assert done.returncode == 0, f"ended with {done.returncode} at {last}\n{done.stderr[-2000:]}"


@pytest.mark.parametrize("profile", PROFILES)
def test_operators_stay_within_their_arrays(profile: str) -> None:
    done = run(profile, "operators")
    last = done.stdout.splitlines()[-1:]
    assert done.returncode == 0, f"ended with {done.returncode} at {last}\n{done.stderr[-2000:]}"
    assert len(done.stdout.splitlines()) == len(OPERATORS)


@pytest.mark.parametrize("level", levels())
def test_products_in_narrow_numbers_stay_within_their_arrays(level: str) -> None:
    done = run(level, "narrow")
    last = done.stdout.splitlines()[-1:]
    assert done.returncode == 0, f"ended with {done.returncode} at {last}\n{done.stderr[-2000:]}"


def test_reading_beyond_an_end_is_found() -> None:
    done = run(WIDEST, "beyond")
    assert done.returncode < 0
    assert done.stdout.splitlines() == ["beyond"]
