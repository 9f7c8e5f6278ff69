"""Target profiles: what ships is valid, what is wrong is named."""

from __future__ import annotations

import pathlib

import pytest

from mmopt.backends.profile import load_profile, profile_names, read_profile, targets_folder
from mmopt.errors import UserError
from mmopt.runtime.cpu import missing_features, running_features


@pytest.mark.parametrize("name", [n for n in profile_names() if n != "cpu"])
def test_shipped_profiles_are_valid(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert profile.features


def test_native_profile_asks_only_for_what_this_machine_has() -> None:
    profile = load_profile("cpu")
    assert not missing_features(profile.features, running_features())
    assert profile.cores >= 1


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match="znver4"):
        load_profile("znver5")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vector_byte = 32", "vector_bytes"),
        ('vector_bytes = "32"', "must be a int"),
        ("vector_bytes = 24", "16, 32 or 64"),
        ("cores = 0", "positive"),
        ('kind = "cpus"', "cpu"),
        ("vector_bytes = 64", "avx512"),
        ("features = [1]", "list of strings"),
        ("not toml", "cannot read"),
    ],
)
def test_wrong_profiles_are_named(tmp_path: pathlib.Path, text: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_profile(path)
    assert "mine.toml" in str(caught.value)


def test_a_users_file_works_like_a_shipped_one(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "board.toml"
    path.write_text((targets_folder() / "x86-64-v3.toml").read_text())
    assert load_profile(str(path)).vector_bytes == 32
