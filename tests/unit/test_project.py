"""What is around the code: the wheel, the dependencies, the layers, the Makefile, the README and the pages."""

from __future__ import annotations

import ast
import dataclasses
import email
import importlib
import importlib.metadata
import os
import pathlib
import re
import shlex
import shutil
import stat
import subprocess
import sys
import zipfile
from collections.abc import Iterator

import numpy as np
import pytest
from onnx import helper

from mmopt.backends.profile import Profile, read_profile
from mmopt.cli.main import COMMANDS, run
from mmopt.frontends.torch import load_torch
from mmopt.pipeline.base import PassContext
from mmopt.pipeline.registry import resolve
from mmopt.testing import check_pass
from mmopt.transforms.canonicalize.eliminate_dead_code import EliminateDeadCode
from tests.pass_models import FLOAT, make_module
from tests.small_models import two_layers

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = pathlib.Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SOURCES = sorted((ROOT / "mmopt").rglob("*.py"))
FOLDERS = ("benchmarks", "docs", "passes", "targets", "tests")
ALL_SOURCES = [*SOURCES, *(path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")))]
PAGES = [ROOT / "README.md", *(page for folder in FOLDERS for page in sorted((ROOT / folder).glob("*.md")))]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def distribution(requirement: str) -> str:
    """``onnx_ir>=1`` as ``onnx-ir``, to compare names."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement).group()).lower()  # type: ignore[union-attr]


def imported(path: pathlib.Path) -> Iterator[str]:
    """Top-level names of everything that a file imports absolutely."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(ROOT)], check=True, timeout=120)
    return next(folder.glob("mmopt-*.whl"))


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


class TestWheel:
    def test_holds_the_package_the_recipes_and_the_targets_and_no_other_module(self, wheel):
        names = set(zipfile.ZipFile(wheel).namelist())

        assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"mmopt"}
        assert names >= {path.relative_to(ROOT).as_posix() for path in SOURCES}
        for source, folder in (("passes/recipes", "recipes"), ("targets", "targets")):
            data = {path.name for path in (ROOT / source).glob("*.toml")}
            assert data
            assert {name.rpartition("/")[2] for name in names if f"mmopt/data/{folder}/" in name} >= data

    def test_says_what_it_needs_and_carries_its_licence(self, wheel):
        with zipfile.ZipFile(wheel) as archive:
            metadata = email.message_from_bytes(archive.read(f"mmopt-{PROJECT['version']}.dist-info/METADATA"))
            assert any(name.endswith("/LICENSE") for name in archive.namelist())

        assert metadata["License-Expression"] == "Apache-2.0"
        assert metadata["Requires-Python"] in ("<3.14,>=3.10", ">=3.10,<3.14")
        assert set(metadata.get_all("Provides-Extra")) == {"torch", "cuda", "arm", "bench", "dev", "all"}

    def test_finds_its_recipes_and_targets_where_it_is_installed(self, site, tmp_path):
        script = (
            "import mmopt; print(mmopt.__file__)\n"
            "from mmopt.backends.profile import profile_names; print(*profile_names())\n"
            "from mmopt.cli.main import run; raise SystemExit(run(['passes']))"
        )
        env = {**os.environ, "PYTHONPATH": str(site)}
        done = subprocess.run(
            [sys.executable, "-c", script], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120
        )

        assert done.returncode == 0, done.stderr
        where, profiles, listing = done.stdout.split("\n", 2)
        assert pathlib.Path(where).is_relative_to(site)
        assert set(profiles.split()) == {
            "arm",
            "cpu",
            "cuda",
            *(path.stem for path in (ROOT / "targets").glob("*.toml")),
        }
        for recipe in (ROOT / "passes" / "recipes").glob("*.toml"):
            assert re.search(rf"^{recipe.stem} ", listing, re.M)


# Imported where they are used, and named in an extra.
OPTIONAL = {"onnxscript": "torch", "openvino": "bench", "torch": "torch"}


@pytest.fixture(scope="module")
def used():
    names = {name for path in SOURCES for name in imported(path)} - sys.stdlib_module_names - {"mmopt"}
    providers = importlib.metadata.packages_distributions()
    found = {name: {distribution(provider) for provider in providers.get(name, [name])} for name in names}
    return found


class TestDependencies:
    def test_everything_that_is_imported_is_declared(self, used):
        core = {distribution(requirement) for requirement in PROJECT["dependencies"]}
        for name, providers in used.items():
            if name in OPTIONAL:
                extra = PROJECT["optional-dependencies"][OPTIONAL[name]]
                assert name in map(distribution, extra), name
            elif name != "tomllib":
                assert providers & core, f"{name} is imported and not among the dependencies"

    def test_everything_that_is_declared_is_imported(self, used):
        providers = {provider for found in used.values() for provider in found}
        for requirement in PROJECT["dependencies"]:
            assert distribution(requirement) in providers, f"{requirement} is needed by nothing"

    def test_tvm_and_its_ffi_are_pinned_together(self):
        pins = dict(line.split("==") for line in PROJECT["dependencies"] if line.startswith("apache-tvm"))

        assert pins == {"apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.14.post1"}

    def test_the_package_loads_without_what_is_optional(self):
        script = (
            "import sys, pkgutil, importlib\n"
            "for name in ('onnxscript', 'openvino', 'torch', 'transformers'): sys.modules[name] = None\n"
            "import mmopt\n"
            "names = [m.name for m in pkgutil.walk_packages(mmopt.__path__, 'mmopt.', onerror=print)]\n"
            "for name in names: importlib.import_module(name)\n"
            "for name in mmopt.__all__: getattr(mmopt, name)\n"
            "print(len(names))"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=ROOT)

        assert done.returncode == 0, done.stderr
        assert int(done.stdout) >= len([path for path in SOURCES if path.name != "__init__.py"])


class TestSource:
    def test_nothing_imports_against_the_layers(self):
        pytest.importorskip("importlinter", reason="import-linter is not installed")
        command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()", "--no-cache"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)

        assert done.returncode == 0, done.stdout
        assert re.search(r"[1-9]\d* kept, 0 broken", done.stdout)

    def test_all_of_it_is_python_3_10(self):
        for path in ALL_SOURCES:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), path, feature_version=(3, 10))):
                assert not stars_in_index(node), f"{path}:{node.lineno}: x[*a] needs Python 3.11; x[(*a,)] does not"

    def test_a_star_in_an_index_is_told_from_one_in_parentheses(self):
        found = [stars_in_index(ast.parse(code).body[0].value) for code in ("x[*a, b]", "x[(*a, b)]", "x[a, b]")]

        assert found == [True, False, False]


