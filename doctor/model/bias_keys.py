"""Keys of config.json that give biases to linears, of classes that have them only where a key says so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from doctor.core.tables import family as family_table
from doctor.model.tensor_map import Placement

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


def keyed_linears(placement: Placement, config: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """(key of config.json that gives them biases, or "", names of their weights) of the linears of attention and of
    those of the MLP; nothing of a class whose keys are not known here.
    """
    spec = placement.spec
    if spec.family is None or spec.family not in BIAS_KEYS or config.get("auto_map"):
        return
    if family_table(spec.family)["architecture"] != spec.architecture:
        return
    weights = {linear.tensor for linear in spec.linears} | set(placement.words)
    for roles, key in zip((ATTENTION, MLP), BIAS_KEYS[spec.family], strict=True):
        yield key, [name for name in weights if (found := placement.template_of(name)) and found.role in roles]
