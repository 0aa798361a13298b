"""Tiny checkpoints that can be written as GGUF, and runs that write them."""

import json

import numpy as np

from doctor.core.recipe import Recipe
from doctor.formats.schemes import fields_of
from doctor.lint.testing import tiny
from doctor.quant.quantize import quantize

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "mixtral", "qwen2_moe", "qwen3_moe")


def model(family, folder):
    """A tiny checkpoint whose tokenizer is BPE with bytes to fall back on."""
    case = tiny(family)
    vocabulary = case.json["tokenizer.json"]["model"]["vocab"]
    case.json["tokenizer.json"]["model"] = {
        "type": "BPE",
        "byte_fallback": True,
        "unk_token": "<unk>",
        "vocab": vocabulary,
        "merges": [],
    }
    if family == "gemma3_text":
        case.config["architectures"] = ["Gemma3ForCausalLM"]
        case.config["layer_types"] = ["sliding_attention"] * case.config["num_hidden_layers"]
        case.config["query_pre_attn_scalar"] = case.config["head_dim"]
    if family == "qwen3_moe":
        case.config["norm_topk_prob"] = True
    return case.write(folder)


def rows(folder):
    path = folder / "ids.jsonl"
    rng = np.random.default_rng(1)
    path.write_text("\n".join(json.dumps({"input_ids": rng.integers(3, 96, 48).tolist()}) for _ in range(8)))
    return path


def run(source, out, scheme="Q8_0", **options):
    recipe = Recipe(**fields_of(scheme, options.pop("fields", {})))
    calibration = None if recipe.method == "rtn" else rows(out.parent)
    return quantize(source, out, recipe, calibration=calibration, ignore=["Q"], **options)
