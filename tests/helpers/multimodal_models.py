"""Tiny random multimodal models, saved by transformers itself."""

import json
from pathlib import Path

from doctor.lint.testing import tiny

_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 96,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_IMAGE = {"image_size": 16, "patch_size": 8}
_DEEP = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
_LINEAR = {
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
MODELS = {
    "gemma3": {"text_config": _TEXT, "vision_config": _VISION | _IMAGE, "mm_tokens_per_image": 4},
    "internvl": {
        "text_config": {"model_type": "qwen2"} | {k: v for k, v in _TEXT.items() if k != "head_dim"},
        "vision_config": _VISION | {"image_size": [16, 16], "patch_size": [8, 8]},
    },
    "llava": {
        "text_config": {"model_type": "llama"} | _TEXT,
        "vision_config": {"model_type": "clip_vision_model", "projection_dim": 32} | _VISION | _IMAGE,
    },
    "mistral3": {
        "text_config": {"model_type": "mistral"} | _TEXT,
        "vision_config": {"model_type": "pixtral", "head_dim": 16} | _VISION | _IMAGE,
    },
    "qwen2_5_vl": {
        "text_config": _TEXT | {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}},
        "vision_config": _DEEP | {"fullatt_block_indexes": [1]},
    },
    "qwen3_5": {"text_config": _TEXT | _LINEAR, "vision_config": _DEEP | {"num_position_embeddings": 16}},
    "qwen3_vl": {
        "text_config": _TEXT,
        "vision_config": _DEEP | {"deepstack_visual_indexes": [1], "num_position_embeddings": 16},
    },
}


def save_multimodal(model_type: str, folder: Path) -> Path:
    """A tiny random model of this type, with a tokenizer's files beside it."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **MODELS[model_type])
    model = transformers.AutoModelForImageTextToText.from_config(config).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            parameter.data.normal_(0, 0.05)
        elif name.endswith("bias"):
            parameter.data.normal_(0, 0.02)
    model.save_pretrained(folder)
    for name, document in tiny("llama").json.items():
        if name.startswith("tokenizer"):
            (folder / name).write_text(json.dumps(document))
    return folder
