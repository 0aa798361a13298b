"""A report says what the directory is before it judges, and calls nothing ready whose tensors nobody judged."""

import json
import re
import shutil

import numpy as np
import pytest
from multimodal_models import save_multimodal

from doctor.api import check
from doctor.core.recipe import Recipe
from doctor.lint.testing import shard_bytes, tiny
from doctor.model.directory_kind import KINDS
from doctor.report.formats.terminal import render
from doctor.report.verdict import verdict

RECIPE = Recipe(group_size=32)
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
SEQ = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "vocab_size": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
PATCHES = {"image_size": 32, "patch_size": 8}
TEXT = SIZES | {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    "BartForConditionalGeneration": ("encoder-decoder", SEQ),
    "T5ForConditionalGeneration": (
        "encoder-decoder",
        {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 96},
    ),
    "WhisperForConditionalGeneration": ("audio", SEQ),
    "ViTForImageClassification": ("vision", SIZES | PATCHES),
    "CLIPModel": ("two-encoders", {"text_config": TEXT, "vision_config": SIZES | PATCHES}),
    "BertForMaskedLM": ("encoder", TEXT),
    "LlamaModel": ("decoder", TEXT),
    "Qwen2ForSequenceClassification": ("decoder", TEXT | {"num_key_value_heads": 2}),
    "LlamaForCausalLM": ("decoder", TEXT),
}
NOT_QUANTIZED = ("encoder-decoder", "audio", "vision", "two-encoders")


def judged(folder, **options):
    report = check(folder, RECIPE, **options)
    assert not report.crashed, [r.crashed for r in report.crashed]
    return report


@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers_are_named_by_kind(name, tmp_path):
    import transformers

    kind, sizes = MODELS[name]
    owner = getattr(transformers, name)
    owner(owner.config_class(**sizes)).save_pretrained(tmp_path)
    report = judged(tmp_path)
    assert report.summary["kind"] == kind
    assert bool({"G330", "G336"} & {f.code for f in report.findings}) is (kind in NOT_QUANTIZED)
    lines = render([report]).splitlines()
    assert str(KINDS[kind]) in lines[0] or str(KINDS[kind]) in " ".join(lines[:2]), lines[:3]


def test_a_multimodal_model_is_named(tmp_path):
    report = judged(save_multimodal("gemma3", tmp_path))
    assert report.summary["kind"] == "multimodal" and "G330" not in {f.code for f in report.findings}


def put(folder, **files):
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def test_directories_that_hold_no_checkpoint_are_named_and_never_ready(tmp_path):
    """With all rules, and with rules alone that look at no tensor."""
    config = json.dumps(tiny("llama").config).encode()
    pipeline = b'{"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}'
    cases = {
        "empty": {},
        "gguf": {"model.gguf": b"GGUF\3\0\0\0", "config.json": config},
        "onnx": {"model.onnx": b"\x08\x07", "config.json": config},
        "pickle": {"pytorch_model.bin": b"PK", "config.json": config},
        "configuration": {"config.json": config},
        "pipeline": {"model_index.json": pipeline},
        "other": {"notes.txt": b"x"},
    }
    for kind, files in cases.items():
        folder = put(tmp_path / kind, **files)
        report = judged(folder)
        assert report.summary["kind"] == kind and not report.ok
        few = judged(folder, select=["C148", "C149"])
        mark, sentence = verdict(few)
        assert mark == "skipped" and "was judged" in sentence, (kind, sentence)
        assert "✓ ready" not in render([few]) and str(KINDS[kind]) in render([few])


def test_tensors_without_a_config_and_an_adapter_are_named(tmp_path):
    case = tiny("llama")
    case.write(tmp_path / "state")
    (tmp_path / "state" / "config.json").unlink()
    assert judged(tmp_path / "state").summary["kind"] == "state-dict"
    (tmp_path / "adapter").mkdir()
    weight = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": np.zeros((4, 64), np.float32)}
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(shard_bytes(weight, dict.fromkeys(weight, "F32")))
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    assert judged(tmp_path / "adapter").summary["kind"] == "adapter"


def test_a_model_quantized_by_mlx_is_served_as_it_is_and_not_quantized_again(tmp_path):
    case = tiny("llama")
    case.write(tmp_path / "plain")
    assert judged(tmp_path / "plain").summary["kind"] == "decoder"
    shutil.copytree(tmp_path / "plain", tmp_path / "packed")
    for name in [n for n in case.tensors if case.tensors[n].ndim == 2]:
        rows, columns = case.tensors[name].shape
        case.tensors[name], case.dtypes[name] = np.zeros((rows, columns // 8), np.uint32), "U32"
        for tail in ("scales", "biases"):
            part = name.replace("weight", tail)
            case.tensors[part], case.dtypes[part] = np.full((rows, columns // 32), 0x3F80, np.uint16), "BF16"
    case.config["quantization"] = {"group_size": 32, "bits": 4}
    report = judged(case.write(tmp_path / "mlx"))
    assert report.summary["kind"] == "mlx"
    assert [f.code for f in report.findings if f.severity == "error"] == []
    report = check(tmp_path / "mlx", Recipe(goal="quantize"))
    assert [f.code for f in report.findings if f.severity == "error" and not f.consequence_of] == ["G330"]


def test_every_kind_has_words_and_a_healthy_model_says_its_own(tmp_path):
    report = judged(tiny("llama").write(tmp_path / "model"))
    assert verdict(report)[0] == "ok"
    first, second = render([report]).splitlines()
    assert "model · LlamaForCausalLM" in first and second.startswith("  decoder LM · ")


def test_an_area_without_what_it_is_compared_with_is_not_ticked(tmp_path):
    (tmp_path / "empty").mkdir()
    case = tiny()
    case.write(tmp_path / "m")
    (tmp_path / "m" / "config.json").unlink()
    for name, areas in (("empty", ("Tensors", "Tokenizer", "Geometry")), ("m", ("Tensors", "Tokenizer"))):
        shown = render([check(tmp_path / name)])
        for area in areas:
            assert re.search(rf"○ +{area} .*not +judged", shown), (name, area, shown)
