"""config.json in the keys of transformers 5 and of older readers at once.

transformers 5 writes the rotary base and its scaling into rope_parameters and the dtype as `dtype`. Readers built on
transformers 4 know rope_theta, rope_scaling and torch_dtype alone, and take the defaults of their class without a word.
transformers 5 takes its own rope_theta before the old one, and rope_scaling, where it is there, in place of
rope_parameters: both must state the same, or one directory is two models (rule C170).

Source: transformers src/transformers/modeling_rope_utils.py (standardize_rope_params), configuration_utils.py;
transformers 4.57.6 src/transformers/models/gemma3/modeling_gemma3.py.
"""

from collections.abc import Mapping
from typing import Any

SECTIONS = ("text_config", "language_config", "llm_config", "thinker_config")  # of a text model inside another
TWO_BASES = ("gemma3_text", "gemma3n_text")  # rope_theta and rope_scaling are those of their layers of full attention
LOCAL_BASE = "rope_local_base_freq"  # and this is the base of the others


def old_keys(block: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of older readers that `block` lacks and that its own new keys give a value; {} where nothing is lost."""
    missing: dict[str, Any] = {}
    rope, local = rope_of_old_readers(block)
    if isinstance(local, (int, float)) and not isinstance(local, bool) and LOCAL_BASE not in block:
        missing[LOCAL_BASE] = local
    # One object for each layer type has no old spelling elsewhere.
    if isinstance(rope, Mapping) and not any(isinstance(value, Mapping) for value in rope.values()):
        theta = rope.get("rope_theta")
        if isinstance(theta, (int, float)) and not isinstance(theta, bool) and "rope_theta" not in block:
            missing["rope_theta"] = theta
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in (None, "default") and block.get("rope_scaling") is None:
            missing["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    if isinstance(block.get("dtype"), str) and "torch_dtype" not in block:
        missing["torch_dtype"] = block["dtype"]
    return missing


def rope_of_old_readers(block: Mapping[str, Any]) -> tuple[Any, Any]:
    """(the object of rope_parameters whose values older readers take from rope_theta and rope_scaling, the base that
    they take from rope_local_base_freq or None). Gemma 3 has had keys of its own for its two kinds of layer.
    """
    rope = block.get("rope_parameters")
    if block.get("model_type") not in TWO_BASES or not isinstance(rope, Mapping):
        return rope, None
    whole, sliding = (rope.get(kind) for kind in ("full_attention", "sliding_attention"))
    if not isinstance(whole, Mapping):
        return rope, None
    return whole, sliding.get("rope_theta") if isinstance(sliding, Mapping) else None


def with_old_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the old spellings added, in a text section too. Nothing that is there is changed."""
    result = {**config, **old_keys(config)}
    for name in SECTIONS:
        if isinstance(result.get(name), Mapping):
            result[name] = with_old_keys(result[name])
    return result
