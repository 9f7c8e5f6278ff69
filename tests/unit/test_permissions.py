"""Asking the system for AMX tiles: granted, refused, not asked for."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from mmopt.runtime.cpu import request_permissions, running_features

AMX = pytest.mark.skipif("amxtile" not in running_features(), reason="this machine has no AMX")

REFUSED = """
import ctypes, struct
libc = ctypes.CDLL(None, use_errno=True)
# A filter of system calls: arch_prctl (158) fails with EPERM (1), everything else is allowed.
code = [(0x20, 0, 0, 0), (0x15, 0, 1, 158), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000)]
program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *c) for c in code))
header = struct.pack("HxxxxxxP", len(code), ctypes.addressof(program))
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.c_char_p(header), 0, 0) == 0
from mmopt.errors import UnsupportedError
from mmopt.runtime.cpu import check_target
target = {"name": "wide", "triple": "x86_64-linux-gnu", "features": FEATURES}
try:
    check_target(target, where="model.mmopt")
except UnsupportedError as error:
    print(error)
"""


def refused(features: list[str]) -> str:
    """What a process says that may not use AMX."""
    command = [sys.executable, "-c", REFUSED.replace("FEATURES", repr(features))]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@AMX
def test_permission_is_granted_more_than_once() -> None:
    for _ in range(2):
        request_permissions(["avx2", "amx_tile"], where="here")


@AMX
@pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers of system calls are those of x86-64")
def test_a_refusal_names_artifact_reason_and_way_out() -> None:
    text = refused(["avx2", "amx_tile", "amx_int8"])
    assert "AMX" in text
    assert "Operation not permitted" in text
    assert "model.mmopt" in text
    assert "--target" in text


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="needs Linux on x86-64")
def test_nobody_is_asked_for_what_is_not_needed() -> None:
    assert refused(["sse4_2"]) == ""
