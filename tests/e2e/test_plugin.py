"""A package installed by pip adds a pass by its entry point."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys

import onnx_ir as ir
import pytest

from tests.pass_models import fused_model

PACKAGE = pathlib.Path(__file__).parents[1] / "plugin_example"

SCRIPT = """
import json, sys
import onnx_ir as ir
from mmopt.ir.module import Module
from mmopt.pipeline.manager import PassManager
from mmopt.pipeline.registry import all_passes, resolve

module = Module(ir.load(sys.argv[1]))
report = PassManager([resolve("stamp-model{text=by the plug-in}")], strict=True, threads=1).run(module)
info = all_passes()["stamp-model"].to_dict()
print(json.dumps({"info": info, "status": report.passes[0].status, "stamp": module.model.metadata_props["stamp"]}))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("setuptools", reason="the example package is built with setuptools, which is not installed")
    folder = tmp_path_factory.mktemp("plugin")
    source = shutil.copytree(PACKAGE, folder / "source")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*command, "--target", str(folder / "site"), str(source)], check=True, timeout=120)
    return folder / "site"


def test_installed_package_adds_a_pass(site, tmp_path):
    model = tmp_path / "model.onnx"
    ir.save(fused_model().model, model)
    paths = [str(site), str(pathlib.Path(__file__).parents[2])]

    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(model)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["status"] == "applied"
    assert result["stamp"] == "by the plug-in"
    assert result["info"]["source"] == "mmopt-plugin-example"
    assert result["info"]["options"] == [{"name": "text", "type": "str", "default": "stamped", "doc": "The stamp."}]


def test_without_the_package_the_name_is_unknown():
    from mmopt.errors import UserError
    from mmopt.pipeline.registry import resolve

    with pytest.raises(UserError, match="no pass 'stamp-model'"):
        resolve("stamp-model")
