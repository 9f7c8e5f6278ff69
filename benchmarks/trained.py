"""Networks trained on real data, for claims about accuracy: digits in three modalities, and polarity of sentences.

``python -m benchmarks.trained FOLDER [--data ../shared/data] [--networks digits,polarity]``

FOLDER gets ``NAME.onnx`` (dynamic batch), ``NAME.calibration.npz`` and ``NAME.test.npz`` (inputs and ``labels``).
Training takes about two minutes each on two cores.

*digits*: a picture (MNIST, with noise and a black square), a recording (Free Spoken Digit Dataset, with noise) and the
name of the digit with wrong letters; paired by label, so the pairs are made up while each part is real. Speakers,
recordings and pictures of the test are not in training. *polarity*: sentences from film reviews (Pang and Lee, 2005),
words as tokens. *minilm*: all-MiniLM-L6-v2 as it is published, with the same sentences.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from benchmarks.models import chosen
from benchmarks.zoo import ZOO
from benchmarks.zoo.onnx_export import write
from benchmarks.zoo.sentences import tokenize
from mmopt.errors import MmoptError, UserError

Arrays = dict[str, np.ndarray[Any, Any]]

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RATE, FRAMES, BANDS, LETTERS = 8000, 64, 40, 8
WORDS, LENGTH = 6000, 48
CALIBRATION = 256
SENTENCES = 600


class Digits(nn.Module):  # type: ignore[misc]
    """Three towers and a head over their concatenation."""

    def __init__(self, width: int = 48, heard: int = 96, spelled: int = 64, joined: int = 256) -> None:
        super().__init__()
        self.image = nn.Sequential(
            *_block(1, width), *_block(width, width), nn.MaxPool2d(2), *_block(width, 2 * width), nn.MaxPool2d(2),
            *_block(2 * width, 2 * width), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.listen = nn.Sequential(
            nn.Conv1d(BANDS, 128, 5, padding=2), nn.ReLU(), nn.Conv1d(128, 128, 5, stride=2, padding=2), nn.ReLU(),
        )  # fmt: skip
        self.follow = nn.LSTM(128, heard, batch_first=True, bidirectional=True)
        self.letters = nn.Embedding(28, 32)
        self.read = nn.GRU(32, spelled, batch_first=True)
        features = 2 * width + 2 * heard + spelled
        self.head = nn.Sequential(nn.Linear(features, joined), nn.ReLU(), nn.Linear(joined, 10))

    def forward(self, image: torch.Tensor, audio: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Logits of the ten digits."""
        heard, _ = self.follow(self.listen(audio).transpose(1, 2))
        spelled, _ = self.read(self.letters(text))
        together = torch.cat([self.image(image), heard.mean(dim=1), spelled[:, -1]], dim=1)
        logits: torch.Tensor = self.head(together)
        return logits


