"""The page of rewrites lists every rule that recognises something, and every pass that rewrites.

After a change: ``python -m tests.unit.test_rewrite_docs`` writes the tables anew.
"""

from __future__ import annotations

import pathlib

from mmopt.pipeline.registry import all_passes
from mmopt.transforms.raising.rules import RaisingPass

FAMILIES = ("canonicalize", "raising", "rewrite", "portable")
PAGE = pathlib.Path(__file__).parents[2] / "docs" / "rewrites.md"
BEGIN, END = "<!-- generated: {} -->\n", "<!-- end: {} -->\n"


def rules_table() -> str:
    """One row a raising rule."""
    rows = ["| rule | what is recognised | what it becomes | pass | fidelity |", "| --- | --- | --- | --- | --- |"]
    for info in all_passes().values():
        if issubclass(info.cls, RaisingPass):
            for rule in info.cls().raising_rules():
                rows.append(f"| {rule.name} | `{rule.equation}` | {rule.result} | `{info.name}` | {info.fidelity} |")
    return "\n".join(rows) + "\n"


def passes_table() -> str:
    """One row a pass of the families that rewrite."""
    rows = ["| pass | family | what it does | fidelity |", "| --- | --- | --- | --- |"]
    for info in all_passes().values():
        if info.family in FAMILIES:
            rows.append(f"| `{info.name}` | {info.family} | {info.doc} | {info.fidelity} |")
    return "\n".join(rows) + "\n"


def with_tables(text: str) -> str:
    """``text`` with its tables made anew."""
    for name, table in (("rules", rules_table()), ("passes", passes_table())):
        before, _, rest = text.partition(BEGIN.format(name))
        _, _, after = rest.partition(END.format(name))
        text = f"{before}{BEGIN.format(name)}\n{table}\n{END.format(name)}{after}"
    return text


def test_the_page_is_up_to_date() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert with_tables(text) == text


def test_every_rule_says_what_it_recognises() -> None:
    rules = [
        r for info in all_passes().values() if issubclass(info.cls, RaisingPass) for r in info.cls().raising_rules()
    ]
    assert len(rules) >= 10
    assert all(rule.equation and rule.result for rule in rules)


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
