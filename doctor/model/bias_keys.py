"""Keys of config.json that give biases to linears, of classes that have them only where a key says so."""

from __future__ import annotations

from collections.abc import Mapping

ATTENTION, MLP = ("q", "k", "v", "o"), ("gate", "up", "down")
# family -> key for linears of attention, of the MLP. "": nothing gives them biases.
# Source: transformers src/transformers/models/*/modeling_*.py (bias=).
_BOTH, _ATTENTION = ("attention_bias", "mlp_bias"), ("attention_bias", "")
BIAS_KEYS: Mapping[str, tuple[str, str]] = {
    **dict.fromkeys(("llama", "granite", "smollm3"), _BOTH),
    **dict.fromkeys(("qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "olmo", "olmo2", "olmo3"), _ATTENTION),
    **dict.fromkeys(("olmoe", "granitemoe", "llama4_text", "cohere", "cohere2"), _ATTENTION),
    **dict.fromkeys(("mistral", "mixtral"), ("", "")),
}
