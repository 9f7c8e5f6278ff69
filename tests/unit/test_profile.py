"""Target profiles: what ships is valid, what is wrong is named."""

from __future__ import annotations

import pathlib

import pytest

from mmopt.backends.features import llvm_switches
from mmopt.backends.profile import ALIASES, load_profile, profile_names, read_profile, targets_folder
from mmopt.errors import UserError
from mmopt.runtime.cpu import missing_features, running_features


@pytest.mark.parametrize("name", [n for n in profile_names() if n not in ("cpu", "cuda")])
def test_shipped_profiles_are_valid(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == ALIASES.get(name, name)
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


ARM = 'kind = "arm"\ntriple = "aarch64-linux-gnu"\nvector_bytes = 16\n'


@pytest.mark.parametrize(
    ("text", "message", "nearest"),
    [
        (ARM + 'features = ["fp", "asimd", "dotprod"]', "unknown feature 'dotprod'", "asimddp"),
        (ARM + 'features = ["fp", "asimd", "asimdrm"]', "unknown feature 'asimdrm'", "asimdrdm"),
        (ARM + 'features = ["fp", "asimd", "asimdhp"]', "asimdhp without fphp", "add 'fphp'"),
        (ARM + 'features = ["asimd"]', "asimd without fp", "add 'fp'"),
        (ARM.replace("16", "32") + 'features = ["fp", "asimd"]', "vector_bytes must be 16, not 32", "try 16"),
        (ARM.replace("aarch64", "x86_64"), "not of kind 'arm'", "aarch64-linux-gnu"),
        ('features = ["avx", "avx2", "avx_vni"]', "unknown feature 'avx_vni'", "avx_vnni"),
        ('features = ["avx512_vnni"]', "avx512_vnni without avx512bw", "add 'avx512bw'"),
        ('features = ["avx", "avx2", "amx_int8"]', "amx_int8 without amx_tile", "amx_tile"),
        ('triple = "aarch64-linux-gnu"', "not of kind 'cpu'", "x86_64-linux-gnu"),
    ],
)
def test_what_no_processor_is_gets_the_nearest_valid_one(
    tmp_path: pathlib.Path, text: str, message: str, nearest: str
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_profile(path)
    assert nearest in caught.value.hint


def test_arm_code_uses_what_is_listed_whatever_the_processor_has() -> None:
    switches = llvm_switches("arm", ("fp", "asimd", "asimddp"))
    assert {"+dotprod", "-fullfp16", "-lse", "-sve"} <= set(switches)
    assert llvm_switches("cpu", ("avx2",)) == []


def test_a_users_file_works_like_a_shipped_one(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "board.toml"
    path.write_text((targets_folder() / "x86-64-v3.toml").read_text())
    assert load_profile(str(path)).vector_bytes == 32