def stars_in_index(node: ast.AST) -> bool:
    """Whether ``node`` is ``x[*a]``, whose tree differs from that of ``x[(*a,)]`` only by where it begins."""
    if not isinstance(node, ast.Subscript) or not isinstance(node.slice, ast.Tuple):
        return False
    items = node.slice.elts
    return any(isinstance(item, ast.Starred) for item in items) and node.slice.col_offset == items[0].col_offset


class TestMake:
    def make(self, *arguments, cwd=ROOT):
        command = ["make", "--no-print-directory", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=cwd)

    @pytest.fixture
    def clone(self, tmp_path):
        """A copy with an environment whose Python does what the file ``exit`` says."""
        for name in ("Makefile", "pyproject.toml", ".ci/run"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
        python = tmp_path / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text('#!/bin/sh\necho "$@" >> calls\nexit "$(cat exit)"\n')
        python.chmod(0o755)
        (tmp_path / "exit").write_text("0")
        return tmp_path

    def calls(self, clone):
        file = clone / "calls"
        found = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return found

    def test_help_is_the_default_and_lists_every_target(self):
        text = (ROOT / "Makefile").read_text()
        targets = set(re.search(r"^\.PHONY: (.*)$", text, re.M).group(1).split())
        done = self.make()

        assert done.returncode == 0, done.stderr
        assert set(re.findall(r"^  ([a-z-]+) +\S", done.stdout, re.M)) == targets
        assert targets >= {"help", "demo", "test", "test-all", "lint", "bench", "compat", "clean"}

    def test_installs_what_pyproject_says_about_torch(self):
        spec = re.search(r"^TORCH +=\s*(\S+)$", (ROOT / "Makefile").read_text(), re.M).group(1)

        assert spec in PROJECT["optional-dependencies"]["torch"]

    def test_installs_once_and_again_when_pyproject_changes_or_other_extras_are_asked_for(self, clone):
        assert self.make("setup", cwd=clone).returncode == 0
        first = self.calls(clone)
        assert self.make("setup", cwd=clone).returncode == 0
        again = self.calls(clone)
        later = (clone / "pyproject.toml").stat().st_mtime + 100
        os.utime(clone / "pyproject.toml", (later, later))
        assert self.make("setup", cwd=clone).returncode == 0
        changed = self.calls(clone)
        assert self.make("setup", "EXTRAS=dev", cwd=clone).returncode == 0
        others = self.calls(clone)

        extras = re.search(r"^EXTRAS +\?= (\S+)$", (ROOT / "Makefile").read_text(), re.M).group(1)
        assert any(f"--editable .[{extras}]" in call for call in first)
        assert again == []
        assert changed == first
        assert others == [next(call for call in first if "--editable" in call).replace(extras, "dev")]

    def test_says_which_python_it_needs(self, clone):
        done = self.make("setup", "PYTHON=false", cwd=clone)

        assert done.returncode != 0
        assert "Python 3.10 to 3.13" in done.stderr
        assert not list(clone.glob(".venv/.installed*"))

    def test_an_installation_that_fails_is_not_taken_for_one(self, clone):
        (clone / "exit").write_text("1")

        assert self.make("setup", cwd=clone).returncode != 0
        assert not list(clone.glob(".venv/.installed*"))

    @pytest.mark.parametrize("code", [0, 1, 5])
    def test_ci_fails_when_the_tests_fail_or_none_are_found(self, clone, code):
        self.make("setup", cwd=clone)
        self.calls(clone)
        (clone / "exit").write_text(str(code))
        done = subprocess.run([clone / ".ci" / "run"], capture_output=True, text=True, timeout=60, cwd="/")

        assert (done.returncode == 0) == (code == 0)
        assert "-m pytest" in self.calls(clone)[0]

    def test_ci_can_be_executed(self):
        assert (ROOT / ".ci" / "run").stat().st_mode & stat.S_IXUSR


class TestPages:
    @pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
    def test_links_lead_to_files_and_headings_that_exist(self, page):
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"https?:", target):
                continue
            file, _, anchor = target.partition("#")
            linked = page.parent / file if file else page
            assert linked.exists(), f"{page.name} links to {target}"
            if anchor:
                assert anchor in headings(linked), f"{page.name} links to {target}"

    def test_every_page_can_be_found_from_the_index(self):
        index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
        for page in (ROOT / "docs").glob("*.md"):
            assert page.name == "index.md" or f"({page.name})" in index
        assert "(docs/index.md)" in README

    def test_every_command_in_the_readme_is_one(self, capsys):
        fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README.replace("\\\n", " "), re.S | re.M)
        blocks = [text for language, text in fenced if not language]
        commands = [line for block in blocks for line in re.findall(r"^(?:\$ )?mmopt (.+)$", block, re.M)]
        words = [shlex.split(command, comments=True) for command in commands]

        assert {command[0] for command in words} == {*COMMANDS}
        for command in words:
            assert run([command[0], "--help"]) == 0
            known = set(re.findall(r"(?<!\S)-{1,2}[a-zO][a-z-]*", capsys.readouterr().out.replace(",", " ")))
            flags = {match.group() for word in command if (match := re.match(r"-{1,2}[a-zO][a-z-]*", word))}
            assert flags <= known, command

    def test_every_make_target_in_the_readme_exists(self):
        targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M).group(1).split()
        named = set(re.findall(r"\bmake ([a-z][a-z-]*)", README))

        assert {"demo", "test"} <= named <= set(targets)

    def test_the_python_in_the_readme_runs(self, tmp_path, monkeypatch, capsys):
        two_layers(tmp_path / "model.onnx")
        np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).standard_normal((3, 16)).astype(np.float32))
        monkeypatch.chdir(tmp_path)
        names = {}

        exec(self.code("mmopt.compile("), names)

        assert names["outputs"]["y"].shape == (3, 4)
        assert capsys.readouterr().out.startswith("True ")

    @pytest.mark.parametrize("name", ["ReluOnce", "relu_once"])
    def test_the_passes_on_onnx_graphs_in_the_readme_work(self, name, tmp_path):
        (tmp_path / "mine.py").write_text(self.code(f" {name}("))
        nodes = [helper.make_node("Relu", [before], [after], name=after) for before, after in ("xa", "ab", "by")]
        model = make_module(nodes, [("x", FLOAT, ["n", 3])], [("y", FLOAT, ["n", 3])], {})

        checked = check_pass(resolve(f"{tmp_path}/mine.py:{name}"), model)
        EliminateDeadCode().run(checked.module, PassContext())

        assert [node.op_type for node in checked.module.graph] == ["Relu"]

    def test_the_pass_on_torch_graphs_in_the_readme_works(self, tmp_path):
        torch = pytest.importorskip("torch")
        (tmp_path / "mine.py").write_text(self.code(" relu_once_fx("))

        class Twice(torch.nn.Module):
            def forward(self, x):
                return torch.relu(torch.relu(x)) + 1

        example = (torch.randn(2, 3),)
        pass_ = resolve(f"{tmp_path}/mine.py:relu_once_fx")

        rewritten = pass_.run_fx(torch.export.export(Twice(), example).graph_module)
        module = load_torch(Twice(), example, fx_passes=[pass_])

        assert [node.target for node in rewritten.graph.nodes].count(torch.ops.aten.relu.default) == 1
        assert ("relu-once-fx", "applied") in [(remark.source, remark.kind) for remark in module.remarks]

    def code(self, part: str) -> str:
        """The one block of Python in the README that has ``part`` in it."""
        (block,) = (block for block in re.findall(r"```python\n(.*?)```", README, re.S) if part in block)
        return block

    def test_the_profile_in_the_page_on_targets_can_be_read_and_every_key_is_explained(self, tmp_path):
        page = (ROOT / "targets" / "README.md").read_text(encoding="utf-8")
        file = tmp_path / "desktop.toml"
        file.write_text(re.search(r"```toml\n(.*?)```", page, re.S).group(1))

        profile = read_profile(file)

        assert (profile.name, profile.cores, profile.features) == ("desktop", 8, ("avx", "avx2", "fma", "f16c"))
        for field in dataclasses.fields(Profile):
            assert f"`{field.name}`" in page

    @pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("[!_]*.py")), ids=lambda path: path.stem)
    def test_every_script_can_be_imported(self, path):
        try:
            importlib.import_module(f"benchmarks.{path.stem}")
        except ModuleNotFoundError as error:
            if (error.name or "").startswith(("benchmarks", "mmopt")):
                raise
            pytest.skip(f"{error.name} is not installed")

    def test_every_script_is_in_the_page_on_benchmarks(self):
        page = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
        for path in (ROOT / "benchmarks").glob("[!_]*.py"):
            assert f"`python -m benchmarks.{path.stem}" in page


def headings(page: pathlib.Path) -> set[str]:
    """Anchors of a page, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
