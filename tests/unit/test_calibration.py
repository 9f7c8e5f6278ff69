"""Calibration: statistics against numpy, exact merging, padding, honesty about data, files, and the command."""

from __future__ import annotations

import json
import math
import pathlib
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from mmopt.analysis.calibration import Calibration, Histogram, TensorStatistics, choose_range, collect, load, save
from mmopt.analysis.calibration.statistics import SIDE
from mmopt.cli import main
from mmopt.errors import UserError
from mmopt.ir.evaluate import ReferenceRunner
from tests.canonical import module_from

FLOATS = npst.arrays(
    np.float32,
    st.integers(0, 40),
    elements=st.floats(-(2.0**99), 2.0**99, width=32, allow_nan=False, allow_infinity=False),
)


class TestHistogram:
    @given(st.lists(FLOATS, min_size=1, max_size=5))
    def test_parts_merge_to_the_histogram_of_the_whole(self, parts: list[np.ndarray]) -> None:
        whole, merged = Histogram(), Histogram()
        whole.update(np.concatenate(parts))
        for part in reversed(parts):
            one = Histogram()
            one.update(part)
            merged.merge(one)
        assert merged.exponent == whole.exponent
        np.testing.assert_array_equal(merged.counts, whole.counts)

    @given(FLOATS)
    def test_counts_are_those_of_numpy(self, values: np.ndarray) -> None:
        histogram = Histogram()
        histogram.update(values)
        expected, _ = np.histogram(values.astype(np.float64), bins=histogram.edges())
        assert histogram.counts.sum() == values.size
        np.testing.assert_array_equal(histogram.counts[:-1], expected[:-1])

    def test_bins_are_as_fine_as_promised(self) -> None:
        histogram = Histogram()
        histogram.update(np.array([0.1, 3.0]))
        assert 3.0 / SIDE < histogram.width <= 2 * 3.0 / SIDE

    def test_zeros_and_nothing(self) -> None:
        histogram = Histogram()
        histogram.update(np.zeros(3))
        histogram.update(np.zeros(0))
        assert histogram.counts[SIDE] == 3
        histogram.update(np.array([1.0]))
        assert histogram.counts[SIDE] == 3
        assert histogram.counts.sum() == 4


