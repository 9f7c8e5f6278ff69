"""Known architectures in miniature, by both of torch's exporters, raw, canonical, quantized: always the same towers."""

from __future__ import annotations

import dataclasses
import pathlib
import warnings
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from mmopt.analysis.towers import TowerReport, analyze_towers, extract_entry_points
from mmopt.ir.module import Module
from mmopt.pipeline.base import PassContext
from mmopt.transforms.canonicalize.canonicalize import Canonicalize
from tests.unit.tower_models import run

pytestmark = pytest.mark.slow
torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

TEXT = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=300,
            max_position_embeddings=40)  # fmt: skip
VISION = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32,
              patch_size=8)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """A miniature and what must be found.

    Attributes:
        config: Name of the configuration class.
        model: Name of the model class.
        options: Arguments of the configuration.
        inputs: Names of the inputs, see :func:`example`.
        output: Which output to export.
        groups: Group of each input.
        fusion: Kinds of the fusion points.
        level: Level of fusion.
    """

    config: str
    model: str
    options: dict[str, Any]
    inputs: tuple[str, ...]
    output: str
    groups: tuple[str, ...]
    fusion: tuple[str, ...] = ()
    level: str = ""


DUAL = ("text", "text", "image")
PAIR = ("input_ids", "attention_mask", "pixel_values")
CASES = {
    "clip": Case("CLIPConfig", "CLIPModel", dict(text_config={**TEXT, "eos_token_id": 2}, vision_config=VISION,
                 projection_dim=32), PAIR, "logits_per_image", DUAL, ("similarity",), "feature"),
    "siglip": Case("SiglipConfig", "SiglipModel", dict(text_config={**TEXT, "projection_size": 32},
                   vision_config=VISION), PAIR, "logits_per_image", DUAL, ("similarity",), "feature"),
    "blip": Case("BlipConfig", "BlipForImageTextRetrieval", dict(text_config={**TEXT, "encoder_hidden_size": 32,
                 "bos_token_id": 1, "pad_token_id": 0, "sep_token_id": 2}, vision_config=VISION), PAIR, "itm_score",
                 DUAL, ("attention", "attention"), "deep"),
    "clipseg": Case("CLIPSegConfig", "CLIPSegForImageSegmentation", dict(text_config={**TEXT, "eos_token_id": 2},
                    vision_config=VISION, projection_dim=32, extract_layers=[0, 1], reduce_dim=16,
                    decoder_num_attention_heads=2, decoder_intermediate_size=32), PAIR, "logits", DUAL,
                    ("modulation", "add"), "deep"),
    "llava": Case("LlavaConfig", "LlavaForConditionalGeneration", dict(image_token_index=299, vision_feature_layer=-1),
                  PAIR, "logits", DUAL, ("scatter",), "feature"),
    "visual-bert": Case("VisualBertConfig", "VisualBertModel", dict(**TEXT, visual_embedding_dim=24),
                        ("input_ids", "attention_mask", "visual_embeds", "visual_attention_mask"), "pooler_output",
                        ("text", "text", "modality 1", "modality 1"), ("concat",), "feature"),
    "t5": Case("T5Config", "T5ForConditionalGeneration", dict(d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2,
               vocab_size=300, decoder_start_token_id=0), ("input_ids", "attention_mask", "decoder_input_ids"),
               "logits", ("text", "text", "text 2"), ("attention", "attention"), "deep"),
    "llama": Case("LlamaConfig", "LlamaForCausalLM", dict(**TEXT, num_key_value_heads=2),
                  ("input_ids", "attention_mask", "position_ids"), "logits", ("text",) * 3),
    "layoutlm": Case("LayoutLMConfig", "LayoutLMModel", dict(**TEXT, max_2d_position_embeddings=64),
                     ("input_ids", "bbox", "attention_mask", "token_type_ids"), "last_hidden_state", ("text",) * 4),
    "roberta": Case("RobertaConfig", "RobertaForSequenceClassification", TEXT, ("input_ids", "attention_mask"),
                    "logits", ("text",) * 2),
    "wav2vec2": Case("Wav2Vec2Config", "Wav2Vec2ForCTC", dict(**TEXT, conv_dim=[16, 16], conv_stride=[5, 2],
                     conv_kernel=[10, 3], num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4),
                     ("waveform",), "logits", ("audio",)),
    "ast": Case("ASTConfig", "ASTForAudioClassification", dict(hidden_size=32, intermediate_size=64,
                num_hidden_layers=2, num_attention_heads=2, max_length=64, num_mel_bins=32), ("bands",), "logits",
                ("audio",)),
    "videomae": Case("VideoMAEConfig", "VideoMAEForVideoClassification", dict(**VISION, num_frames=4, tubelet_size=2),
                     ("clip",), "logits", ("video",)),
    "timesformer": Case("TimesformerConfig", "TimesformerForVideoClassification", dict(**VISION, num_frames=4),
                        ("clip",), "logits", ("video",)),
}  # fmt: skip