def _block(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


class Polarity(nn.Module):  # type: ignore[misc]
    """A small transformer over words with padding."""

    def __init__(self, width: int = 128, layers: int = 3) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, width)
        self.places = nn.Parameter(torch.randn(LENGTH, width) * 0.02)
        self.layers = nn.ModuleList(_Layer(width, 4) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 2)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Logits of negative and positive."""
        x = self.words(ids) + self.places
        bias = (1.0 - mask)[:, None, None, :] * -1e4
        for layer in self.layers:
            x = layer(x, bias)
        weights = mask[:, :, None]
        logits: torch.Tensor = self.head((self.norm(x) * weights).sum(dim=1) / weights.sum(dim=1))
        return logits


class _Layer(nn.Module):  # type: ignore[misc]
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        h = self.before(x)
        q, k, v = (f(h).unflatten(2, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        shares = torch.softmax(q @ k.transpose(2, 3) / q.shape[-1] ** 0.5 + bias, dim=-1)
        x = x + self.drop(self.out((shares @ v).transpose(1, 2).flatten(2)))
        return x + self.drop(self.down(nn.functional.gelu(self.up(self.between(x)))))


# -- data ------------------------------------------------------------------------------------------------------


def spectrogram(wave: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Log energies ``[BANDS, FRAMES]`` of a recording: windows of 32 ms, triangular bands on the mel scale."""
    window, hop = 256, 100
    padded = np.zeros(window + hop * (FRAMES - 1), np.float32)
    padded[: min(len(wave), len(padded))] = wave[: len(padded)]
    frames = np.lib.stride_tricks.sliding_window_view(padded, window)[::hop] * np.hanning(window)
    power = np.abs(np.fft.rfft(frames, axis=1)) ** 2
    mel = np.linspace(0, 2595 * np.log10(1 + RATE / 2 / 700), BANDS + 2)
    centers = 700 * (10 ** (mel / 2595) - 1) / (RATE / 2) * (window // 2)
    bins = np.arange(window // 2 + 1)
    rise = (bins - centers[:-2, None]) / np.diff(centers)[:-1, None]
    fall = (centers[2:, None] - bins) / np.diff(centers)[1:, None]
    bank = np.maximum(0, np.minimum(rise, fall))
    return np.asarray(np.log(bank @ power.T + 1e-3).astype(np.float32) / 4)


class DigitData:
    """Draws samples of three modalities with the same label.

    Args:
        folder: Where the data is.
        test: Whether to draw from what is kept for the test: the last speaker's recordings and the last 2,000 pictures.
        seed: Seed of what goes together, and of the noise.
    """

    def __init__(self, folder: pathlib.Path, *, test: bool, seed: int) -> None:
        pictures, spoken = (dict(np.load(folder / f"{name}.npz")) for name in ("mnist8k", "spoken_digits"))
        kept = slice(6000, None) if test else slice(None, 6000)
        self._images, self._labels = pictures["images"][kept] / np.float32(255), pictures["labels"][kept]
        places = np.flatnonzero((spoken["speaker"] == 5) == test)
        bounds = spoken["offsets"]
        self._waves = [spoken["audio"][bounds[n] : bounds[n + 1]] / np.float32(32768) for n in places]
        self._spoken = spoken["digit"][places]
        self._random = np.random.default_rng(seed)

    def draw(self, count: int) -> tuple[Arrays, np.ndarray[Any, Any]]:
        """Inputs by name, and labels."""
        labels = self._random.integers(0, 10, count)
        images = np.stack([self._picture(label) for label in labels])[:, None]
        audio = np.stack([self._recording(label) for label in labels])
        text = np.stack([self._name(label) for label in labels])
        return {"image": images.astype(np.float32), "audio": audio.astype(np.float32), "text": text}, labels

    def _picture(self, label: int) -> np.ndarray[Any, Any]:
        image = self._images[self._random.choice(np.flatnonzero(self._labels == label))].copy()
        y, x = self._random.integers(4, 14, 2)
        image[y : y + 11, x : x + 11] = 0
        return np.asarray(image + 0.45 * self._random.standard_normal(image.shape))

    def _recording(self, label: int) -> np.ndarray[Any, Any]:
        wave = self._waves[self._random.choice(np.flatnonzero(self._spoken == label))]
        loud = wave / (np.abs(wave).max() + 1e-6)
        return spectrogram(loud + 0.3 * self._random.standard_normal(len(loud)).astype(np.float32))

    def _name(self, label: int) -> np.ndarray[Any, Any]:
        letters = np.zeros(LETTERS, np.int64)
        for place, letter in enumerate(NAMES[label]):
            wrong = self._random.random() < 0.6
            letters[place] = self._random.integers(1, 27) if wrong else ord(letter) - 96
        return letters


def sentences(folder: pathlib.Path) -> tuple[Arrays, np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Inputs and labels of all sentences, shuffled, and whether each is kept for the test."""
    rows = [line.split("\t", 1) for line in (folder / "movie_polarity.tsv").read_text().splitlines()]
    order = np.random.default_rng(0).permutation(len(rows))
    test = np.arange(len(rows)) >= len(rows) * 4 // 5
    words = [rows[n][1].split()[:LENGTH] for n in order]
    counts: dict[str, int] = {}
    for sentence, kept in zip(words, test, strict=True):
        for word in sentence if not kept else ():
            counts[word] = counts.get(word, 0) + 1
    known = {word: n + 2 for n, word in enumerate(sorted(counts, key=lambda w: (-counts[w], w))[: WORDS - 2])}
    ids = np.zeros((len(rows), LENGTH), np.int64)
    for n, sentence in enumerate(words):
        ids[n, : len(sentence)] = [known.get(word, 1) for word in sentence]
    labels = np.array([int(rows[n][0]) for n in order])
    return {"ids": ids, "mask": (ids > 0).astype(np.float32)}, labels, test


# -- training --------------------------------------------------------------------------------------------------


def train(network: nn.Module, batches: Iterator[tuple[Arrays, np.ndarray[Any, Any]]], steps: int, rate: float) -> None:
    """Cross entropy, AdamW, one cycle of the learning rate."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    network.train()
    for step in range(steps):
        arrays, labels = next(batches)
        logits = network(**{name: torch.from_numpy(array) for name, array in arrays.items()})
        loss = nn.functional.cross_entropy(logits, torch.from_numpy(labels))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"  step {step} of {steps}: loss {loss.item():.3f}", file=sys.stderr, flush=True)
    network.eval()


def digits(data: pathlib.Path) -> tuple[nn.Module, Arrays, Arrays, np.ndarray[Any, Any]]:
    """Train the three-modal network; returns it with calibration inputs, test inputs and labels."""
    network = Digits()
    source = DigitData(data, test=False, seed=0)
    train(network, iter(lambda: source.draw(64), None), 500, 3e-3)
    calibration, _ = source.draw(CALIBRATION)
    test, labels = DigitData(data, test=True, seed=1).draw(2000)
    return network, calibration, test, labels


def polarity(data: pathlib.Path) -> tuple[nn.Module, Arrays, Arrays, np.ndarray[Any, Any]]:
    """Train the transformer; returns it with calibration inputs, test inputs and labels."""
    network = Polarity()
    arrays, labels, test = sentences(data)
    random, known = np.random.default_rng(0), np.flatnonzero(~test)

    def batches() -> Iterator[tuple[Arrays, np.ndarray[Any, Any]]]:
        while True:
            chosen_rows = random.choice(known, 64)
            yield {name: array[chosen_rows] for name, array in arrays.items()}, labels[chosen_rows]

    train(network, batches(), 600, 1e-3)
    calibration = {name: array[known[:CALIBRATION]] for name, array in arrays.items()}
    return network, calibration, {name: array[test] for name, array in arrays.items()}, labels[test]


TRAINED = {"digits": digits, "polarity": polarity}
NETWORKS = (*TRAINED, "minilm")


def prepare(name: str, folder: pathlib.Path, data: pathlib.Path) -> None:
    """Train a network, or take a published one, and write it with its data, unless it is there.

    Raises:
        UserError: The data is not there.
        UnsupportedError: The published one is not installed.
    """
    if (folder / f"{name}.test.npz").exists():
        return
    if not data.is_dir():
        raise UserError("there is no data to train on", where=str(data), hint="give its folder with --data")
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    if name == "minilm":
        _minilm(folder, data)
        return
    print(f"train {name} …", file=sys.stderr, flush=True)
    network, calibration, test, labels = TRAINED[name](data)
    save(folder, name, network, calibration, test, labels)


def save(
    folder: pathlib.Path,
    name: str,
    network: nn.Module,
    calibration: Arrays,
    test: Arrays,
    labels: np.ndarray[Any, Any],
) -> None:
    """Write a network with a symbolic batch, and its data."""
    example = {key: array[:2] for key, array in test.items()}
    batch = {key: {0: torch.export.Dim("batch")} for key in test}
    path = folder / f"{name}.onnx"
    write(network, example, ["logits"], batch, path)
    # One file: some of the tools to compare with do not take weights beside it.
    onnx.save(onnx.load(path), path)
    path.with_name(f"{path.name}.data").unlink(missing_ok=True)
    np.savez(folder / f"{name}.calibration.npz", **calibration)  # type: ignore[arg-type]
    np.savez(folder / f"{name}.test.npz", labels=labels, **test)  # type: ignore[arg-type]


def _minilm(folder: pathlib.Path, data: pathlib.Path) -> None:
    """all-MiniLM-L6-v2, with sentences of film reviews and without labels."""
    rows = [line.split("\t", 1)[1] for line in (data / "movie_polarity.tsv").read_text().splitlines()]
    order = np.random.default_rng(0).permutation(len(rows))
    chosen_rows = [rows[n] for n in order[: CALIBRATION // 2 + SENTENCES]]
    arrays = tokenize(chosen_rows, LENGTH)
    model = onnx.load(ZOO["all-minilm-l6"].export(folder / "models", dynamic=True))
    onnx.save(model, folder / "minilm.onnx")
    for part, rows_of in (("calibration", slice(0, CALIBRATION // 2)), ("test", slice(CALIBRATION // 2, None))):
        part_arrays = {name: array[rows_of] for name, array in arrays.items()}
        np.savez(folder / f"minilm.{part}.npz", **part_arrays)  # type: ignore[arg-type]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0; the exit code of an error.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trained", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=pathlib.Path, metavar="FOLDER")
    parser.add_argument("--data", type=pathlib.Path, default=pathlib.Path("../shared/data"), metavar="FOLDER")
    parser.add_argument("--networks", default="", metavar="NAMES", help="with commas; default: all")
    options = parser.parse_args(arguments)
    try:
        for name in chosen(options.networks, NETWORKS, "--networks"):
            prepare(name, options.folder, options.data)
    except MmoptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