class TestTensorStatistics:
    def test_against_numpy(self) -> None:
        values = np.random.default_rng(0).standard_normal((3, 5, 7)).astype(np.float32)
        statistics = TensorStatistics()
        for part in values:
            statistics.update(part, 1, gram=True)
        rows = values.reshape(-1, 7).astype(np.float64)
        assert (statistics.low, statistics.high) == (rows.min(), rows.max())
        assert statistics.channels is not None
        np.testing.assert_allclose(statistics.channels.mean, rows.mean(axis=0), rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(statistics.channels.mean_magnitude, np.abs(rows).mean(axis=0), rtol=1e-6)
        np.testing.assert_allclose(statistics.channels.mean_square, (rows**2).mean(axis=0), rtol=1e-6)
        np.testing.assert_array_equal(statistics.channels.high, rows.max(axis=0))
        np.testing.assert_allclose(statistics.gram, rows.T @ rows, rtol=1e-12)

    def test_infinite_values_are_counted_and_left_out(self) -> None:
        statistics = TensorStatistics()
        statistics.update(np.array([[-np.inf, 1.0], [2.0, 3.0]]), 1)
        assert (statistics.infinite, statistics.count, statistics.low) == (1, 3, 1.0)
        assert statistics.channels is None

    def test_merged_equals_pooled(self) -> None:
        values = np.random.default_rng(0).standard_normal((6, 8, 4)) * np.array([1, 1, 1, 1, 9, 30])[:, None, None]
        pooled, merged = TensorStatistics(), TensorStatistics()
        pooled.update(values, 2, gram=True)
        for part in values:
            one = TensorStatistics()
            one.update(part, 1, gram=True)
            assert one.channels is not None
            one.channels.axis = 2
            merged.merge(one)
        assert merged.gram is not None
        assert pooled.gram is not None
        assert merged.channels is not None
        assert pooled.channels is not None
        np.testing.assert_array_equal(merged.histogram.counts, pooled.histogram.counts)
        np.testing.assert_allclose(merged.gram, pooled.gram)
        np.testing.assert_allclose(merged.channels.total, pooled.channels.total)
        np.testing.assert_allclose(merged.channels.squares, pooled.channels.squares)
        for method in ("minmax", "percentile", "mse", "entropy"):
            assert choose_range(merged, method) == choose_range(pooled, method)


class TestRanges:
    @staticmethod
    def of(values: np.ndarray) -> TensorStatistics:
        statistics = TensorStatistics()
        statistics.update(values)
        return statistics

    def test_minmax_holds_zero(self) -> None:
        assert choose_range(self.of(np.array([1.0, 2.0]))) == (0.0, 2.0)
        assert choose_range(self.of(np.array([-1.0, 2.0])), symmetric=True) == (-2.0, 2.0)

    def test_percentile_against_numpy(self) -> None:
        values = np.random.default_rng(0).standard_normal(200_000)
        statistics = self.of(values)
        low, high = choose_range(statistics, "percentile", share=0.99)
        assert low == pytest.approx(np.quantile(values, 0.005), abs=2 * statistics.histogram.width)
        assert high == pytest.approx(np.quantile(values, 0.995), abs=2 * statistics.histogram.width)
        _, bound = choose_range(statistics, "percentile", share=0.99, symmetric=True)
        assert bound == pytest.approx(np.quantile(np.abs(values), 0.99), abs=2 * statistics.histogram.width)

    @pytest.mark.parametrize("symmetric", [False, True])
    def test_mse_is_near_the_best_clipping(self, symmetric: bool) -> None:
        values = np.random.default_rng(0).laplace(size=50_000)
        values[0] = 60.0

        def error(low: float, high: float, bits: int = 4) -> float:
            step = (high - low) / (2**bits - 1)
            return float(((np.rint((np.clip(values, low, high) - low) / step) * step + low - values) ** 2).mean())

        chosen = choose_range(self.of(values), "mse", bits=4, symmetric=symmetric)
        bounds = np.linspace(0.5, 20, 60)
        best = min(error(-a, b) for a in bounds for b in (bounds if not symmetric else [a]))
        assert error(*chosen) <= 1.1 * best
        assert error(*chosen) < 0.2 * error(*choose_range(self.of(values), "minmax", symmetric=symmetric))

    def test_entropy_clips_outliers_and_keeps_what_is_even(self) -> None:
        random = np.random.default_rng(0)
        tailed = np.concatenate([random.standard_normal(100_000), [40.0]])
        assert 2 < choose_range(self.of(tailed), "entropy", symmetric=True)[1] < 20
        even = random.uniform(-1, 1, 100_000)
        assert choose_range(self.of(even), "entropy", symmetric=True)[1] == pytest.approx(1, abs=0.05)

    @pytest.mark.parametrize("share", [0.3, 0.9])
    def test_entropy_is_not_misled_by_equal_values(self, share: float) -> None:
        random = np.random.default_rng(0)
        rectified = np.abs(random.standard_normal(400_000))
        rectified[: int(share * 400_000)] = 0
        low, high = choose_range(self.of(rectified), "entropy")
        assert low == 0
        assert high > 0.8 * rectified.max()

    def test_entropy_keeps_a_floor_that_many_values_lie_on(self) -> None:
        random = np.random.default_rng(0)
        floored = np.maximum(random.standard_normal(40_000), 0.2) - 1.93
        low, high = choose_range(self.of(floored), "entropy")
        assert low == floored.min()
        assert high > 0.6 * floored.max()

    def test_zeros_have_no_width(self) -> None:
        assert choose_range(self.of(np.zeros(4)), "mse") == (0.0, 0.0)

    def test_errors(self) -> None:
        with pytest.raises(UserError, match="percentile"):
            choose_range(self.of(np.ones(1)), "percentil")
        with pytest.raises(UserError, match="nothing to choose"):
            choose_range(TensorStatistics())


MLP = "g (float[1,4] x) => (float[1,3] y) <float[4,3] w = {1,2,3,4,5,6,7,8,9,1,2,3}> { a = MatMul(x, w) y = Relu(a) }"
TEXT = """g (int64[1,4] ids, float[1,4] mask, float[1,3] image) => (float[1,2] y)
<float[8,2] table = {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16}, float[2,2] w = {1,2,3,4}, float[3,2] v = {1,2,3,4,5,6},
 int64[1] last = {-1}, int64[1] one = {1}>
{
  e = Gather(table, ids)
  h = MatMul(e, w)
  m = Unsqueeze(mask, last)
  k = Mul(h, m)
  s = ReduceSum<keepdims = 0>(k, one)
  n = ReduceSum(mask, one)
  t = Div(s, n)
  i = MatMul(image, v)
  y = Add(t, i)
}"""  # fmt: skip


def samples(count: int = 6) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    lengths = random.integers(1, 5, count)
    mask = (np.arange(4) < lengths[:, None]).astype(np.float32)[:, None]
    ids = np.where(mask > 0, random.integers(0, 7, (count, 1, 4)), 7)
    return {"ids": ids, "mask": mask, "image": random.standard_normal((count, 1, 3)).astype(np.float32)}


class TestCollect:
    def test_every_tensor_against_numpy(self) -> None:
        x = np.random.default_rng(0).standard_normal((5, 1, 4)).astype(np.float32)
        found = collect(module_from(MLP), {"x": x}, gram=["x"])
        a = x.reshape(5, 4).astype(np.float64) @ np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9], [1, 2, 3]])
        assert list(found.tensors) == ["x", "a", "y"]
        assert found.samples == 5
        assert found.tensors["a"].low == pytest.approx(a.min(), rel=1e-5)
        assert found.tensors["y"].low == 0
        np.testing.assert_allclose(
            found.tensors["x"].gram, x.reshape(5, 4).T.astype(float) @ x.reshape(5, 4), rtol=1e-6
        )
        assert found.tensors["a"].gram is None

    def test_samples_without_the_batch_axis(self) -> None:
        x = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
        with_axis = collect(module_from(MLP), {"x": x[:, None]})
        without = collect(module_from(MLP), {"x": x})
        assert with_axis.tensors["a"].low == without.tensors["a"].low

    def test_padding_does_not_enter(self) -> None:
        data = samples()
        found = collect(module_from(TEXT), data)
        real = data["mask"].reshape(-1) > 0
        table = np.arange(1, 17).reshape(8, 2)
        hidden = (table[data["ids"].reshape(-1)] @ np.array([[1, 2], [3, 4]]))[real]
        assert found.tensors["h"].count == hidden.size
        assert found.tensors["h"].high == hidden.max()
        assert found.tensors["h"].channels is not None
        np.testing.assert_allclose(found.tensors["h"].channels.mean, hidden.mean(axis=0))
        assert found.tensors["i"].count == 6 * 2

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"image": np.zeros((6, 1, 3), np.float32)}, "image.* never varies"),
            ({"mask": np.zeros((6, 1, 4), np.float32)}, "mask.* is 0 everywhere"),
            ({"image": None}, "no calibration samples for input 'image'"),
            ({"image": np.zeros((6, 1, 4), np.float32)}, "has shape 1x4, not 1x3"),
            ({"image": np.zeros((5, 1, 3), np.float32)}, "same number of samples"),
        ],
    )
    def test_samples_that_leave_something_out(self, change: dict[str, np.ndarray], message: str) -> None:
        data = {name: array for name, array in {**samples(), **change}.items() if array is not None}
        with pytest.raises(UserError, match=message):
            collect(module_from(TEXT), data)

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_nan_and_infinity_are_named(self, bad: float) -> None:
        data = samples()
        data["image"][3, 0, 1] = bad
        with pytest.raises(UserError, match="sample 3 of input 'image'"):
            collect(module_from(TEXT), data)

    def test_nan_inside_is_named(self) -> None:
        module = module_from("g (float[1,4] x) => (float[1,4] y) { a = Sqrt(x) y = Relu(a) }")
        with pytest.raises(UserError, match=r"'a' becomes NaN on calibration sample 1"):
            collect(module, {"x": np.array([[[1, 2, 3, 4.0]], [[1, -1, 2, 3]]], np.float32)})

    def test_unknown_gram(self) -> None:
        with pytest.raises(UserError, match="there is no tensor 'zz'"):
            collect(module_from(MLP), {"x": np.eye(4, dtype=np.float32)[:, None]}, gram=["zz"])

    def test_memory_does_not_grow_with_samples(self) -> None:
        text = "g (float[1,20000] x) => (float[1,20000] y) { a = Relu(x) b = Exp(a) c = Abs(b) y = Neg(c) }"

        def peak(count: int) -> int:
            data = np.random.default_rng(0).standard_normal((count, 1, 20000)).astype(np.float32)
            tracemalloc.start()
            collect(module_from(text), {"x": data})
            top = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            return top

        assert peak(32) < 1.3 * peak(4)

    def test_merging_speakers_equals_pooling(self) -> None:
        data = samples(12)
        module = module_from(TEXT)
        pooled = collect(module, data)
        merged = Calibration({name: TensorStatistics() for name in pooled.tensors})
        for start in range(0, 12, 3):
            merged.merge(collect(module, {name: array[start : start + 3] for name, array in data.items()}))
        assert merged.samples == 12
        for name, one in pooled.tensors.items():
            np.testing.assert_array_equal(one.histogram.counts, merged.tensors[name].histogram.counts)
            assert one.count == merged.tensors[name].count

    def test_statistics_of_other_models_do_not_merge(self) -> None:
        first = collect(module_from(MLP), {"x": np.eye(4, dtype=np.float32)[:, None]})
        with pytest.raises(UserError, match="different models"):
            first.merge(collect(module_from(TEXT), samples()))

    def test_outputs_are_streamed(self) -> None:
        module = module_from(MLP)
        seen = []
        with ReferenceRunner(threads=1) as runner:
            feeds = ({"x": np.full((1, 4), i, np.float32)} for i in range(3) if seen.append(i) is None)  # type: ignore[func-returns-value]
            first = next(runner.stream(module, feeds))
        assert seen == [0]
        assert first["y"].shape == (1, 3)


