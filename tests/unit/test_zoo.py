"""The reference models: what the registry says, what the inputs look like, and that exports compute what torch does."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import subprocess
import sys

import numpy as np
import onnxruntime as ort
import pytest

from benchmarks.zoo import ZOO, FileModel, TorchModel
from benchmarks.zoo import __main__ as command_line
from benchmarks.zoo import inputs as make
from mmopt.errors import UnsupportedError, UserError
from mmopt.ir.modality import Modality

REQUIRED = {
    "clip-vit-b32",
    "bert-base",
    "resnet-50",
    "whisper-tiny-encoder",
    "all-minilm-l6",
    "silero-vad",
    "silero-vad-ifless",
    "cnn-rnn",
    "sentiment",
    "recommendation",
    "hci",
    "four-modal",
    "image-text-attention",
    "resnet50-embedlstm-audiolstm",
}
FUSIONS = ("sum", "weighted", "attention", "alignment", "concat", "decision", "deep", "multitask", "scatter")
SMALL = (*(f"fusion-{kind}" for kind in FUSIONS), "siamese")


def test_registry_holds_every_model_under_its_own_name() -> None:
    assert set(ZOO) == REQUIRED | set(SMALL)
    for name, model in ZOO.items():
        assert model.name == name
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)


@pytest.mark.parametrize("name", ZOO)
def test_expected_towers_speak_of_the_inputs_there_are(name: str) -> None:
    model = ZOO[name]
    expected = model.expected_towers
    arrays = model.inputs(1) if not _needs_tokenizer(model) else dict.fromkeys(expected.modalities)
    assert set(expected.modalities) == set(arrays)
    assert set(expected.modalities.values()) <= {m.value for m in Modality}
    in_towers = [name for names in expected.towers.values() for name in names]
    assert len(in_towers) == len(set(in_towers))
    assert set(in_towers) == {name for name, kind in expected.modalities.items() if kind != "unknown"}
    assert bool(expected.fusion) == bool(expected.level) == (len(expected.towers) > 1)


@pytest.mark.parametrize("name", [*SMALL, "clip-vit-b32", "bert-base", "four-modal", "silero-vad"])
def test_inputs_follow_seed_and_batch(name: str) -> None:
    model = ZOO[name]
    one, same, other = model.inputs(3, seed=1), model.inputs(3, seed=1), model.inputs(3, seed=2)
    for key in one:
        np.testing.assert_array_equal(one[key], same[key])
    assert any(not np.array_equal(one[key], other[key]) for key in one)
    batched = {key for key, axes in getattr(model, "axes", {"input": {0: "batch"}}).items() if axes[0] == "batch"}
    assert batched
    assert all(one[key].shape[0] == 3 for key in batched)


@pytest.mark.parametrize("tokens", [1, 2, 17])
def test_sentences_are_padded_where_the_mask_is_zero(tokens: int) -> None:
    arrays = make.text(np.random.default_rng(0), 50, tokens, vocab=200, mask=True, end=102)
    ids, mask = arrays["input_ids"], arrays["attention_mask"]
    lengths = mask.sum(1)
    assert ids.dtype == mask.dtype == np.int64
    assert ((mask == 1) == (np.arange(tokens) < lengths[:, None])).all(), "padding is at the end"
    assert (ids[mask == 0] == 0).all()
    assert (ids[mask == 1] > 0).all()
    assert ids.max() < 200
    assert (ids[np.arange(50), lengths - 1] == 102).all()
    assert tokens == 1 or (lengths < tokens).all(), "every sentence has some padding"


def test_clip_captions_end_once() -> None:
    ids = ZOO["clip-vit-b32"].inputs(2)["input_ids"]
    assert (ids[:, 0] == 49_406).all()
    first_end = (ids == 49_407).argmax(1)
    assert (first_end > 0).all()
    for row, end in zip(ids, first_end, strict=True):
        assert (row[:end] < 49_407).all()


def test_images_are_smooth_and_normalized() -> None:
    pixels = make.image(np.random.default_rng(0), 4, 64)["pixel_values"]
    assert pixels.dtype == np.float32
    assert pixels.min() >= -2.2
    assert pixels.max() <= 2.7
    assert np.abs(np.diff(pixels, axis=-1)).mean() < 0.5 * pixels.std(), "neighbours are alike"


def test_video_frames_differ_but_follow_each_other() -> None:
    frames = make.video(np.random.default_rng(0), 2, 6, 48)["video_frames"]
    assert frames.shape == (2, 6, 3, 48, 48)
    step = np.abs(frames[:, 1] - frames[:, 0]).mean()
    assert 0 < step < np.abs(frames[:, 5] - frames[:, 0]).mean()


def test_log_mel_peaks_at_the_band_of_a_tone() -> None:
    time = np.arange(16_000) / make.SAMPLE_RATE
    rows = make.log_mel(np.sin(2 * np.pi * np.array([[300.0], [3000.0]]) * time), 40)
    assert rows.shape == (2, 98, 40)
    mel = 2595 * np.log10(1 + np.array([300.0, 3000.0]) / 700)
    band = mel / (2595 * np.log10(1 + 8000 / 700)) * 41 - 1
    np.testing.assert_allclose(rows.mean(1).argmax(1), band, atol=1)
    np.testing.assert_allclose(rows.max((1, 2)) - rows.min((1, 2)), 2.0, atol=1e-5)


def test_unknown_length_is_named_with_a_suggestion() -> None:
    with pytest.raises(UserError, match=r"no length 'token'\n.*'tokens'"):
        ZOO["bert-base"].inputs(1, token=4)


def test_missing_file_is_said_and_not_exported(tmp_path: pathlib.Path) -> None:
    nowhere = tmp_path / "none.onnx"
    silero = ZOO["silero-vad"]
    assert isinstance(silero, FileModel)
    model = dataclasses.replace(silero, file=nowhere)
    assert model.missing() == str(nowhere)
    with pytest.raises(UnsupportedError, match=r"none\.onnx is missing"):
        model.export(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["silero-vad", "silero-vad-ifless"])
def test_silero_files_run(name: str, tmp_path: pathlib.Path) -> None:
    model = ZOO[name]
    if missing := model.missing():
        pytest.skip(f"{missing} is not there")
    path = model.export(tmp_path, dynamic=True)
    for batch in (1, 3):
        probability, state = _run(path, model.inputs(batch))
        assert probability.shape == (batch, 1)
        assert ((probability >= 0) & (probability <= 1)).all()
        assert state.shape == (2, batch, 128)


def test_registry_needs_no_torch() -> None:
    program = "import sys; sys.modules['torch'] = None; import benchmarks.zoo as z; print(len(z.ZOO))"
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(ZOO)


def test_list_names_every_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(ZOO)


def test_export_of_an_unknown_name_suggests_one(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["export", "fusion-sun", "-o", str(tmp_path / "out")]) == 2
    assert "did you mean 'fusion-sum'?" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def _needs_tokenizer(model: object) -> bool:
    return isinstance(model, TorchModel) and model.trained


def _run(path: pathlib.Path, arrays: make.Inputs) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [np.asarray(value) for value in session.run(None, arrays)]
