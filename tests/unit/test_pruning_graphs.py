"""Known architectures, cut in every group that can be cut: what the table of docs/pruning.md rests on."""

from __future__ import annotations

import pathlib
import re

import pytest

from benchmarks import pruning
from benchmarks.zoo import ZOO
from benchmarks.zoo.architectures import ARCHITECTURES

FEWEST = {"joined-by-attention": 8}
"""How many groups can be cut of the graphs that run in the fast suite."""


def _check(name: str, folder: pathlib.Path, least: int) -> None:
    if missing := ARCHITECTURES[name].missing():
        pytest.skip(f"{missing} is not installed")
    row = pruning.cut_graph(name, folder, 0.3)
    assert row.error <= pruning.BOUND
    assert row.moved > 1e-3
    assert row.cut >= least
    assert row.left < 0.75


@pytest.mark.parametrize("name", FEWEST)
def test_a_known_architecture(name: str, tmp_path: pathlib.Path) -> None:
    _check(name, tmp_path, FEWEST[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - set(FEWEST)))
def test_every_known_architecture(name: str, tmp_path: pathlib.Path) -> None:
    _check(name, tmp_path, 2)


def test_the_page_has_a_row_for_every_graph_within_the_bound() -> None:
    page = pruning.PAGE.read_text()
    table = page[page.index(pruning.BEGIN) : page.index(pruning.END)]
    rows = dict(re.findall(r"^\| ([a-z][a-z0-9-]+) \| (?:\d|–).* \| (\S+) \| [^|]+ \|$", table, re.MULTILINE))
    assert set(ARCHITECTURES) <= set(rows) <= {*ARCHITECTURES, *ZOO}
    assert len(rows) >= 30
    assert all(float(error) <= pruning.BOUND for error in rows.values())


def test_at_least_one_unit_goes_and_one_stays() -> None:
    from mmopt.analysis.axes import find_groups
    from tests.unit.test_axes import CASES

    groups = find_groups(CASES["grouped convolution"].module())
    for share in (0.01, 0.5, 1.0):
        keep = pruning.choose_units(groups, share)
        counts = {group.name: group.units for group in groups if not group.frozen}
        assert set(keep) == set(counts)
        assert all(1 <= len(units) < counts[name] for name, units in keep.items())
