"""All small architectures by name."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import pathlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.zoo.inputs import Inputs
from mmopt.errors import UnsupportedError

if TYPE_CHECKING:
    import torch

_VOCABULARY = 64


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One small network.

    Attributes:
        name: Kebab-case name, the key in the registry.
        description: One line for people.
        where: Module of this package and name of the class that makes it.
        make_inputs: From a generator to inputs by name, batch 2.
        outputs: Names of the outputs.
        requires: Packages that must be installed.
    """

    name: str
    description: str
    where: tuple[str, str]
    make_inputs: Callable[[np.random.Generator], Inputs]
    outputs: tuple[str, ...] = ("y",)
    requires: tuple[str, ...] = ("torch",)

    def missing(self) -> str:
        """The packages of ``requires`` that are not installed."""
        return ", ".join(package for package in self.requires if importlib.util.find_spec(package) is None)

    def inputs(self, seed: int = 0) -> Inputs:
        """Inputs by name; same seed, same inputs."""
        return self.make_inputs(np.random.default_rng(seed))

    def build(self) -> torch.nn.Module:
        """The network with seeded weights, in evaluation mode.

        Raises:
            UnsupportedError: Something is :meth:`missing`.
        """
        if missing := self.missing():
            raise UnsupportedError(
                f"{self.name} cannot be had here: {missing} is missing", hint="pip install 'mmopt[torch,bench]'"
            )
        from benchmarks.zoo import weights

        module, cls = self.where
        factory: Any = getattr(importlib.import_module(f"benchmarks.zoo.architectures.{module}"), cls)
        return weights.seeded(factory, trained=False, inputs=self.inputs(seed=1))

    def export(self, folder: pathlib.Path) -> pathlib.Path:
        """Write the network as ``folder/NAME.onnx`` unless it is there already."""
        path = pathlib.Path(folder) / f"{self.name}.onnx"
        if not path.is_file():
            from benchmarks.zoo import onnx_export

            path.parent.mkdir(parents=True, exist_ok=True)
            onnx_export.write(self.build(), self.inputs(), self.outputs, None, path)
        return path


def _image(size: int = 32) -> Callable[[np.random.Generator], Inputs]:
    return lambda rng: {"x": rng.normal(size=(2, 3, size, size)).astype(np.float32)}


def _ids(**lengths: int) -> Callable[[np.random.Generator], Inputs]:
    return lambda rng: {name: rng.integers(1, _VOCABULARY, (2, n), dtype=np.int64) for name, n in lengths.items()}


def _series(*shape: int) -> Callable[[np.random.Generator], Inputs]:
    return lambda rng: {"x": rng.normal(size=(2, *shape)).astype(np.float32)}


def _whisper(rng: np.random.Generator) -> Inputs:
    return {**_ids(input_ids=7)(rng), "states": rng.normal(size=(2, 20, 32)).astype(np.float32)}


def _two_streams(rng: np.random.Generator) -> Inputs:
    return {**_ids(input_ids=9)(rng), "x": rng.normal(size=(2, 3, 16, 16)).astype(np.float32)}


def _convolutional() -> Iterable[Architecture]:
    for name, cls, what in (
        ("vgg", "Vgg", "plain convolutions, flattened into linear layers"),
        ("inception", "Inception", "branches of different windows side by side"),
        ("mobilenet-v2", "MobileNetV2", "inverted residuals with depthwise convolutions"),
        ("efficientnet", "EfficientNet", "depthwise convolutions with squeeze and excitation"),
        ("densenet", "DenseNet", "every layer reads all before it"),
        ("convnext", "ConvNeXt", "depthwise windows, layer norm over channels, linear layers in space"),
        ("shufflenet-v1", "ShuffleNetV1", "grouped convolutions with shuffled channels"),
        ("shufflenet-v2", "ShuffleNetV2", "split and shuffled channels"),
        ("resnext", "ResNeXt", "residual blocks with grouped convolutions"),
        ("unet", "UNet", "transposed convolutions and skips by concatenation, group norm"),
        ("superresolution", "SuperResolution", "pixel shuffle, padded shortcuts, instance norm"),
        ("cbam", "Cbam", "gates from means and maxima over channels and space"),
    ):
        yield Architecture(name, what, ("convolutional", cls), _image())


def _sequences() -> Iterable[Architecture]:
    yield Architecture("bilstm-stack", "two bidirectional LSTMs", ("sequences", "BiLstmStack"), _ids(input_ids=12))
    yield Architecture("gru-stack", "three GRUs with a residual", ("sequences", "GruStack"), _series(15, 20))
    yield Architecture(
        "rnn-seq2seq", "the state of one RNN starts another", ("sequences", "Seq2Seq"), _ids(source=8, target=6)
    )
    yield Architecture("tcn", "dilated causal convolutions", ("sequences", "TemporalConvolutions"), _series(12, 40))
    for kind in ("concat", "sum", "attention", "product", "bilinear", "film"):
        yield Architecture(
            f"joined-by-{kind}",
            f"a text and an image joined by {kind}",
            ("sequences", f"JoinedBy{kind.capitalize()}"),
            _two_streams,
        )


def _transformers() -> Iterable[Architecture]:
    for name, cls, what, inputs in (
        ("bert", "Bert", "encoder after which everything is named", _ids(input_ids=11)),
        ("gpt2", "Gpt2", "packed projections, word table tied to the output", _ids(input_ids=10)),
        ("llama", "Llama", "grouped queries, rotary positions, gated layers, RMS norm", _ids(input_ids=10)),
        ("t5", "T5", "encoder and decoder with relative positions, one word table", _ids(input_ids=9, target=6)),
        ("whisper-decoder", "WhisperDecoder", "decoder that attends to given states", _whisper),
        ("wav2vec2", "Wav2Vec2", "convolutions over a waveform, grouped positions", _series(2_000)),
        ("deit", "Deit", "image patches with two class tokens", _image()),
        ("swin", "Swin", "shifted windows and merged patches", _image()),
        ("albert", "Albert", "one layer's weights at all depths", _ids(input_ids=11)),
        ("perceiver", "Latents", "learned latents attend to a sequence", _series(14, 24)),
    ):
        yield Architecture(name, what, ("attention", cls), inputs, requires=("torch", "transformers"))


ARCHITECTURES: dict[str, Architecture] = {
    entry.name: entry for group in (_convolutional(), _sequences(), _transformers()) for entry in group
}
"""Every small architecture by name."""