class TestFile:
    def test_round_trip(self, tmp_path: pathlib.Path) -> None:
        found = collect(module_from(TEXT), samples(), gram=["h"])
        save(found, tmp_path / "a.stats")
        back = load(tmp_path / "a.stats")
        assert (back.samples, back.source) == (found.samples, found.source)
        for name, one in found.tensors.items():
            other = back.tensors[name]
            assert (one.low, one.high, one.count) == (other.low, other.high, other.count)
            np.testing.assert_array_equal(one.histogram.counts, other.histogram.counts)
            assert (one.gram is None) == (other.gram is None)
            if one.channels is not None and other.channels is not None:
                np.testing.assert_array_equal(one.channels.total, other.channels.total)

    @pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04"])
    def test_other_files_are_refused(self, content: bytes, tmp_path: pathlib.Path) -> None:
        (tmp_path / "a.stats").write_bytes(content)
        with pytest.raises(UserError, match="holds no statistics"):
            load(tmp_path / "a.stats")

    def test_missing_folder(self, tmp_path: pathlib.Path) -> None:
        with pytest.raises(UserError, match="cannot be written"):
            save(Calibration(), tmp_path / "no" / "a.stats")

    def test_empty_tensor_survives(self, tmp_path: pathlib.Path) -> None:
        save(Calibration({"a": TensorStatistics()}), tmp_path / "a.stats")
        assert load(tmp_path / "a.stats").tensors["a"].low == math.inf


