"""LoRA: what PEFT's adapter_config.json and the names of its matrices say about the sum that a merge is.

weight + scale * B @ A, scale = alpha / r, or alpha / sqrt(r) with use_rslora; r and alpha by module where patterns name
it. With use_dora each output's row of the sum is then brought to its stored magnitude: m / ‖sum‖ * sum. Whatever would
make another sum is named and not merged, and so is every key that is not known here: PEFT's next release may add one
that means something else. Sources: huggingface/peft src/peft/tuners/lora/layer.py, variants.py (DoraLinearVariant),
utils/save_and_load.py, utils/other.py (get_pattern_key).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from doctor.core.messages import _
from doctor.core.patterns import pattern_of

ADAPTER = "adapter_config.json"
MATRIX = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>A|B|magnitude_vector)(?:\.default)?(?:\.weight)?"
)
# Keys of adapter_config.json that say how it was trained, or that are read here. Any other that is set may change the
# sum.
KNOWN = {
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "r",
    "target_modules",
    "exclude_modules",
    "lora_alpha",
    "lora_dropout",
    "fan_in_fan_out",
    "bias",
    "use_rslora",
    "use_dora",
    "modules_to_save",
    "init_lora_weights",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "qalora_group_size",
    "runtime_config",
}
# Beginnings that leave the base as it was. The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) take a part out of it, and
# the adapter is a change to the rest: added to the base itself, that part would count twice.
STARTS = ("gaussian", "eva", "orthogonal", "mica")


class NotMergeable(Exception):
    """Why this adapter is not merged here; the text goes on after a colon."""


@dataclass(frozen=True)
class Pair:
    """One module's matrices by their names, and the scale of their product. magnitude: "" without DoRA."""

    module: str
    a: str
    b: str
    scale: float
    transposed: bool
    magnitude: str = ""

    @property
    def names(self) -> set[str]:
        return {self.a, self.b, self.magnitude} - {""}


def pairs(config: Mapping, tensors: Mapping, names: Iterable[str]) -> list[Pair]:
    """The matrices among these names, module by module. Raises NotMergeable."""
    if config.get("peft_type") != "LORA":
        raise NotMergeable(f"peft_type is {config.get('peft_type')}, not LORA")
    more = [k for k in config if k not in KNOWN and config[k]] + ["bias"] * (config.get("bias") not in (None, "none"))
    if more:
        raise NotMergeable(f"adapter_config.json sets {', '.join(more)}")
    start = config.get("init_lora_weights", True)
    if not (start is None or isinstance(start, bool) or str(start).lower() in STARTS):
        raise NotMergeable(f"init_lora_weights is {start}: training began by taking a part out of the base's weights")
    found: dict[str, dict[str, str]] = {}
    for name in sorted(names):
        match = MATRIX.fullmatch(name)
        if match:
            found.setdefault(match["module"], {})[match["side"]] = name
    return [_pair(config, module, sides, tensors) for module, sides in found.items()]


def _pair(config: Mapping, module: str, sides: Mapping[str, str], tensors: Mapping) -> Pair:
    wanted = ["A", "B"] + ["magnitude_vector"] * bool(config.get("use_dora"))
    for side in wanted:
        if side not in sides:
            raise NotMergeable(f"{module} lacks lora_{side}")
    if len(sides) > len(wanted):
        raise NotMergeable(f"{module} has lora_magnitude_vector, which is DoRA's, and use_dora is not set")
    a, b, magnitude = sides["A"], sides["B"], sides.get("magnitude_vector", "")
    odd = next((name for name in (a, b) if len(tensors[name].shape) != 2), None)
    if odd is not None:
        raise NotMergeable(f"{odd} is {list(tensors[odd].shape)}, no matrix of a linear's LoRA")
    if magnitude and tensors[magnitude].shape != tensors[b].shape[:1]:
        raise NotMergeable(
            f"{magnitude} is {list(tensors[magnitude].shape)}, and {module} has {tensors[b].shape[0]} outputs"
        )
    return Pair(
        module, a, b, _scale(config, module, tensors[a].shape[0]), bool(config.get("fan_in_fan_out")), magnitude
    )


def _scale(config: Mapping, module: str, stored: int) -> float:
    rank: Any = _of_module(config.get("rank_pattern"), module, config.get("r"))
    alpha: Any = _of_module(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    if not all(isinstance(x, (int, float)) and not isinstance(x, bool) and x > 0 for x in (rank, alpha)):
        raise NotMergeable(
            _("r is {rank} and lora_alpha {alpha}; both must be numbers above 0", rank=rank, alpha=alpha)
        )
    if rank != stored:
        raise NotMergeable(
            _("{module} has matrices of rank {stored}, and r is {rank}", module=module, stored=stored, rank=rank)
        )
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _of_module(patterns: object, module: str, otherwise: object) -> object:
    """The value of the first pattern that the module's name ends in, as PEFT looks it up."""
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        found = pattern_of(rf"(.*\.)?({pattern})$")
        if found is None:
            raise NotMergeable(f"its pattern {pattern!r} is no regular expression")
        if found.match(module):
            return value
    return otherwise


def product(pair: Pair, tensors: Mapping) -> tuple[int, int]:
    """Shape that the weight must have."""
    n, k = tensors[pair.b].shape[0], tensors[pair.a].shape[1]
    return (k, n) if pair.transposed else (n, k)


def saved_whole(config: Mapping) -> tuple[str, ...]:
    """Names of the modules that modules_to_save lists. Raises NotMergeable."""
    listed = config.get("modules_to_save") or ()
    if not isinstance(listed, (list, tuple)) or not all(isinstance(name, str) for name in listed):
        raise NotMergeable(f"modules_to_save is {listed!r}, no list of names")
    return tuple(listed)


def trained_whole(tensors: Iterable[str]) -> set[str]:
    """Names of what an adapter holds beside matrices of LoRA: modules that were trained whole."""
    return {n for n in tensors if n.startswith("base_model.model.") and "lora_" not in n}
