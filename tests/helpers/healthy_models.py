"""Healthy checkpoints of many families, saved by transformers itself from tiny random models."""

import json
import re
import warnings
from pathlib import Path

from doctor.lint.testing import tiny

# One set of sizes for all; a config class takes those of its own names. All are multiples of 32 but for counts.
SIZES = {
    "hidden_size": 128,
    "n_embd": 128,
    "d_model": 128,
    "dim": 128,
    "word_embed_proj_dim": 128,
    "embedding_size": 128,
    "intermediate_size": 256,
    "ffn_dim": 256,
    "n_inner": 256,
    "ffn_hidden_size": 256,
    "moe_intermediate_size": 64,
    "d_ff": 256,
    "shared_expert_intermediate_size": 64,
    "shared_intermediate_size": 64,
    "block_ff_dim": 256,
    "block_dim": 128,
    "num_hidden_layers": 3,
    "n_layer": 3,
    "n_layers": 3,
    "num_layers": 3,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 32,
    "vocab_size": 96,
    "max_position_embeddings": 256,
    "n_positions": 256,
    "max_seq_len": 256,
    "n_ctx": 256,
    "rotary_dim": 16,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 64,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "num_nextn_predict_layers": 0,  # transformers saves no such layer, and a config that promises one is a finding
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "first_k_dense_replace": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sliding_window": 64,
}

# What single families need besides: because their own defaults are large or ask for numbers that fit each other, and so
# that a model has a decoder layer of every kind.
OWN = {
    # Full attention in every sixth layer by default: without one the class itself cannot tell how long its cache is.
    "bailing_hybrid": {"layer_group_size": 3, "num_key_value_heads": 4},
    "bamba": {"attn_layer_indices": [1]},
    # Latent attention has as many key heads as query heads.
    **{
        family: {"num_key_value_heads": 4}
        for family in (
            *("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32"),
            *("glm4_moe_lite", "glm_moe_dsa", "minicpm3", "youtu"),
        )
    },
    "dots1": {"num_key_value_heads": 2, "n_shared_experts": 1},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 32,
        "vocab_size_per_layer_input": 96,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "activation_sparsity_pattern": None,
    },
    "gemma4_text": {"hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 96},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 3},
    "kimi_linear": {
        "num_hidden_layers": 4,
        "layer_types": [*["linear_attention"] * 3, "full_attention"],
        "q_lora_rank": None,
        "num_key_value_heads": 4,  # as many as heads: its latent attention knows no others
    },
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 32, "head_dim": 8, "n_groups": 1, "state_size": 32},
    "nemotron_h": {"moe_shared_expert_intermediate_size": 256},
    "qwen3_5_moe_text": {"num_hidden_layers": 4},
    "qwen3_5_text": {"num_hidden_layers": 4},
    "qwen3_next": {"num_hidden_layers": 4},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention"],
        "mamba_ngroups": 1,
        "n_mamba_heads": 32,
        "mamba_headdim": 8,
    },
    "zaya": {"num_experts_per_tok": 1},
}


# Families that rules/tables describes.
FAMILIES = [
    "afmoe",
    "apertus",
    "arcee",
    "axk1",
    "bamba",
    "bloom",
    "codegen",
    "cohere",
    "cohere2",
    "cohere2_moe",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "dots1",
    "ernie4_5",
    "ernie4_5_moe",
    "exaone4",
    "exaone_moe",
    "falcon",
    "falcon_h1",
    "flex_olmo",
    "flint",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm",
    "glm4",
    "glm4_moe",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "gpt2",
    "gpt_bigcode",
    "gpt_neo",
    "gpt_neox",
    "gpt_oss",
    "gptj",
    "granite",
    "granitemoe",
    "granitemoehybrid",
    "helium",
    "hunyuan_v1_dense",
    "hunyuan_v1_moe",
    "hy_v3",
    "internlm3",
    "jamba",
    "kimi_linear",
    "laguna",
    "lfm2",
    "lfm2_moe",
    "llama",
    "llama4_text",
    "mellum",
    "mimo_v2_flash",
    "minicpm3",
    "minimax",
    "minimax_m2",
    "ministral3",
    "mistral",
    "mixtral",
    "mpt",
    "nemotron",
    "nemotron_h",
    "olmo",
    "olmo2",
    "olmo3",
    "olmoe",
    "opt",
    "persimmon",
    "phi",
    "phi3",
    "phimoe",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_moe",
    "qwen3_next",
    "seed_oss",
    "smollm3",
    "solar_open",
    "stablelm",
    "starcoder2",
]


# No table describes these; they are read by the shapes and names of their tensors. State-space and recurrent models are
# among them.
UNKNOWN = [
    "aria_text",
    "axk2",
    "bailing_hybrid",
    "bert",
    "biogpt",
    "bitnet",
    "cwm",
    "deepseek_v4",
    "diffllama",
    "doge",
    "electra",
    "falcon_mamba",
    "gemma3n_text",
    "gemma4_text",
    "gemma4_unified_text",
    "gpt-sw3",
    "gpt_neox_japanese",
    "granite_swa",
    "granitemoe_swa",
    "granitemoeshared",
    "hrm_text",
    "hy_v4",
    "hyperclovax",
    "iquestcoder",
    "jais2",
    "jetmoe",
    "lfm3",
    "mamba",
    "mamba2",
    "minimax_m3_vl_text",
    "ministral",
    "modernbert-decoder",
    "nanochat",
    "olmo_hybrid",
    "openai-gpt",
    "qwen4_exp_text",
    "recurrent_gemma",
    "rembert",
    "roberta",
    "rwkv",
    "vaultgemma",
    "xglm",
    "xlm",
    "xlstm",
    "youtu",
    "zamba",
    "zamba2",
    "zaya",
]


def stacked(source: Path, folder: Path) -> Path:
    """A copy of a checkpoint whose experts' linears (`experts.0.gate_proj.weight` and so on) lie in two tensors, as
    Qwen3.5-MoE is published.
    """
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder)
    tensors, parts = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        match = re.match(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight$", name)
        if match:
            parts.setdefault(match[1], {})[int(match[2]), match[3]] = tensor
        else:
            tensors[name] = tensor
    for name, own in parts.items():
        count = range(len(own) // 3)
        tensors[f"{name}.gate_up_proj"] = torch.stack([torch.cat((own[e, "gate"], own[e, "up"])) for e in count])
        tensors[f"{name}.down_proj"] = torch.stack([own[e, "down"] for e in count])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def save(
    model_type: str,
    folder: Path,
    *,
    dtype: str = "bfloat16",
    tie: bool | None = None,
    max_shard_size: str = "5GB",
    **changes,
) -> Path:
    """A tiny random model of this type with a tokenizer's files beside it."""
    import torch
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    known = CONFIG_MAPPING[model_type]
    fields = set(vars(known())) | set(getattr(known, "attribute_map", {}))
    mapped = getattr(known, "attribute_map", {})
    sizes = {k: v for k, v in SIZES.items() if k in fields and mapped.get(k, k) not in (SIZES.keys() & fields) - {k}}
    if tie is not None:
        sizes["tie_word_embeddings"] = tie
    config = known(**(sizes | OWN.get(model_type, {}) | changes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:  # some families start a matrix at zero, which no trained model has
                parameter.data.normal_(0, 0.05)
            elif name.endswith("bias"):
                parameter.data.normal_(0, 0.02)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    for name, document in tiny("llama").json.items():
        if name.startswith("tokenizer"):
            (folder / name).write_text(json.dumps(document))
    return folder
