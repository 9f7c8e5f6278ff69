"""What the benchmarks of pruning report: errors of predictions, and the plot."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from benchmarks.pruning_latency import LEARNED, PAGE, PLOT, Point, plot, points, summary
from mmopt.runtime.profiling import KernelTime, ModelTime
from tests.prunable import perceptron

FOUND = [
    Point("a", measured=1e-3, predicted=1.1e-3, templates=2e-3),
    Point("a", measured=2e-3, predicted=1.9e-3, templates=2e-3),
    Point("b", measured=4e-2, predicted=5e-2, templates=4e-2),
]


def test_the_table_has_each_network_and_all_of_them() -> None:
    lines = summary(FOUND).splitlines()
    assert "| a | 1 to 2 | 7.5% | 10.0% | 100% |" in lines
    assert "| b | 40 to 40 | 25.0% | 25.0% | 0% |" in lines
    assert any(line.startswith("| all 3 | 1 to 40 | 10.0% | 25.0%") for line in lines)
    assert lines[-1] == "67% of 3 predictions are within 15% of what was measured."


def test_the_plot_has_a_point_for_each_model_near_the_line_when_it_is_right() -> None:
    root = ElementTree.fromstring(plot([*FOUND, Point("b", 3e-3, 3e-3, 3e-3)]))
    names = {element.text for element in root.iter() if element.tag.endswith("text")}
    assert {"a", "b", "measured, ms", "predicted, ms"} <= names
    dots = [e for e in root.iter() if e.tag.endswith("circle") and e.get("r") == "3.5"]
    assert len(dots) == 4
    lines = [e for e in root.iter() if e.tag.endswith("line")]
    (x1, y1), (x2, y2) = ((float(lines[0].get(f"x{n}", 0)), float(lines[0].get(f"y{n}", 0))) for n in (1, 2))
    x, y = (float(dots[-1].get(key, 0)) for key in ("cx", "cy"))
    assert abs(y - np.interp(x, [x1, x2], [y1, y2])) < 0.5


def test_the_plot_takes_any_number_of_networks() -> None:
    many = [Point(f"network {n}", 1e-3, 1e-3 + n * 1e-4, 1e-3) for n in range(30)]
    texts = [e.text for e in ElementTree.fromstring(plot(many)).iter() if e.tag.endswith("text")]
    assert {point.network for point in many} <= set(texts)


def test_predictions_do_not_look_at_what_they_predict(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """The time of the third model changes what is compared with, not what is predicted."""
    paths = []
    for number, size in enumerate((128, 64, 96)):
        workload = f"matmul(m=1,n={size},k=64):float32"
        record = {"name": "k", "template": "matmul", "calls": 1, "workload": workload, "cycles": 10.0 * size}
        paths.append(tmp_path / f"n-{number}.mmopt")
        paths[-1].mkdir()
        (paths[-1] / "manifest.json").write_text(f'{{"kernels": [{str(record).replace(chr(39), chr(34))}]}}')
    times = [ModelTime(s, [KernelTime("k", 1, s)], 5) for s in (128e-6, 64e-6, 90e-6)]
    (found,) = points("n", paths, times)
    (other,) = points("n", paths, [*times[:LEARNED], ModelTime(1.0, [KernelTime("k", 1, 1.0)], 5)])
    assert found.predicted == other.predicted
    assert (found.measured, other.measured) == (90e-6, 1.0)
    np.testing.assert_allclose(found.predicted, 96e-6, rtol=0.02)


def test_the_page_shows_the_plot_and_what_it_says() -> None:
    page = PAGE.read_text()
    count = len(re.findall('r="3.5"', PLOT.read_text()))
    assert f"]({PLOT.name})" in page
    assert f"| all {count} |" in page
    assert f"of {count} predictions are within 15%" in page


def test_the_time_of_pruning_comes_with_what_is_right_and_how_large_the_network_is() -> None:
    pytest.importorskip("torch")
    from benchmarks.pruning_time import parameters, right

    values = np.arange(120) % 3
    seen: list[int] = []

    def run(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        seen.append(len(feeds["x"]))
        return {"logits": np.eye(3)[feeds["x"]]}

    labels = np.where(np.arange(120) < 90, values, (values + 1) % 3)
    assert right(run, {"x": values}, labels) == 75.0
    assert seen == [50, 50, 20]
    assert parameters(perceptron(hidden=8)) == sum(
        value.const_value.size for value in perceptron(hidden=8).graph.initializers.values()
    )
