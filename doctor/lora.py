"""LoRA: what PEFT's adapter_config.json and the names of its matrices say about the sum that a merge is.

weight + scale * B @ A, scale = alpha / r, or alpha / sqrt(r) with use_rslora; r and alpha by module where patterns name it. Whatever
would make another sum is named and not merged. Sources: huggingface/peft src/peft/tuners/lora/layer.py, utils/save_and_load.py,
utils/other.py (get_pattern_key).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

ADAPTER = "adapter_config.json"
MATRIX = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
# What an adapter may hold or mean beside B @ A; each changes the sum.
MORE = ("use_dora", "layer_replication", "trainable_token_indices", "target_parameters", "lora_bias", "use_qalora", "corda_config", "eva_config",
        "megatron_config", "arrow_config", "alora_invocation_tokens")


class NotMergeable(Exception):
    """Why this adapter is not merged here; the text goes on after a colon."""


@dataclass(frozen=True)
class Pair:
    """One module's matrices by their names, and the scale of their product."""

    module: str
    a: str
    b: str
    scale: float
    transposed: bool


def pairs(config: Mapping, tensors: Mapping, names: Iterable[str]) -> list[Pair]:
    """The matrices among these names, module by module. Raises NotMergeable."""
    if config.get("peft_type") != "LORA":
        raise NotMergeable(f"peft_type is {config.get('peft_type')}, not LORA")
    more = [k for k in MORE if config.get(k)] + ["bias"] * (config.get("bias") not in (None, "none"))
    if more:
        raise NotMergeable(f"adapter_config.json sets {', '.join(more)}")
    found: dict[str, dict[str, str]] = {}
    for name in sorted(names):
        match = MATRIX.fullmatch(name)
        if match:
            found.setdefault(match["module"], {})[match["side"]] = name
    lone = next((m for m, sides in found.items() if len(sides) < 2), None)
    if lone is not None:
        raise NotMergeable(f"{lone} lacks lora_A or lora_B")
    return [Pair(module, sides["A"], sides["B"], _scale(config, module, tensors[sides["A"]].shape[0]), bool(config.get("fan_in_fan_out")))
            for module, sides in found.items()]


def _scale(config: Mapping, module: str, stored: int) -> float:
    rank, alpha = (_of_module(config.get(pattern), module, config.get(key)) for pattern, key in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")))
    if not all(isinstance(x, (int, float)) and not isinstance(x, bool) and x > 0 for x in (rank, alpha)):
        raise NotMergeable(f"r is {rank} and lora_alpha {alpha}; both must be numbers above 0")
    if rank != stored:
        raise NotMergeable(f"{module} has matrices of rank {stored}, and r is {rank}")
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _of_module(patterns: object, module: str, otherwise: object) -> object:
    """The value of the first pattern that the module's name ends in, as PEFT looks it up."""
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error:
            raise NotMergeable(f"its pattern {pattern!r} is no regular expression") from None
    return otherwise


def product(pair: Pair, tensors: Mapping) -> tuple[int, int]:
    """Shape that the weight must have."""
    n, k = tensors[pair.b].shape[0], tensors[pair.a].shape[1]
    return (k, n) if pair.transposed else (n, k)


def trained_whole(tensors: Iterable[str]) -> set[str]:
    """Names of what an adapter holds beside matrices of LoRA: modules that were trained whole."""
    return {n for n in tensors if n.startswith("base_model.model.") and "lora_" not in n}
