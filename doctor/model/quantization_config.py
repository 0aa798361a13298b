"""What a checkpoint says of its own quantization: where it says so, and what the format that claims it reads there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from doctor.checkpoint.directory import Checkpoint
from doctor.checkpoint.ggml_types import FILE_TYPES
from doctor.checkpoint.gguf import GgufModel
from doctor.core.errors import DoctorError
from doctor.core.facts import FactKey, Unavailable, fact, key_of
from doctor.core.messages import _
from doctor.core.methods import method_of_format
from doctor.core.recipe import Recipe
from doctor.formats.known import is_mlx_words, quantized
from doctor.formats.registry import KNOWN, read_quantization


@fact("checkpoint")
def quantization_block(checkpoint):
    """(raw quantization_config, file, JSON pointer), or None where the checkpoint names no quantization."""
    return quantization_of(checkpoint)


def quantization_of(checkpoint: Checkpoint) -> tuple[dict, str, str] | None:
    """The raw quantization block and where it stands."""
    return next(quantization_blocks(checkpoint), None)


def quantization_blocks(checkpoint: Checkpoint) -> Iterator[tuple[dict, str, str]]:
    """Every quantization block and where it stands, the one that readers look at first being the first."""
    config = checkpoint.value("config.json") or {}
    if isinstance(config.get("quantization_config"), dict):
        yield config["quantization_config"], "config.json", "/quantization_config"
    for name, block in config.items():
        if isinstance(block, dict) and isinstance(block.get("quantization_config"), dict):
            yield block["quantization_config"], "config.json", f"/{name}/quantization_config"
    for file in ("quantize_config.json", "quant_config.json", "hf_quant_config.json"):
        value = checkpoint.value(file)
        if isinstance(value, dict):
            yield value, file, ""


@fact("checkpoint", cost="header")
def quantization(checkpoint, quantization_block):
    """What the files say about their own quantization (Quantization)."""
    if quantization_block is None:
        raise Unavailable(_("the checkpoint is not quantized"))
    raw, file, pointer = quantization_block
    return read_quantization(raw, file, pointer)


@fact("checkpoint", cost="header")
def goal(checkpoint, recipe) -> str:
    """What findings are judged for: "quantize" floats by the recipe, "serve" the files as they are, or "none" for the
    files alone. Where nobody says, what is quantized already is served.
    """
    return recipe.goal or ("serve" if holds_quantized(checkpoint) else "quantize")


def holds_quantized(checkpoint: Checkpoint) -> bool:
    """Whether weights are stored in codes."""
    if checkpoint.gguf:
        return True
    infos = checkpoint.tensors.values()
    return next(quantized(infos), None) is not None or any(map(is_mlx_words, infos))


GOAL: FactKey[str] = key_of(goal)
STATED = frozenset({"method", "bits", "group_size", "sym"})  # what a quantized checkpoint states of its own plan


def stored_recipe(checkpoint: Checkpoint, recipe: Recipe) -> Recipe:
    """This recipe with the method, bits, groups and symmetry that the checkpoint states for itself; as it is where it
    states none. What single linears have of their own does not change what holds for the rest.
    """
    if checkpoint.gguf:
        return _of_gguf(checkpoint.gguf[0], recipe)
    block = quantization_of(checkpoint)
    if block is None:
        return recipe
    try:
        stored = read_quantization(*block, own=False)
        return replace(
            recipe,
            method=method_of_format(stored.format.name),
            bits=stored.bits,
            group_size=stored.group_size,
            sym=stored.sym,
            format=stored.format.name,
        )
    except (Unavailable, DoctorError):  # what is wrong with the block is for rules to say
        return recipe


def _of_gguf(model: GgufModel, recipe: Recipe) -> Recipe:
    """This recipe with the mixture of types that the file names, where it is one that is written here too."""
    name = FILE_TYPES.get(model.metadata.get("general.file_type", -1), "")
    for form in KNOWN.values():
        bits = next((b for b, mixture in form.mixtures.items() if mixture == name), None)
        if bits is not None:
            plain = replace(recipe, activations="", bits_for=(), format="")
            return replace(plain, method="gptq", bits=bits, group_size=32, sym=False, format=form.name)
    return recipe
