"""Instructions that kernels execute on Arm processors, counted under emulation, beside the fewest that could do it.

The kernel of a layer, with its bias and activation, is called by a small program under QEMU on one thread, once and
three times: half of the difference is what a call takes. The ideal is one instruction for as many multiply-adds as the
target's instruction does, and nothing else.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.arm import compiled, kernel_of, parser_for
from benchmarks.zoo.layers import MODELS, Layer
from mmopt.backends.cpu.dot import dot_for
from mmopt.backends.linking import Zig, run_zig
from mmopt.backends.profile import Profile, load_profile
from mmopt.backends.runner import build_runner
from mmopt.bench.render import Sheet
from mmopt.errors import MmoptError, UserError

SCHEMA_VERSION = 1
PROCESSORS = {"neoverse-v1": "max,sve=off", "armv8.0": "cortex-a53", "armv8.2": "cortex-a76"}
"""QEMU's name of the processor for a target, where it is not the same."""

DRIVER = pathlib.Path(__file__).parent.parent / "tests" / "arm" / "kernel_driver.cc"
"""The program that calls kernels."""

SYSTEM = "/usr/aarch64-linux-gnu"
MOST = 1.25
"""Instructions for each of the ideal at most, in the mean over layers."""


@dataclasses.dataclass(frozen=True)
class Emulator:
    """QEMU with the counting plugin, and the program that calls kernels.

    Attributes:
        folder: Where they were built.
        plugin: The plugin.
    """

    folder: pathlib.Path
    plugin: pathlib.Path

    @classmethod
    def built(cls, folder: pathlib.Path) -> Emulator:
        """Build what is needed in ``folder``.

        Raises:
            UserError: QEMU is not installed.
        """
        build_runner(load_profile("armv8.0"), folder, main=DRIVER)
        plugin = folder / "libinstructions.so"
        source = pathlib.Path(__file__).with_name("instructions.c")
        version = f"-DPLUGIN_VERSION={1 if _version() < 9 else 2}"
        run_zig("cc", "-O2", "-shared", "-fPIC", version, str(source), "-o", str(plugin))
        return cls(folder, plugin)

    def count(self, target: str, *arguments: str) -> int:
        """Instructions of a whole run of the program with ``arguments``.

        Raises:
            MmoptError: The emulated program failed.
        """
        made = self.folder / "count.txt"
        made.unlink(missing_ok=True)
        command = [_qemu(), "-cpu", PROCESSORS.get(target, target), "-L", SYSTEM]
        command += ["-plugin", f"{self.plugin},out={made}", str(self.folder / DRIVER.stem), *arguments]
        one = {**os.environ, "TVM_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=one)
        if done.returncode or not made.exists():
            raise MmoptError(f"the emulated program failed: {done.stderr.strip()[:500]}", where=target)
        return int(made.read_text())


def _qemu() -> str:
    if found := shutil.which("qemu-aarch64"):
        return found
    raise UserError("qemu-aarch64 is not installed", hint="Debian: apt install qemu-user libstdc++6-arm64-cross")


def _version() -> int:
    """QEMU's major version, which decides what its plugins have to say they were made for."""
    text = subprocess.run([_qemu(), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"version (\d+)", text)
    return int(found[1]) if found else 0


def executed(emulator: Emulator, layer: Layer, precision: str, target: str) -> int:
    """Instructions of one call of a layer's kernel."""
    profile = load_profile(target)
    _, code = kernel_of(layer, precision, profile)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        compiled(code, profile).export_library(str(folder / "kernel.so"), fcompile=Zig(profile))
        roles = ["out" if argument["role"] == "output" else "in" for argument in code.arguments]
        for n, (role, argument) in enumerate(zip(roles, code.arguments, strict=True)):
            np.save(folder / f"0.{role}{roles[:n].count(role)}.npy", np.ones(argument["shape"], argument["dtype"]))
        (folder / "cases.txt").write_text(f"kernel {roles.count('in')} 0 {roles.count('out')}\n")
        once, more = (emulator.count(target, str(folder / "kernel.so"), name, str(times)) for times in (1, 3))
    return (more - once) // 2


def multiplied_at_once(profile: Profile, precision: str) -> int:
    """Multiply-adds of one instruction."""
    kind = ("uint8", "int8") if precision == "int8" else ("float32", "float32")
    dot = dot_for(profile, *kind)
    if dot is None:
        raise MmoptError(f"{profile.name} does not multiply {precision}")
    return dot.lanes * dot.group


def examine(
    models: Sequence[str], targets: Sequence[str], precisions: Sequence[str], limit: int | None = None
) -> Iterator[dict[str, Any]]:
    """One record a layer, target and precision; of each model the first ``limit`` layers."""
    layers = {layer.label: layer for model in models for layer in MODELS[model][:limit]}
    with tempfile.TemporaryDirectory() as name:
        emulator = Emulator.built(pathlib.Path(name))
        for target in targets:
            for precision in precisions:
                for layer in layers.values():
                    ideal = layer.operations / 2 / multiplied_at_once(load_profile(target), precision)
                    count = executed(emulator, layer, precision, target)
                    yield {
                        "target": target,
                        "precision": precision,
                        "layer": layer.label,
                        "instructions": count,
                        "ideal": int(ideal),
                        "ratio": count / ideal,
                    }


def summary(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means of each target and precision."""
    groups = dict.fromkeys((record["target"], record["precision"]) for record in records)
    ratios = {key: [r["ratio"] for r in records if (r["target"], r["precision"]) == key] for key in groups}
    return [{"target": t, "precision": p, "ratio": sum(found) / len(found)} for (t, p), found in ratios.items()]


def sheets(records: Sequence[dict[str, Any]]) -> Iterator[Sheet]:
    """A table for each target and precision."""
    for mean in summary(records):
        key = (mean["target"], mean["precision"])
        mine = [r for r in records if (r["target"], r["precision"]) == key]
        rows = [[r["layer"], f"{r['instructions']:,}", f"{r['ideal']:,}", f"{r['ratio']:.2f}"] for r in mine]
        rows.append(["mean", "", "", f"{mean['ratio']:.2f}"])
        yield Sheet(", ".join(key), ("layer", "instructions", "ideal", "of one"), rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables. Gives 7 when a mean is above :data:`MOST`."""
    options = parser_for("arm_counts", __doc__, ("fp32", "int8")).parse_args(arguments)
    out = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    try:
        models, targets, precisions = (
            words.split(",") for words in (options.models, options.targets, options.precision)
        )
        records = list(examine(models, targets, precisions, options.limit))
    except MmoptError as error:
        out.print(f"error: {error}", markup=False)
        return error.exit_code
    for sheet in sheets(records):
        out.print(sheet.title)
        out.print(sheet.rich())
    if options.json:
        text = json.dumps({"schema_version": SCHEMA_VERSION, "means": summary(records), "layers": records}, indent=2)
        options.json.write_text(text + "\n", encoding="utf-8")
    missed = [m for m in summary(records) if m["ratio"] > MOST]
    for mean in missed:
        out.print(f"MISSED: {mean['target']} {mean['precision']}: {mean['ratio']:.2f}")
    return 7 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
