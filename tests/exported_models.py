"""Small models of well-known architectures, random weights, for tests that export them in many ways.

They are built from the configurations of the transformers library, so their graphs are those of the real models.
"""

from __future__ import annotations

import dataclasses
import pathlib
import warnings
from collections.abc import Callable
from typing import Any

SPELLINGS = (
    ("torchscript", 12, "eager", True),
    ("torchscript", 14, "sdpa", False),
    ("torchscript", 17, "eager", False),
    ("dynamo", 18, "eager", False),
    ("dynamo", 18, "sdpa", True),
    ("dynamo", 20, "sdpa", False),
    ("dynamo", 23, "sdpa", False),
)
"""Exporter, opset, implementation of attention, and whether batch and sequence are named sizes."""

UNSUPPORTED = {
    ("whisper-decoder", "torchscript"): "the exporter lacks aten::diff",
    ("encoder-layer", "torchscript"): "the exporter lacks the fused encoder layer",
    ("siglip", "torchscript 12"): "the exporter has aten::unflatten from opset 13 on",
    ("swin", "dynamo 18 dynamic"): "the export has the batch of its example baked in",
    ("gemma2", "sdpa"): "torch's operator does not cap scores, and transformers does without it",
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A small model and how many of each operator its modules are.

    Attributes:
        make: Gives the module, its inputs by name, and the output to export.
        attention: Attention modules.
        layer_norm: Layer normalizations.
        rms_norm: RMS normalizations.
        gelu: Gelu activations, both kinds.
        rotary: Tensors that are rotated by position.
        recurrent: The recurrent operator that its steps are, or "".
    """

    make: Callable[[], tuple[Any, dict[str, Any], str]]
    attention: int
    layer_norm: int = 0
    rms_norm: int = 0
    gelu: int = 0
    rotary: int = 0
    recurrent: str = ""

    def expected(self) -> dict[str, int]:
        """Operators that must be found, by name."""
        counts = {
            "Attention": self.attention,
            "LayerNormalization": self.layer_norm,
            "RMSNormalization": self.rms_norm,
            "Gelu": self.gelu,
            "RotaryEmbedding": self.rotary,
            **({self.recurrent: 1} if self.recurrent else {}),
        }
        return {name: count for name, count in counts.items() if count}


_TEXT = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
_VISION = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
)
_DECODER = dict(d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4)


def _ids(*shape: int) -> Any:
    import torch

    return torch.randint(3, 50, shape)


def _mask(*shape: int) -> Any:
    import torch

    return torch.ones(shape, dtype=torch.long)


def _pixels(batch: int, size: int = 16) -> Any:
    import torch

    return torch.randn(batch, 3, size, size)


def _text_model(kind: str, **more: Any) -> Callable[[], tuple[Any, dict[str, Any], str]]:
    def make() -> tuple[Any, dict[str, Any], str]:
        import transformers

        config = getattr(transformers, f"{kind}Config")(**{**_TEXT, "use_cache": False, **more})
        model = getattr(transformers, f"{kind}Model")(config)
        return model, {"input_ids": _ids(2, 7), "attention_mask": _mask(2, 7)}, "last_hidden_state"

    return make


def _t5() -> tuple[Any, dict[str, Any], str]:
    import transformers

    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, use_cache=False
    )
    inputs = {"input_ids": _ids(2, 7), "attention_mask": _mask(2, 7)}
    return transformers.T5EncoderModel(config), inputs, "last_hidden_state"


def _clip() -> tuple[Any, dict[str, Any], str]:
    import transformers

    config = transformers.CLIPConfig(
        text_config={**_TEXT, "max_position_embeddings": 20}, vision_config=_VISION, projection_dim=16
    )
    inputs = {"input_ids": _ids(2, 7), "pixel_values": _pixels(2), "attention_mask": _mask(2, 7)}
    return transformers.CLIPModel(config), inputs, "logits_per_image"


def _siglip() -> tuple[Any, dict[str, Any], str]:
    import transformers

    config = transformers.SiglipConfig(text_config={**_TEXT, "max_position_embeddings": 20}, vision_config=_VISION)
    return transformers.SiglipModel(config), {"input_ids": _ids(2, 20), "pixel_values": _pixels(2)}, "logits_per_image"


def _vit() -> tuple[Any, dict[str, Any], str]:
    import transformers

    return transformers.ViTModel(transformers.ViTConfig(**_VISION)), {"pixel_values": _pixels(2)}, "last_hidden_state"


def _whisper() -> Any:
    import transformers

    config = transformers.WhisperConfig(
        **_DECODER, vocab_size=64, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=10,
        max_target_positions=12, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        use_cache=False,
    )  # fmt: skip
    return transformers.WhisperModel(config)


def _whisper_encoder() -> tuple[Any, dict[str, Any], str]:
    import torch

    return _whisper().encoder, {"input_features": torch.randn(1, 8, 20)}, "last_hidden_state"


def _whisper_decoder() -> tuple[Any, dict[str, Any], str]:
    import torch

    inputs = {"input_ids": _ids(1, 5), "encoder_hidden_states": torch.randn(1, 10, 32)}
    return _whisper().decoder, inputs, "last_hidden_state"


def _bart() -> tuple[Any, dict[str, Any], str]:
    import transformers

    config = transformers.BartConfig(
        **_DECODER, vocab_size=64, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=20, use_cache=False
    )
    inputs = {"input_ids": _ids(2, 7), "attention_mask": _mask(2, 7), "decoder_input_ids": _ids(2, 5)}
    return transformers.BartModel(config), inputs, "last_hidden_state"


def _wav2vec2() -> tuple[Any, dict[str, Any], str]:
    import torch
    import transformers

    config = transformers.Wav2Vec2Config(
        **{**_TEXT, "vocab_size": 32}, conv_dim=(16, 16), conv_stride=(4, 4), conv_kernel=(8, 8),
        num_feat_extract_layers=2, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4,
        feat_extract_norm="layer", do_stable_layer_norm=True,
    )  # fmt: skip
    return transformers.Wav2Vec2Model(config), {"input_values": torch.randn(1, 400)}, "last_hidden_state"


def _swin() -> tuple[Any, dict[str, Any], str]:
    import transformers

    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4
    )
    return transformers.SwinModel(config), {"pixel_values": _pixels(1, 32)}, "last_hidden_state"


def _distilbert() -> tuple[Any, dict[str, Any], str]:
    import transformers

    config = transformers.DistilBertConfig(
        vocab_size=64, dim=32, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=40
    )
    inputs = {"input_ids": _ids(2, 7), "attention_mask": _mask(2, 7)}
    return transformers.DistilBertModel(config), inputs, "last_hidden_state"


def _gpt2() -> tuple[Any, dict[str, Any], str]:
    import transformers

    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=40, use_cache=False)
    inputs = {"input_ids": _ids(2, 7), "attention_mask": _mask(2, 7)}
    return transformers.GPT2Model(config), inputs, "last_hidden_state"


def _encoder_layer() -> tuple[Any, dict[str, Any], str]:
    import torch

    return torch.nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), {"src": torch.randn(2, 7, 32)}, ""


def _steps(kind: str) -> Callable[[], tuple[Any, dict[str, Any], str]]:
    """A cell that somebody calls step by step."""

    def make() -> tuple[Any, dict[str, Any], str]:
        import torch

        class Steps(torch.nn.Module):  # type: ignore[misc]  # torch is untyped here
            def __init__(self) -> None:
                super().__init__()
                self.cell = getattr(torch.nn, f"{kind}Cell")(8, 12)

            def forward(self, x: Any) -> Any:
                state = x.new_zeros(x.shape[0], 12)
                states, found = ((state, state) if kind == "LSTM" else state), []
                for n in range(x.shape[1]):
                    states = self.cell(x[:, n], states)
                    found.append(states[0] if kind == "LSTM" else states)
                return torch.stack(found, dim=1)

        return Steps(), {"x": torch.randn(2, 7, 8)}, ""

    return make


ARCHITECTURES = {
    "bert": Architecture(_text_model("Bert", max_position_embeddings=40), 2, layer_norm=5, gelu=2),
    "distilbert": Architecture(_distilbert, 2, layer_norm=5, gelu=2),
    "clip": Architecture(_clip, 4, layer_norm=11),
    "siglip": Architecture(_siglip, 5, layer_norm=11, gelu=5),
    "vit": Architecture(_vit, 2, layer_norm=5, gelu=2),
    "swin": Architecture(_swin, 4, layer_norm=11, gelu=4),
    "whisper-encoder": Architecture(_whisper_encoder, 2, layer_norm=5, gelu=4),
    "whisper-decoder": Architecture(_whisper_decoder, 4, layer_norm=7, gelu=2),
    "wav2vec2": Architecture(_wav2vec2, 2, layer_norm=8, gelu=5),
    "bart": Architecture(_bart, 6, layer_norm=12, gelu=4),
    "t5": Architecture(_t5, 2, rms_norm=5),
    "gpt2": Architecture(_gpt2, 2, layer_norm=5, gelu=2),
    "llama": Architecture(_text_model("Llama", num_key_value_heads=2), 2, rms_norm=5, rotary=4),
    "gemma2": Architecture(_text_model("Gemma2", num_key_value_heads=2, head_dim=8), 2, rms_norm=9, gelu=2, rotary=4),
    "neox": Architecture(_text_model("GPTNeoX"), 2, layer_norm=3, gelu=2, rotary=4),
    "encoder-layer": Architecture(_encoder_layer, 1, layer_norm=2),
    "lstm-steps": Architecture(_steps("LSTM"), 0, recurrent="LSTM"),
    "gru-steps": Architecture(_steps("GRU"), 0, recurrent="GRU"),
    "rnn-steps": Architecture(_steps("RNN"), 0, recurrent="RNN"),
}
"""By name; layers are two of each, with a layer for every part that the real model has."""


def unsupported(name: str, exporter: str, opset: int, implementation: str, dynamic: bool) -> str:
    """Why ``name`` cannot be exported so, or "" where it can."""
    ways = (implementation, exporter, f"{exporter} {opset}", f"{exporter} {opset} dynamic" if dynamic else "")
    return next((reason for (model, way), reason in UNSUPPORTED.items() if model == name and way in ways), "")


def export(name: str, exporter: str, opset: int, implementation: str, dynamic: bool, path: pathlib.Path) -> None:
    """Write the architecture ``name`` to ``path`` as one exporter spells it."""
    import torch

    torch.manual_seed(0)
    model, inputs, output = ARCHITECTURES[name].make()
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation(implementation)
    wrapped = _wrapper(model.eval(), tuple(inputs), output)
    sizes = {n: {0: "batch", 1: f"{n}_length"} if t.dtype == torch.int64 else {0: "batch"} for n, t in inputs.items()}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if exporter == "dynamo":
            auto = torch.export.Dim.AUTO
            shapes = tuple(dict.fromkeys(axes, auto) for axes in sizes.values())
            torch.onnx.export(
                wrapped, tuple(inputs.values()), str(path), dynamo=True, opset_version=opset, verbose=False,
                input_names=list(inputs), dynamic_shapes=(shapes,) if dynamic else None,
            )  # fmt: skip
            return
        torch.onnx.export(
            wrapped, tuple(inputs.values()), str(path), dynamo=False, opset_version=opset, input_names=list(inputs),
            dynamic_axes=sizes if dynamic else None,
        )  # fmt: skip


def _wrapper(model: Any, names: tuple[str, ...], output: str) -> Any:
    import torch

    class Wrapped(torch.nn.Module):  # type: ignore[misc]  # torch is untyped here
        """Takes its inputs by position and gives one output."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, *arguments: Any) -> Any:
            if not output:
                return self.inner(*arguments)
            return getattr(self.inner(**dict(zip(names, arguments, strict=True)), return_dict=True), output)

    return Wrapped().eval()