class TestCommand:
    @pytest.fixture
    def folder(self, tmp_path: pathlib.Path) -> pathlib.Path:
        import onnx_ir as ir

        ir.save(module_from(TEXT).model, tmp_path / "model.onnx")
        np.savez(tmp_path / "samples.npz", **samples())
        np.savez(tmp_path / "more.npz", **samples(3))
        return tmp_path

    def run(self, *arguments: object) -> int:
        return main.run(["calibrate", *(str(argument) for argument in arguments)])

    def test_collect_and_merge(self, folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
        for name in ("samples", "more"):
            calib = folder / f"{name}.npz"
            assert self.run(folder / "model.onnx", "--calib", calib, "-o", folder / f"{name}.stats") == 0
        out = folder / "all.stats"
        merge = ("--merge", folder / "samples.stats", "--merge", folder / "more.stats")
        assert self.run(*merge, "-o", out, "--json", folder / "r.json") == 0
        assert "9 samples" in capsys.readouterr().out
        assert load(out).samples == 9
        report = json.loads((folder / "r.json").read_text())
        assert report["samples"] == 9
        assert report["source"] == "given"

    def test_made_up_samples_are_only_made_on_request_and_marked(
        self, folder: pathlib.Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = folder / "a.stats"
        assert self.run(folder / "model.onnx", "-o", out) == 2
        assert "--calib is missing" in capsys.readouterr().err
        assert not out.exists()
        assert self.run(folder / "model.onnx", "--calib", "random", "--count", "4", "-o", out) == 0
        assert "made up" in capsys.readouterr().err
        assert load(out).source == "random"
        assert self.run("--merge", out, "--merge", out, "-o", folder / "b.stats") == 0
        assert load(folder / "b.stats").source == "random"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["model.onnx", "--calib", "samples.npz"], "no file to write"),
            (["--calib", "samples.npz", "-o", "x.stats"], "MODEL is missing"),
            (["model.onnx", "--merge", "samples.npz", "-o", "x.stats"], "joins files that exist"),
            (["--merge", "samples.npz", "-o", "x.stats"], "holds no statistics"),
        ],
    )
    def test_wrong_use(
        self, arguments: list[str], message: str, folder: pathlib.Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.run(*(folder / a if "." in a else a for a in arguments)) == 2
        assert message in capsys.readouterr().err
        assert not (folder / "x.stats").exists()
