"""Small transformers: those of the library ``transformers`` with small sizes, and one with learned latents."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 64
CLASSES = 10


class _Wrapped(nn.Module):
    def __init__(self, cls: type[nn.Module], config: transformers.PreTrainedConfig) -> None:
        super().__init__()
        config.use_cache = False
        self.body = cls._from_config(config, attn_implementation="sdpa")


class Bert(_Wrapped):
    """Encoder with a classifier on the pooled state."""

    def __init__(self) -> None:
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
        config = transformers.BertConfig(vocab_size=VOCABULARY, max_position_embeddings=16, **sizes)
        super().__init__(transformers.BertModel, config)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Ids ``[B, T]`` to logits."""
        return self.head(self.body(input_ids).pooler_output)


class Albert(_Wrapped):
    """One layer applied three times."""

    def __init__(self) -> None:
        sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
        config = transformers.AlbertConfig(
            vocab_size=VOCABULARY, embedding_size=16, max_position_embeddings=16, **sizes
        )
        super().__init__(transformers.AlbertModel, config)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Ids ``[B, T]`` to logits."""
        return self.head(self.body(input_ids).pooler_output)


class Gpt2(_Wrapped):
    """Decoder with packed projections."""

    def __init__(self) -> None:
        config = transformers.GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=32, n_layer=2, n_head=4)
        super().__init__(transformers.GPT2LMHeadModel, config)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Ids ``[B, T]`` to logits over the words."""
        return self.body(input_ids).logits


class Llama(_Wrapped):
    """Decoder with two heads of keys for four of queries."""

    def __init__(self) -> None:
        config = transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=16,
        )
        super().__init__(transformers.LlamaForCausalLM, config)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Ids ``[B, T]`` to logits over the words."""
        return self.body(input_ids).logits


class T5(_Wrapped):
    """Encoder and decoder."""

    def __init__(self) -> None:
        config = transformers.T5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=8,
        )
        nn.Module.__init__(self)
        config.use_cache = False
        self.body = transformers.T5ForConditionalGeneration._from_config(config)

    def forward(self, input_ids: Tensor, target: Tensor) -> Tensor:
        """Ids ``[B, S]`` and ``[B, T]`` to logits over the words."""
        return self.body(input_ids=input_ids, decoder_input_ids=target).logits


class WhisperDecoder(nn.Module):
    """Decoder that attends to states ``[B, S, 32]``."""

    def __init__(self) -> None:
        super().__init__()
        config = transformers.WhisperConfig(
            vocab_size=VOCABULARY,
            d_model=32,
            decoder_layers=2,
            decoder_attention_heads=4,
            decoder_ffn_dim=48,
            max_target_positions=16,
            pad_token_id=0,
            use_cache=False,
        )
        config._attn_implementation = "sdpa"
        self.body = transformers.models.whisper.modeling_whisper.WhisperDecoder(config)

    def forward(self, input_ids: Tensor, states: Tensor) -> Tensor:
        """Ids ``[B, T]`` and states to logits over the words."""
        hidden = self.body(input_ids=input_ids, encoder_hidden_states=states).last_hidden_state
        return hidden @ self.body.embed_tokens.weight.T


class Wav2Vec2(_Wrapped):
    """Waveforms ``[B, 2000]``."""

    def __init__(self) -> None:
        config = transformers.Wav2Vec2Config(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            conv_dim=(16, 16, 20),
            conv_stride=(5, 4, 2),
            conv_kernel=(10, 8, 4),
            num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=4,
            num_feat_extract_layers=3,
        )
        super().__init__(transformers.Wav2Vec2Model, config)
        nn.utils.parametrize.remove_parametrizations(self.body.encoder.pos_conv_embed.conv, "weight")
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Waveform to logits of every frame."""
        return self.head(self.body(x).last_hidden_state)


class Deit(_Wrapped):
    """Patches with a class token and a distillation token."""

    def __init__(self) -> None:
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
        config = transformers.DeiTConfig(image_size=32, patch_size=8, **sizes)
        super().__init__(transformers.DeiTModel, config)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Image to logits."""
        states = self.body(x).last_hidden_state
        return self.head(states[:, 0]) + self.head(states[:, 1])


class Swin(_Wrapped):
    """Windows of four by four, shifted in every second layer; patches are merged between the stages."""

    def __init__(self) -> None:
        config = transformers.SwinConfig(
            image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, mlp_ratio=2.0
        )
        super().__init__(transformers.SwinModel, config)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Image to logits."""
        return self.head(self.body(x).last_hidden_state.mean(1))


class Latents(nn.Module):
    """Eight learned latents attend to a series ``[B, T, 24]``, then to each other (Jaegle, 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, 8, 32))
        self.across = nn.MultiheadAttention(32, 4, kdim=24, vdim=24, batch_first=True)
        self.within = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, norm_first=True)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Series to logits."""
        latents = self.latents.expand(x.shape[0], -1, -1)
        latents = latents + self.across(latents, x, x, need_weights=False)[0]
        return self.head(self.within(latents).mean(1))
