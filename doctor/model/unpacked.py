"""Packed linears as the linears that they stand for: names and shapes of the model's class, whatever the file stores.

A GPTQ file has `q_proj.qweight` and its scales where the family's table has `q_proj.weight`. Rules that compare a
checkpoint with its family ask for `unpacked_tensors`, in which each packed linear is one `.weight` and the parts that
only unpack it are gone. Formats that are not unpacked here are seen so too; their shapes are then the ones that
config.json gives, so that they are judged by name alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from doctor.checkpoint.dtypes import DTYPES
from doctor.checkpoint.safetensors import TensorInfo
from doctor.core.errors import DoctorError
from doctor.core.facts import Unavailable, fact
from doctor.formats.base import Quantization
from doctor.formats.known import OTHER_WORDS, is_mlx_words
from doctor.formats.registry import KNOWN, format_of_words, read_quantization
from doctor.model.quantization_config import quantization_of
from doctor.model.spec import ModelSpec, build_spec

CACHE_SCALES = (".k_scale", ".v_scale", ".kv_scale", ".q_scale")  # of the key-value cache; no family has them
_FUSED = ("_blocks", "_packed")  # codes of all experts of a layer, under the name of their fused parameter
_OF_FUSED = ("_scales", "_scale", "_bias_scales", "_shape", "_global_scale")


class UnpackedTensors(NamedTuple):
    """tensors: by the names of the model's class. words: such a name -> the tensor that holds its codes here."""

    tensors: dict[str, TensorInfo]
    words: dict[str, str]


@fact("checkpoint", cost="header")
def unpacked_tensors(checkpoint, logical_tensors) -> UnpackedTensors:
    """The tensors with each packed linear as one `.weight` (UnpackedTensors)."""
    tensors: dict[str, TensorInfo] = logical_tensors
    if any(name.endswith(CACHE_SCALES) for name in tensors):
        tensors = {name: info for name, info in tensors.items() if not name.endswith(CACHE_SCALES)}
    block = quantization_of(checkpoint)
    raw = block[0] if block is not None else None
    unread = raw is not None and "quant_method" in raw and not any(f.claims(raw) for f in KNOWN.values())
    plain = build_spec(checkpoint.value("config.json") or {}, {})
    words = dict(_words(tensors))
    if unread:
        words |= _of_unread(tensors, plain, words)
    if not words and not unread:
        return UnpackedTensors(tensors, {})
    try:
        quantization = read_quantization(*block) if block is not None else None
    except (Unavailable, DoctorError):  # what is wrong with the block is for rules to say
        quantization = None
    parts, stated = _parts(words), plain.expected_shape
    found = {name: info for name, info in tensors.items() if not parts(name)}
    for name, stored in words.items():
        shape = _shape(name, tensors[stored], quantization, stated)
        if shape is not None:
            found[name] = tensors[stored]._replace(name=name, dtype=DTYPES["BF16"], shape=shape)
    if unread:
        found = {n: _as_stated(info, stated(n)) if n not in words else info for n, info in found.items()}
    return UnpackedTensors(found, words)


def _words(tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, str]]:
    """(name of the model's class, name here) of the tensors that hold codes."""
    tails = {form.words for form in KNOWN.values() if form.words} | set(OTHER_WORDS)
    for name, info in tensors.items():
        module, dot, tail = name.rpartition(".")
        if dot and (tail in tails or is_mlx_words(info)):
            yield f"{module}.weight", name
        elif tail.endswith(_FUSED) and tail not in _FUSED and ".experts" in name:
            yield name[: name.rfind("_")], name


def _of_unread(tensors: Mapping[str, TensorInfo], plain: ModelSpec, words: Mapping[str, str]) -> dict[str, str]:
    """Modules that the family gives a weight and that hold other tensors instead, in a format that nothing here
    reads: the first of those tensors stands for the weight.
    """
    found: dict[str, str] = {}
    for name in tensors:
        module, _dot, tail = name.rpartition(".")
        weight = f"{module}.weight"
        if tail in ("weight", "bias") or weight in tensors or weight in words or weight in found:
            continue
        if any(t.pattern.match(weight) for t in plain.templates):
            found[weight] = name
    return found


def _parts(words: Mapping[str, str]) -> Callable[[str], bool]:
    """Whether a tensor is a part of one of these packed weights."""
    modules = {name.removesuffix(".weight") for name in words if name.endswith(".weight")}
    fused = {f"{name}{end}" for name in words for end in (*_FUSED, *_OF_FUSED)}

    def part(name: str) -> bool:
        module, _dot, tail = name.rpartition(".")
        return name in fused or (module in modules and tail not in ("weight", "bias"))

    return part


def _shape(
    name: str, stored: TensorInfo, quantization: Quantization | None, stated: Callable[[str], tuple[int, ...] | None]
) -> tuple[int, ...] | None:
    """[n, k] by the shape of the words where it is exact; else what config.json gives; None where neither says it."""
    form = format_of_words(stored.name)
    if quantization is not None and form is not None and quantization.readable and len(stored.shape) == 2:
        own = quantization.format if stored.name.endswith(f".{quantization.format.words}") else form
        bits = quantization.bits_of(name.removesuffix(".weight"))
        if own.words and 32 % bits == 0:  # other widths fill up the last word of a row in some versions
            width, height = own.size(stored.shape, bits, quantization.version)
            return (width, height) if stated(name) == (width, height) else (height, width)
    return stated(name)


def _as_stated(info: TensorInfo, shape: tuple[int, ...] | None) -> TensorInfo:
    """A tensor of codes under a weight's own name, in a format that nothing here reads, in the weight's shape."""
    return info if shape is None or (info.dtype.is_float and info.dtype.bits >= 16) else info._replace(shape=shape)