PARAMETERS = {"waveform": "input_values", "bands": "input_values", "clip": "pixel_values"}
"""Parameter of ``forward`` where it is not the name of the input."""

NOT_TRACED = {("llava", True): "torch's new exporter does not convert its masked scatter"}


def example(case: Case) -> dict[str, Any]:
    ids = torch.randint(2, 290, (2, 7), generator=torch.Generator().manual_seed(0))
    if case.config == "LlavaConfig":
        ids = torch.cat([torch.full((2, 16), 299), ids], 1)
    length = ids.shape[1]
    rng = torch.Generator().manual_seed(1)
    made = {
        "input_ids": ids,
        "decoder_input_ids": ids[:, :5],
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
        "position_ids": torch.arange(length)[None].expand(2, -1).contiguous(),
        "bbox": torch.randint(0, 60, (2, length, 4), generator=rng).sort(-1)[0],
        "pixel_values": torch.randn(2, 3, 32, 32, generator=rng),
        "visual_embeds": torch.randn(2, 5, 24, generator=rng),
        "visual_attention_mask": torch.ones(2, 5),
        "waveform": torch.randn(2, 800, generator=rng),
        "bands": torch.randn(2, 64, 32, generator=rng),
        "clip": torch.randn(2, 4, 3, 32, 32, generator=rng),
    }
    return {name: made[name] for name in case.inputs}


class Wrapped(torch.nn.Module):
    """One output of a model, inputs by position."""

    def __init__(self, case: Case):
        super().__init__()
        options = dict(case.options)
        if case.config == "LlavaConfig":
            options["text_config"] = transformers.LlamaConfig(**TEXT, num_key_value_heads=2)
            options["vision_config"] = transformers.CLIPVisionConfig(**VISION)
        torch.manual_seed(0)
        self.model = getattr(transformers, case.model)(getattr(transformers, case.config)(**options)).eval()
        self.model.config.use_cache = False
        self.names = [PARAMETERS.get(name, name) for name in case.inputs]
        self.output = case.output

    def forward(self, *tensors: Any) -> Any:
        return getattr(self.model(**dict(zip(self.names, tensors, strict=True)), return_dict=True), self.output)


@pytest.fixture(scope="module", name="folder")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("exports")


def export(name: str, dynamo: bool, folder: pathlib.Path) -> pathlib.Path:
    case, path = CASES[name], folder / f"{name}-{dynamo}.onnx"
    if path.exists():
        return path
    wrapped, inputs = Wrapped(case), example(case)
    for part in wrapped.modules():
        if hasattr(part, "config"):
            part.config._attn_implementation = "sdpa" if dynamo else "eager"
    names, outputs = list(inputs), [case.output]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        if dynamo:
            program = torch.onnx.export(wrapped, tuple(inputs.values()), input_names=names, output_names=outputs,
                                        dynamo=True, verbose=False)  # fmt: skip
            program.save(str(path))
        else:
            torch.onnx.export(wrapped, tuple(inputs.values()), str(path), input_names=names, output_names=outputs,
                              dynamo=False, opset_version=14, do_constant_folding=False,
                              dynamic_axes={n: {0: "batch"} for n in names})  # fmt: skip
    return path


def check(report: TowerReport, case: Case) -> None:
    assert tuple(r.group for r in report.inputs.values()) == case.groups
    assert tuple(f.kind for f in report.fusions) == case.fusion
    assert report.level == case.level
    assert len(report.towers) == len(set(case.groups))


def feeds(case: Case) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in example(case).items()}


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_exports(name: str, dynamo: bool, folder: pathlib.Path) -> None:
    if reason := NOT_TRACED.get((name, dynamo)):
        pytest.skip(reason)
    case = CASES[name]
    module = Module(ir.load(export(name, dynamo, folder)))
    report = analyze_towers(module)
    check(report, case)
    if len(report.towers) > 1:
        entries, given = extract_entry_points(module, report), feeds(case)
        between = dict(given)
        for entry in (e for key, e in entries.items() if key != "fuse"):
            between.update(run(entry, given))
        np.testing.assert_array_equal(run(entries["fuse"], between)[case.output], run(module, given)[case.output])
    Canonicalize().run(module, PassContext())
    check(analyze_towers(module), case)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", ["clip", "siglip", "t5", "llama", "wav2vec2"])
def test_quantized(name: str, static: bool, folder: pathlib.Path) -> None:
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.samples = iter([feeds(CASES[name])])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.samples, None)

    source, target = str(export(name, True, folder)), str(folder / f"{name}-{static}-quantized.onnx")
    if static:
        quantization.quantize_static(source, target, Reader(), per_channel=True)
    else:
        quantization.quantize_dynamic(source, target)
    check(analyze_towers(Module(ir.load(target))), CASES[name])
