from __future__ import annotations

import dataclasses
import itertools

import pytest

from mmopt.api import choose_recipe
from mmopt.errors import UserError
from mmopt.pipeline.base import Pass
from mmopt.pipeline.recipe import load_recipe, recipe_folder, recipe_names
from mmopt.pipeline.registry import all_passes

HEAD = "schema_version = 1\n"


@dataclasses.dataclass(frozen=True)
class Own(Pass):
    """A pass of one's own."""

    def run(self, module, context):
        return False


@pytest.fixture
def write(tmp_path):
    def write_(text, name="mine"):
        path = tmp_path / f"{name}.toml"
        path.write_text(text if text.startswith("schema") else HEAD + text)
        return str(path)

    return write_


def names(recipe):
    return [[pass_.name for pass_ in phase.passes] for phase in recipe.phases]


def test_shipped_recipes_load_and_build_on_each_other():
    assert set(recipe_names()) >= {"o0", "o1", "o2"}
    levels = [load_recipe(f"O{level}") for level in (0, 1, 2)]
    for lower, higher in itertools.pairwise(levels):
        assert higher.phases[: len(lower.phases)] == lower.phases
    assert all(recipe.description for recipe in levels)


def test_exact_level_has_every_canonicalization_and_nothing_that_is_not_exact():
    used = {pass_.name for phase in load_recipe("o1").phases for pass_ in phase.passes}
    exact = {name for name, info in all_passes().items() if info.family == "rewrite" and info.fidelity == "exact"}
    canonical = {name for name, info in all_passes().items() if info.family == "canonicalize"}
    assert canonical | exact <= used
    assert {pass_.fidelity.value for phase in load_recipe("o1").phases for pass_ in phase.passes} == {"exact"}


def test_recipe_with_phases_options_and_settings(write):
    path = write("""
        description = "Mine."
        extends = "o0"
        validate = "end"
        strict = true
        [[phase]]
        name = "first"
        max_rounds = 3
        passes = ["fold-constants", "remove-no-ops"]
        [options.fold-constants]
        max_bytes = 77
    """)
    recipe = load_recipe(path)

    assert (recipe.name, recipe.description) == ("mine", "Mine.")
    assert names(recipe) == [["infer-shapes"], ["fold-constants", "remove-no-ops"]]
    assert recipe.phases[1].max_rounds == 3
    assert recipe.phases[1].passes[0].max_bytes == 77
    assert recipe.merged()["validate"] == "end"


def test_precedence_is_command_line_then_recipe_then_defaults(write):
    path = write("""
        validate = "end"
        [[phase]]
        passes = ["fold-constants{max_bytes=5}"]
        [options.fold-constants]
        max_bytes = 6
    """)
    recipe = load_recipe(path)
    assert recipe.phases[0].passes[0].max_bytes == 5
    assert recipe.merged(validate=None, seed=None)["validate"] == "end"
    assert recipe.merged(validate="off")["validate"] == "off"
    assert recipe.merged()["seed"] == 0

    given = load_recipe(path, extra=["fold-constants{max_bytes=9}", "remove-no-ops"])
    assert [pass_.spec() for phase in given.phases for pass_ in phase.passes] == [
        "fold-constants{max_bytes=9}",
        "remove-no-ops",
    ]
    assert given.phases[1].name == "command line"


def test_recipe_extends_another_file_beside_it(write):
    write('[[phase]]\npasses = ["fold-constants"]', name="base")
    path = write('extends = "base.toml"\n[[phase]]\npasses = ["remove-no-ops"]')
    assert names(load_recipe(path)) == [["fold-constants"], ["remove-no-ops"]]


def test_dry_run_describes_what_would_run():
    lines = load_recipe("o1").describe()
    assert lines[0].startswith("recipe o1: ")
    assert any(line.startswith("phase canonicalize-stepwise (up to") for line in lines)
    assert "  infer-shapes  [exact]" in lines


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("valdate = 'each'", "did you mean 'validate'"),
        ("validate = 'sometimes'", "validate is 'sometimes'"),
        ("strict = 'yes'", "strict is 'yes', must be a bool"),
        ("seed = true", "seed is True, must be a int"),
        ("schema_version = 2", "schema_version is 2"),
        ("[[phase]]\npass = []", "did you mean 'passes'"),
        ("[[phase]]\nmax_rounds = 0", "max_rounds is 0"),
        ("[[phase]]\npasses = ['fold-constant']", "did you mean 'fold-constants'"),
        ("[[phase]]\npasses = ['fold-constants{max_byte=1}']", "did you mean 'max_bytes'"),
        ("[[phase]]\npasses = [3]", "3 is no pass"),
        ("phase = [1]", "a phase must be a table"),
        ("[options.fold-constants]\nmax_bytes = 1", "is for no pass here"),
        ("[[phase]]\npasses = ['fold-constants']\n[options.fold-constants]\nmax_bytes = 'many'", "'many' is no int"),
        ("extends = 'nothing'", "there is no recipe 'nothing'"),
        ("x = [", "is no valid TOML"),
    ],
)
def test_mistakes_are_errors_that_name_the_file(write, text, message):
    path = write(text)
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    assert message in str(caught.value)
    if "extends" not in text:
        assert "mine.toml" in str(caught.value)


def test_recipes_that_extend_each_other(write):
    write('extends = "mine.toml"', name="other")
    with pytest.raises(UserError, match="in a circle"):
        load_recipe(write('extends = "other.toml"'))


def test_unknown_names():
    with pytest.raises(UserError, match="there is no recipe 'o9'"):
        load_recipe("o9")
    with pytest.raises(UserError, match="no such recipe file"):
        load_recipe("missing.toml")


def test_recipes_of_a_checkout_are_those_of_the_source_tree():
    assert (recipe_folder() / "o1.toml").is_file()


def test_passes_of_ones_own_run_before_fusion() -> None:
    phases = load_recipe("o2", extra=["tests.unit.test_recipe:Own"]).phases
    names = [phase.name for phase in phases]
    assert names.index("command line") == names.index("fuse") - 1


def test_passes_given_in_python_run_before_fusion() -> None:
    names = [phase.name for phase in choose_recipe(level=2, passes=[Own()]).phases]
    assert names.index("given") == names.index("fuse") - 1
