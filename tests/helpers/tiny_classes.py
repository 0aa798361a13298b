"""Tiny random checkpoints of any class of transformers, saved by the class itself.

`CLASSES` names what people quantize: text models, mixtures, vision and audio models, hybrids, encoders, reward models.
Sizes come from one table for the language model and one for towers; a row adds what its class needs besides.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from healthy_models import OWN, SIZES

from doctor.lint.testing import tiny

# Towers, and every object of a config that is not the language model's.
TOWER = {
    "hidden_size": 64,
    "embed_dim": 64,
    "d_model": 64,
    "intermediate_size": 128,
    "depth": 2,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_attention_heads": 2,
    "num_heads": 2,
    "num_key_value_heads": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 128,
    "head_dim": 32,
    "image_size": 32,
    "patch_size": 16,
    "out_hidden_size": 128,
    "output_dim": 128,
    "projection_dim": 128,
    "num_mel_bins": 16,
    "vocab_size": 96,
    "num_experts": 4,
}
# Encoders and decoders of a text model of two halves.
BOTH = {
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 256,
    "decoder_ffn_dim": 256,
    "d_kv": 32,
    "decoder_start_token_id": 0,
    "num_mel_bins": 16,
}
TEXT = SIZES | BOTH | {"num_hidden_layers": 4, "n_layer": 4, "n_layers": 4, "num_layers": 4}
LANGUAGE = ("text_config", "llm_config", "language_config", "thinker_config", "talker_config", "decoder", "encoder")


class Row(NamedTuple):
    """A class and what its config needs besides the sizes. mtp: with a layer of multi-token prediction under a prefix
    of its own, as Qwen publishes them; transformers passes over it. stored: how its linears are stored, "" for 16 bits
    (stored_sources.py). named: parts of names that save_pretrained writes otherwise than the model is published, and
    the published ones.
    """

    architecture: str
    config: Mapping[str, Any] = MappingProxyType({})
    mtp: bool = False
    stored: str = ""
    named: Mapping[str, str] = MappingProxyType({})


def mrope(*section: int, **more) -> dict:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(section), **more}}


VISION = {"depth": 2, "hidden_size": 64, "num_heads": 2, "out_hidden_size": 128, "patch_size": 16}
SPECIAL = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
AUDIO = {"audio_token_id": 94, "image_token_id": 90, "video_token_id": 91}
QWEN_VL = {"text_config": mrope(4, 6, 6), "vision_config": VISION, **SPECIAL}
LATENT = {"num_key_value_heads": 4}

CLASSES: dict[str, Row] = {
    # controls and dense text models
    "Llama": Row("LlamaForCausalLM"),
    "Qwen3": Row("Qwen3ForCausalLM"),
    "Ministral3": Row("Ministral3ForCausalLM"),
    "GLM-4": Row("Glm4ForCausalLM"),
    "Gemma3n-text": Row("Gemma3nForCausalLM", OWN["gemma3n_text"] | {"num_hidden_layers": 3}),
    "Gemma4-text": Row("Gemma4ForCausalLM", {"hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 96}),
    "Gemma4-MoE-text": Row(
        "Gemma4ForCausalLM",
        {
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 64,
        },
    ),
    "openai-gpt": Row("OpenAIGPTLMHeadModel"),
    "GPT-2": Row("GPT2LMHeadModel"),
    # mixtures
    "Qwen3-MoE": Row("Qwen3MoeForCausalLM"),
    "Mixtral": Row("MixtralForCausalLM"),
    "DeepSeek-V3": Row("DeepseekV3ForCausalLM", LATENT),
    "DeepSeek-V3.2": Row("DeepseekV32ForCausalLM", LATENT | {"index_n_heads": 2, "index_head_dim": 64}),
    "DeepSeek-V4": Row("DeepseekV4ForCausalLM"),
    "GLM-4.5": Row("Glm4MoeForCausalLM"),
    "GLM-4.7-Flash": Row("Glm4MoeLiteForCausalLM", LATENT),
    "GLM-5": Row("GlmMoeDsaForCausalLM", LATENT | {"index_n_heads": 2, "index_head_dim": 64}),
    "MiniMax": Row("MiniMaxForCausalLM"),
    "MiniMax-M2": Row("MiniMaxM2ForCausalLM"),
    "gpt-oss": Row("GptOssForCausalLM"),
    "Trinity": Row("AfmoeForCausalLM"),
    "dots1": Row("Dots1ForCausalLM", {"n_shared_experts": 1}),
    "EXAONE-MoE": Row("ExaoneMoeForCausalLM"),
    "FlexOlmo": Row("FlexOlmoForCausalLM"),
    "MiMo-V2": Row("MiMoV2FlashForCausalLM"),
    "Cohere2-MoE": Row("Cohere2MoeForCausalLM"),
    "Solar-Open": Row("SolarOpenForCausalLM"),
    "HY-V3": Row("HYV3ForCausalLM"),
    "HY-V4": Row("HYV4ForCausalLM"),
    "Laguna": Row("LagunaForCausalLM"),
    "Mellum": Row("MellumForCausalLM"),
    "A.X-K1": Row("AXK1ForCausalLM", LATENT),
    "A.X-K2": Row("AXK2ForCausalLM", LATENT),
    "Flint": Row("FlintForCausalLM"),
    "OLMoE": Row("OlmoeForCausalLM"),
    "Ernie4.5-MoE": Row("Ernie4_5_MoeForCausalLM"),
    "PhiMoE": Row("PhimoeForCausalLM"),
    "Granite-MoE": Row("GraniteMoeForCausalLM"),
    "Qwen4-exp": Row(
        "Qwen4ExpForCausalLM",
        {
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 32,
            "indexer_budget": 64,
            "indexer_compress_ratio": 4,
            "ple_layer_ids": [],
        },
    ),
    "LongCat": Row("LongcatFlashForCausalLM", LATENT),
    "Mistral-4": Row("Mistral4ForCausalLM", LATENT | {"head_dim": 64}),
    "Inkling-text": Row("InklingForCausalLM"),
    "Kolibri-1": Row("Kolibri1ForCausalLM"),
    "Apertus-1.5": Row("Apertus1p5TextForCausalLM"),
    "Dots3-Note": Row("Dots3NoteForCausalLM", LATENT),
    # hybrids and state spaces
    "Qwen3-Next": Row("Qwen3NextForCausalLM"),
    "Qwen3.5-text": Row("Qwen3_5ForCausalLM"),
    "Qwen3.5-MoE-text": Row("Qwen3_5MoeForCausalLM"),
    "Qwen3-Next+mtp": Row("Qwen3NextForCausalLM", mtp=True),
    "Qwen3.5-text+mtp": Row("Qwen3_5ForCausalLM", mtp=True),
    "Jamba": Row("JambaForCausalLM", OWN["jamba"]),
    "LFM2": Row("Lfm2ForCausalLM", {"layer_types": ["conv", "conv", "full_attention", "conv"]}),
    "LFM2-MoE": Row(
        "Lfm2MoeForCausalLM", {"layer_types": ["conv", "conv", "full_attention", "conv"], "num_dense_layers": 1}
    ),
    "Kimi-Linear": Row("KimiLinearForCausalLM", OWN["kimi_linear"] | LATENT),
    "Nemotron-H": Row("NemotronHForCausalLM", OWN["nemotron_h"]),
    "Granite4-hybrid": Row("GraniteMoeHybridForCausalLM", OWN["granitemoehybrid"] | {"num_hidden_layers": 3}),
    "Falcon-H1": Row("FalconH1ForCausalLM"),
    "Bamba": Row("BambaForCausalLM", OWN["bamba"]),
    "Zamba": Row("ZambaForCausalLM", OWN["zamba"]),
    "Zamba2": Row("Zamba2ForCausalLM", OWN["zamba2"] | {"num_hidden_layers": 3}),
    "OLMo-hybrid": Row("OlmoHybridForCausalLM"),
    "Zaya": Row("ZayaForCausalLM", OWN["zaya"]),
    "Mamba": Row("MambaForCausalLM"),
    "Mamba-2": Row("Mamba2ForCausalLM", OWN["mamba2"]),
    "Falcon-Mamba": Row("FalconMambaForCausalLM"),
    "RWKV": Row("RwkvForCausalLM"),
    "xLSTM": Row("xLSTMForCausalLM"),
    # published in codes
    "DeepSeek-V3 FP8": Row("DeepseekV3ForCausalLM", LATENT, stored="fp8-block"),
    "Qwen3 FP8 channels": Row("Qwen3ForCausalLM", stored="fp8-channel"),
    "Kimi-K2 INT4": Row("DeepseekV3ForCausalLM", LATENT, stored="int4-experts"),
    "gpt-oss MXFP4": Row("GptOssForCausalLM", stored="mxfp4"),
    "Llama NVFP4": Row("LlamaForCausalLM", stored="nvfp4"),
    "Qwen3 ModelOpt NVFP4": Row("Qwen3ForCausalLM", stored="modelopt"),
    "Llama bitsandbytes": Row("LlamaForCausalLM", stored="bitsandbytes"),
    # vision and audio
    "Qwen2-VL": Row(
        "Qwen2VLForConditionalGeneration", QWEN_VL | {"vision_config": {"embed_dim": 64, "hidden_size": 128}}
    ),
    "Qwen2.5-VL": Row("Qwen2_5_VLForConditionalGeneration", QWEN_VL),
    "Qwen3-VL": Row("Qwen3VLForConditionalGeneration", QWEN_VL | {"vision_config": {"deepstack_visual_indexes": [1]}}),
    "Qwen3-VL-MoE": Row(
        "Qwen3VLMoeForConditionalGeneration", QWEN_VL | {"vision_config": {"deepstack_visual_indexes": [1]}}
    ),
    "Qwen3.5": Row(
        "Qwen3_5ForConditionalGeneration", SPECIAL | {"text_config": mrope(2, 1, 1, partial_rotary_factor=0.25)}
    ),
    "Qwen3.5-MoE": Row(
        "Qwen3_5MoeForConditionalGeneration", SPECIAL | {"text_config": mrope(2, 1, 1, partial_rotary_factor=0.25)}
    ),
    "Qwen2.5-Omni-thinker": Row("Qwen2_5OmniThinkerForConditionalGeneration", QWEN_VL | AUDIO),
    "Qwen3-Omni-thinker": Row(
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        QWEN_VL | AUDIO | {"vision_config": {"deepstack_visual_indexes": [1]}},
    ),
    "GLM-4.1V": Row(
        "Glm4vForConditionalGeneration", SPECIAL | {"text_config": mrope(4, 2, 2, partial_rotary_factor=0.5)}
    ),
    "GLM-4.5V": Row(
        "Glm4vMoeForConditionalGeneration", SPECIAL | {"text_config": mrope(4, 2, 2, partial_rotary_factor=0.5)}
    ),
    "GLM-4.6V": Row(
        "Glm46VForConditionalGeneration", SPECIAL | {"text_config": mrope(4, 2, 2, partial_rotary_factor=0.5)}
    ),
    "GLM-OCR": Row("GlmOcrForConditionalGeneration", SPECIAL | {"text_config": mrope(4, 6, 6)}),
    "PaddleOCR-VL": Row("PaddleOCRVLForConditionalGeneration", SPECIAL | {"text_config": mrope(4, 6, 6)}),
    "DeepSeek-OCR-2": Row(
        "DeepseekOcr2ForConditionalGeneration",
        {"text_config": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}},
    ),
    "HunYuan-VL": Row("HunYuanVLForConditionalGeneration", {"text_config": mrope(4, 4, 4, 4)}),
    "Ernie4.5-VL": Row(
        "Ernie4_5_VLMoeForConditionalGeneration", {"text_config": {"moe_intermediate_size": [64, 32]} | mrope(4, 4, 8)}
    ),
    "Llama3.2-Vision": Row("MllamaForConditionalGeneration"),
    "Llama4": Row("Llama4ForConditionalGeneration"),
    "Gemma3": Row("Gemma3ForConditionalGeneration", {"vision_config": {"image_size": 32}, "mm_tokens_per_image": 4}),
    "Gemma3n": Row("Gemma3nForConditionalGeneration", {"text_config": OWN["gemma3n_text"] | {"num_hidden_layers": 3}}),
    "Gemma4": Row(
        "Gemma4ForConditionalGeneration",
        {"text_config": {"hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 96}},
    ),
    "Mistral3": Row("Mistral3ForConditionalGeneration"),
    "LLaVA": Row("LlavaForConditionalGeneration"),
    "LLaVA-OneVision": Row("LlavaOnevisionForConditionalGeneration"),
    "InternVL": Row("InternVLForConditionalGeneration"),
    "SmolVLM": Row("SmolVLMForConditionalGeneration"),
    "Idefics3": Row("Idefics3ForConditionalGeneration"),
    "LFM2-VL": Row("Lfm2VlForConditionalGeneration"),
    "MiniCPM-V-4.6": Row("MiniCPMV4_6ForConditionalGeneration"),
    "Aria": Row("AriaForConditionalGeneration"),
    "Molmo2": Row(
        "Molmo2ForConditionalGeneration",
        {"vision_config": {"image_size": [32, 32]}, "adapter_config": {"vision_feature_layer": [1, 0]}},
    ),
    "Granite4-Vision": Row(
        "Granite4VisionForConditionalGeneration",
        {"image_grid_pinpoints": [[32, 32]], "deepstack_layer_map": [], "downsample_rate": "1/2"},
    ),
    "Phi-4-mm": Row("Phi4MultimodalForCausalLM"),
    "LLaVA-NeXT": Row("LlavaNextForConditionalGeneration"),
    "PaliGemma": Row("PaliGemmaForConditionalGeneration"),
    "DeepSeek-VL-hybrid": Row("DeepseekVLHybridForConditionalGeneration"),
    "Gemma4-unified": Row("Gemma4UnifiedForConditionalGeneration"),
    "InstructBLIP": Row("InstructBlipForConditionalGeneration"),
    "MiniMax-M3-VL": Row("MiniMaxM3SparseForConditionalGeneration"),
    "Muse-Glimmer": Row("MuseGlimmerForConditionalGeneration"),
    "Step-3.7": Row("Step3p7ForConditionalGeneration"),
    "Voxtral": Row("VoxtralForConditionalGeneration"),
    "Qwen2-Audio": Row("Qwen2AudioForConditionalGeneration"),
    "Granite-Speech": Row("GraniteSpeechForConditionalGeneration"),
    "Whisper": Row("WhisperForConditionalGeneration"),
    "Aya-Vision": Row("AyaVisionForConditionalGeneration"),
    "Cohere2-Vision": Row("Cohere2VisionForConditionalGeneration"),
    "DeepSeek-VL": Row("DeepseekVLForConditionalGeneration"),
    "EXAONE-4.5": Row("Exaone4_5_ForConditionalGeneration"),
    "GOT-OCR2": Row("GotOcr2ForConditionalGeneration"),
    "LFM3-VL": Row("Lfm3VlForConditionalGeneration"),
    "Mistral-Large-4": Row("MistralLarge4ForConditionalGeneration", {"text_config": LATENT}),
    "Kimi-K2.5": Row(
        "Kimi_K25ForConditionalGeneration",
        {"text_config": LATENT},
        named={"language_model.model.blocks.": "language_model.model.layers."},
    ),
    "Ovis2": Row("Ovis2ForConditionalGeneration"),
    "Inkling": Row("InklingForConditionalGeneration"),
    "ViP-LLaVA": Row("VipLlavaForConditionalGeneration"),
    "Idefics2": Row("Idefics2ForConditionalGeneration"),
    "BLIP-2": Row("Blip2ForConditionalGeneration"),
    # encoders, two halves, embedders, reward models
    "BERT": Row("BertModel"),
    "XLM-R": Row("XLMRobertaModel"),
    "ModernBERT": Row("ModernBertModel"),
    "T5": Row("T5ForConditionalGeneration"),
    "BART": Row("BartForConditionalGeneration"),
    "T5Gemma": Row("T5GemmaForConditionalGeneration"),
    "T5Gemma-2": Row("T5Gemma2ForConditionalGeneration"),
    "RoFormer": Row("RoFormerForCausalLM"),
    "XLM-R-XL": Row("XLMRobertaXLForCausalLM"),
    "Qwen3-Embedding": Row("Qwen3Model"),
    "EmbeddingGemma": Row("Gemma3TextModel"),
    "Qwen2-reward": Row("Qwen2ForSequenceClassification", {"num_labels": 1}),
    "Llama-reward": Row("LlamaForSequenceClassification", {"num_labels": 1}),
}


def fitting(known: type, sizes: dict, own: Mapping) -> Any:
    """A config of class `known` with those of the sizes that it has, its parts likewise, and `own` on top."""
    import inspect

    parts = getattr(known, "sub_configs", {}) or {}
    default = known()
    fields = set(vars(default)) | set(inspect.signature(known).parameters)
    mapped = getattr(known, "attribute_map", {}) or {}
    fields |= set(mapped)
    chosen = {k: v for k, v in sizes.items() if k in fields and k not in own and k not in parts}
    chosen = {k: v for k, v in chosen.items() if mapped.get(k, k) == k or mapped[k] not in chosen}
    for name in parts:
        part = getattr(default, name, None)
        if part is None:
            continue
        inside = own.get(name, {})
        table = TEXT if name in LANGUAGE else TOWER
        chosen[name] = fitting(type(part), table, inside if isinstance(inside, dict) else {})
    rest = {k: v for k, v in own.items() if k not in parts}
    return known(**(chosen | rest))


def add_mtp(folder: Path) -> None:
    """A layer `mtp.layers.0` with the names of the last decoder layer and other values, and what leads into it."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    last = max(int(n.split(".")[2]) for n in tensors if n.startswith("model.layers."))
    stem = f"model.layers.{last}."
    extra = {f"mtp.layers.0.{n.removeprefix(stem)}": -t for n, t in tensors.items() if n.startswith(stem)}
    width = tensors["model.embed_tokens.weight"].shape[1]
    extra["mtp.fc.weight"] = torch.randn(width, 2 * width).to(torch.bfloat16) * 0.05
    for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        extra[f"mtp.{name}.weight"] = tensors["model.norm.weight"].clone()
    save_file(tensors | extra, folder / "model.safetensors", metadata={"format": "pt"})


def rename(folder: Path, named: Mapping[str, str]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    for old, new in named.items():
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def save_class(row: Row, folder: Path, dtype: str = "bfloat16") -> Path:
    """A tiny random checkpoint of the row's class, with a tokenizer's files beside it."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    known = getattr(transformers, row.architecture)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = fitting(known.config_class, TEXT, row.config)
        model = known(config).to(getattr(torch, dtype))
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:  # some families start a matrix at zero, which no trained model has
                parameter.data.normal_(0, 0.05)
            elif name.endswith("bias"):
                parameter.data.normal_(0, 0.02)
        model.save_pretrained(folder)
    if row.mtp:
        add_mtp(folder)
    if row.named:
        rename(folder, row.named)
    for name, document in tiny("llama").json.items():
        if name.startswith("tokenizer"):
            (folder / name).write_text(json.dumps(document))
    return folder
