from __future__ import annotations

import dataclasses
import enum
import importlib.metadata
import pathlib
import textwrap
from typing import Literal

import pytest

from mmopt.errors import UserError
from mmopt.ir.module import Module
from mmopt.pipeline import registry
from mmopt.pipeline.base import Fidelity, Pass, PassContext, kebab_case
from mmopt.pipeline.options import build, convert, options_of, split_spec
from mmopt.pipeline.registry import all_passes, find, resolve


class Mode(enum.Enum):
    FAST = "fast"
    SAFE = "safe"


@dataclasses.dataclass(frozen=True)
class AllKinds(Pass):
    """Does nothing, with every kind of option.

    Attributes:
        rate: How much.
    """

    rate: float = 0.5
    count: int = 3
    flag: bool = False
    label: str = "x"
    mode: Mode = Mode.SAFE
    kind: Literal["a", "b"] = "a"
    limit: int | None = None
    axes: tuple[int, ...] = ()
    pair: tuple[int, float] = (1, 2.0)
    names: list[str] = dataclasses.field(default_factory=list)
    place: pathlib.Path = pathlib.Path()

    def run(self, module: Module, context: PassContext) -> bool:
        return False


@dataclasses.dataclass(frozen=True)
class NeedsRate(Pass):
    rate: float

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ValueError("rate must not be negative")

    def run(self, module: Module, context: PassContext) -> bool:
        return False


HERE = f"{__file__}:AllKinds"


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("rate=2", "rate", 2.0),
        ("rate=1e-3", "rate", 1e-3),
        ("count=0x10", "count", 16),
        ("flag=true", "flag", True),
        ("flag=no", "flag", False),
        ('label="a,b{c}"', "label", "a,b{c}"),
        ("label=it", "label", "it"),
        ("mode=fast", "mode", "fast"),
        ("kind=b", "kind", "b"),
        ("limit=7", "limit", 7),
        ("limit=none", "limit", None),
        ("axes=[0,-1]", "axes", (0, -1)),
        ("axes=[]", "axes", ()),
        ("pair=[4,5]", "pair", (4, 5.0)),
        ("names=[a,'b,c']", "names", ["a", "b,c"]),
        ("place=/tmp/x", "place", pathlib.Path("/tmp/x")),
    ],
)
def test_options_become_values_of_their_types(text, field, value):
    pass_ = resolve(f"{HERE}{{{text}}}")
    got = getattr(pass_, field)

    assert (got.value if isinstance(got, enum.Enum) else got) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rate=fast", "'fast' is no float"),
        ("count=1.5", "'1.5' is no int"),
        ("flag=maybe", "write true or false"),
        ("mode=quick", "known: fast, safe"),
        ("kind=c", "'c' is not allowed"),
        ("limit=x", "is no int"),
        ("pair=[1]", "needs 2 values, got 1"),
        ("rat=1", "did you mean 'rate'"),
        ("rate", "has no value"),
        ("rate=1,rate=2", "given twice"),
        ("label='x", "a quote in"),
        ("axes=[1", "a bracket in"),
    ],
)
def test_wrong_options_say_what_is_wrong(text, message):
    with pytest.raises(UserError) as caught:
        resolve(f"{HERE}{{{text}}}")
    assert message in str(caught.value)


def test_missing_and_refused_options():
    with pytest.raises(UserError, match=r"needs option rate\n  write needs-rate\{rate=…\}"):
        resolve(f"{__file__}:NeedsRate")
    with pytest.raises(UserError, match="refuses its options: rate must not be negative"):
        resolve(f"{__file__}:NeedsRate{{rate=-1}}")


@pytest.mark.parametrize("spec", ["", "{a=1}", "name{a=1", "name{a=1}x"])
def test_broken_specs(spec):
    with pytest.raises(UserError):
        split_spec(spec)


def test_spec_of_a_pass_reads_back():
    pass_ = AllKinds(rate=0.25, flag=True, label="a b", mode=Mode.FAST, axes=(1, 2), limit=4)
    name, options = split_spec(pass_.spec())

    assert name == "all-kinds"
    assert build(AllKinds, options, where="") == pass_
    assert AllKinds().spec() == "all-kinds"


def test_toml_values_are_converted_strictly():
    assert convert([1, 2], tuple[int, ...], where="") == (1, 2)
    assert convert(3, float, where="") == 3.0
    for value, kind in ((True, int), (True, float), (1.5, int), ("x", bool), (3, list[int])):
        with pytest.raises(UserError):
            convert(value, kind, where="")


def test_options_are_described():
    options = {option.name: option for option in options_of(AllKinds)}
    assert options["rate"] == dataclasses.replace(options["rate"], type="float", default="0.5", doc="How much.")
    assert options["mode"].type == "fast|safe"
    assert options["kind"].type == "a|b"
    assert options["limit"].default == "none"
    assert options_of(NeedsRate)[0].default is None


def test_built_in_passes_are_found_named_and_documented():
    known = all_passes()
    assert len(known) >= 8
    for name, info in known.items():
        stem = info.cls.__module__.rsplit(".", 1)[1]
        assert name == info.cls.name == kebab_case(stem), name
        assert info.doc, f"{name} has no docstring"
        assert info.fidelity in {fidelity.value for fidelity in Fidelity}
        assert resolve(name) == info.cls()
        assert info.to_dict()["family"]


def test_unknown_pass_suggests_the_nearest():
    with pytest.raises(UserError, match="did you mean 'fold-constants'"):
        resolve("fold-constant")


def test_pass_in_a_module_and_in_a_file(tmp_path, monkeypatch):
    source = textwrap.dedent("""
        import dataclasses
        from mmopt import Pass
        @dataclasses.dataclass(frozen=True)
        class Mine(Pass):
            rate: float = 1.0
            def run(self, module, context):
                return False
        not_a_pass = 3
    """)
    (tmp_path / "mine_module.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)

    assert resolve("mine_module:Mine{rate=2}").rate == 2
    by_file = find(f"{tmp_path}/mine_module.py:Mine")
    assert by_file is find(f"{tmp_path}/mine_module.py:Mine")
    assert by_file.name == "mine"
    with pytest.raises(UserError, match="did you mean 'Mine'"):
        resolve("mine_module:Mina")
    with pytest.raises(UserError, match="is no pass but a int"):
        resolve("mine_module:not_a_pass")
    with pytest.raises(UserError, match="no such file"):
        resolve(f"{tmp_path}/missing.py:Mine")
    with pytest.raises(UserError, match="cannot import 'missing_module'"):
        resolve("missing_module:Mine")
    (tmp_path / "broken.py").write_text("1/0")
    for _ in range(2):
        with pytest.raises(UserError, match="ZeroDivisionError"):
            resolve(f"{tmp_path}/broken.py:Mine")


class FakeDistribution:
    name = "some-package"


def entry_points(*entries):
    made = []
    for name, value in entries:
        entry = importlib.metadata.EntryPoint(name, value, registry.ENTRY_POINT_GROUP)
        made.append(entry._for(FakeDistribution()))
    return lambda group: importlib.metadata.EntryPoints(made)


def test_entry_points_that_fail_or_clash_name_their_package(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points(("mine", f"{__name__}:Missing")))
    with pytest.raises(UserError, match="'mine' of package some-package does not load"):
        all_passes()
    assert resolve("fold-constants").name == "fold-constants"

    clash = f"{__name__}:Clash"
    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points(("fold-constants", clash)))
    with pytest.raises(UserError, match="has the name of a pass of built-in"):
        all_passes()


@dataclasses.dataclass(frozen=True)
class Clash(AllKinds):
    name = "fold-constants"
