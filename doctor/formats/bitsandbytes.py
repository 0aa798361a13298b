"""bitsandbytes: rows of 8-bit integers, or 4-bit codes of a table in blocks.

| tensor | dtype | shape |
|---|---|---|
| weight (8 bits) | I8 | [n, k] |
| SCB | F32 | [n], the largest magnitude of each row: weight = code * SCB / 127 |
| weight_format | U8 | [], 0 where codes lie row by row |
| weight (4 bits) | U8 | [n*k/2, 1], two codes a byte, the first in the high half |
| weight.absmax | F32, or U8 where it is quantized again | [blocks], one for each `blocksize` weights in a row |
| weight.quant_map | F32 | [16], the value of each code (NF4 or FP4) |
| weight.nested_absmax, weight.nested_quant_map | F32 | [blocks of blocks], [256]: values of absmax |
| weight.quant_state.bitsandbytes__nf4 | U8 | JSON: shape, blocksize, nested_blocksize, nested_offset |

As a quantization_config over plain weights it says that a loader quantizes them. Merged or saved without one, files
hold packed weights that nothing names.

Source: bitsandbytes-foundation/bitsandbytes 0.50 bitsandbytes/functional.py (QuantState.as_dict, from_dict),
backends/default/ops.py (dequantize_4bit, int8_vectorwise_dequant), nn/modules.py (Linear8bitLt.weight_format);
huggingface/transformers src/transformers/quantizers/base.py (get_keys_to_not_convert).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from doctor.checkpoint.safetensors import TensorInfo
from doctor.core.errors import BadCheckpoint
from doctor.core.lazy_numpy import np
from doctor.core.messages import _
from doctor.core.recipe import Scheme
from doctor.formats.arrays import Array
from doctor.formats.base import Format, Parts, Shapes, Texts
from doctor.formats.exclusions import Exclusion, leaves_out
from doctor.formats.registry import register

_TYPES = ("nf4", "fp4")
STATES = tuple(f"weight.quant_state.bitsandbytes__{kind}" for kind in _TYPES)
_IN_LAYER = re.compile(r"\.\d+\.")
_OF_MIXTURE = re.compile(r"\.experts\.|gate$|router")
_STEP = 7.874015718698502e-3  # 1/127 as the library has it


@register
class BitsAndBytes(Format):
    """Read only."""

    name = "bitsandbytes"
    label = "bitsandbytes"
    quant_methods = ("bitsandbytes",)
    part_names = (
        "weight",
        "SCB",
        "weight_format",
        "weight.absmax",
        "weight.quant_map",
        "weight.nested_absmax",
        "weight.nested_quant_map",
        *STATES,
    )
    beside = part_names[1:]
    verbatim = STATES
    bits = (4, 8)
    writes = False
    at_load = True

    def exclusions(self, raw: Mapping[str, Any]) -> list[Exclusion]:
        """llm_int8_skip_modules, as transformers matches names: a module, the modules in it, and names that end so."""
        entries = raw.get("llm_int8_skip_modules")
        return [
            Exclusion.of_words(entry, f"/llm_int8_skip_modules/{at}", partial(leaves_out, entry))
            for at, entry in enumerate(entries if isinstance(entries, list) else ())
            if isinstance(entry, str) and entry
        ]

    def incomplete(
        self,
        info: TensorInfo,
        tensors: Mapping[str, TensorInfo],
        shape_of: Callable[[str], tuple[int, ...] | None],
    ) -> tuple[list[str], list[tuple[str, list[int], list[int]]]]:
        module = info.name.removesuffix(".weight")
        if info.dtype.name == "I8":
            rows = tensors.get(f"{module}.SCB")
            wrong = [] if rows is None or rows.numel == info.shape[0] else [("SCB", list(rows.shape), [info.shape[0]])]
            return ["SCB"] if rows is None else [], wrong
        if info.dtype.name != "U8":
            return [], []
        groups: list[tuple[str, ...]] = [("weight.absmax",), ("weight.quant_map",), STATES]
        largest = tensors.get(f"{module}.weight.absmax")
        nested = any(f"{module}.weight.nested_{part}" in tensors for part in ("absmax", "quant_map"))
        if nested or (largest is not None and largest.dtype.name == "U8"):
            groups += [("weight.nested_absmax",), ("weight.nested_quant_map",)]
        absent = [group[0] for group in groups if not any(f"{module}.{part}" in tensors for part in group)]
        shape = shape_of(module)
        if absent or shape is None or largest is None:
            return absent, []
        codes = math.prod(shape)
        if info.numel * 2 != codes:
            return [], [("weight", list(info.shape), [codes // 2, 1])]
        size = 1 << max(0, (codes // max(largest.numel, 1)).bit_length() - 1)  # a block holds a power of two of them
        wanted = -(-codes // size)
        return [], [] if largest.numel == wanted else [("weight.absmax", list(largest.shape), [wanted])]

    def takes(self, raw: Mapping[str, Any]) -> Callable[[str], bool] | None:
        """Every linear that is on no list. Without one, transformers keeps the head, what it is tied to and the last
        module: linears of decoder layers are judged then. Routers and experts are left out, which not every version of
        a class holds as linears.
        """
        if not isinstance(raw.get("llm_int8_skip_modules"), list):
            return lambda module: bool(_IN_LAYER.search(module)) and not _OF_MIXTURE.search(module)
        excluded = self.excluded(raw)
        return lambda module: not excluded(module)

    def stored_bits(self, raw: Mapping[str, Any]) -> int | None:
        return 4 if raw.get("load_in_4bit") or raw.get("_load_in_4bit") else 8

    def scheme_beside(
        self, info: TensorInfo, tensors: Mapping[str, TensorInfo], raw: Mapping[str, Any] | None
    ) -> Scheme | None:
        module, _dot, last = info.name.rpartition(".")
        if last != "weight":
            return None
        if info.dtype.name == "I8" and len(info.shape) == 2 and f"{module}.SCB" in tensors:
            return Scheme(8)
        if info.dtype.name == "U8" and any(f"{module}.{state}" in tensors for state in STATES):
            absmax = tensors.get(f"{module}.weight.absmax")
            return Scheme(4, info.numel * 2 // absmax.numel if absmax is not None and absmax.numel else -1)
        return None

    def shape_beside(self, info: TensorInfo, texts: Texts) -> tuple[int, int] | None:
        module = info.name.removesuffix(".weight")
        if info.dtype.name == "I8":
            return info.shape[0], info.shape[1]
        found = [texts[f"{module}.{state}"] for state in STATES if f"{module}.{state}" in texts]
        try:
            n, k = _state(found[0])["shape"]
        except (IndexError, BadCheckpoint):
            return None
        return (n, k) if n * k == info.numel * 2 else None

    def weight_shape(self, shapes: Shapes, load: Callable[[str], Array], bits: int) -> tuple[int, int]:
        if bits == 8:
            n, k = shapes["weight"]
        else:
            n, k = _state(load(_state_name(shapes)).tobytes())["shape"]
        return n, k

    def unpack(
        self, parts: Parts, scheme: Scheme, shape: tuple[int, int] | None = None, rows: slice | None = None
    ) -> Array:
        return _of_rows(parts, rows) if scheme.bits == 8 else _of_blocks(parts, rows)


def _of_rows(parts: Parts, rows: slice | None) -> Array:
    """code * SCB / 127, f32[n, k], in the library's order."""
    if "weight_format" in parts and int(parts["weight_format"].reshape(-1)[0]) != 0:
        raise BadCheckpoint(
            _(
                "weight_format is {number}: codes in tiles of an old GPU's kernel are not read.",
                number=int(parts["weight_format"].reshape(-1)[0]),
            )
        )
    codes, largest = parts["weight"], parts["SCB"].reshape(-1)
    if len(largest) != len(codes):
        raise BadCheckpoint(_("SCB has {found} values for {rows} rows.", found=len(largest), rows=len(codes)))
    rows = rows or slice(0, len(codes))
    return codes[rows].astype(np.float32) * largest[rows, None] * np.float32(_STEP)


def _of_blocks(parts: Parts, rows: slice | None) -> Array:
    """quant_map[code] * absmax of its block, f32[n, k]."""
    state = _state(parts[_state_name(parts)].tobytes())
    n, k = state["shape"]
    rows = rows or slice(0, n)
    first, last = rows.start * k, min(rows.stop, n) * k
    packed = parts["weight"].reshape(-1).view(np.uint8)
    if packed.size * 2 != n * k:
        raise BadCheckpoint(
            _("weight holds {found} codes; its state says {shape}.", found=packed.size * 2, shape=[n, k])
        )
    some = packed[first // 2 : -(-last // 2)]
    codes = np.stack([some >> 4, some & 15], 1).reshape(-1)[first % 2 :][: last - first]
    blocks = np.arange(first, last) // state["blocksize"]
    absmax = _absmax(parts, state)
    if len(absmax) * state["blocksize"] < n * k:
        raise BadCheckpoint(
            _(
                "absmax has {found} values; blocks of {size} of {shape} need {wanted}.",
                found=len(absmax),
                size=state["blocksize"],
                shape=[n, k],
                wanted=-(-n * k // state["blocksize"]),
            )
        )
    return (parts["weight.quant_map"][codes] * absmax[blocks]).reshape(-1, k)


def _absmax(parts: Parts, state: Mapping[str, Any]) -> Array:
    """f32[blocks]."""
    stored = parts["weight.absmax"].reshape(-1)
    if "weight.nested_absmax" not in parts:
        return stored
    outer = np.arange(stored.size) // state["nested_blocksize"]
    values = parts["weight.nested_quant_map"][stored] * parts["weight.nested_absmax"][outer]
    return values + np.float32(state["nested_offset"])


def _state_name(parts: Mapping[str, Any]) -> str:
    found = next((name for name in STATES if name in parts), None)
    if found is None:
        raise KeyError(STATES[0])
    return found


def _state(text: bytes) -> dict[str, Any]:
    """The JSON of a quant_state. Raises BadCheckpoint where it lacks what is needed."""
    try:
        state = json.loads(text)
        sizes = [*state["shape"], state["blocksize"], state.get("nested_blocksize", 1)]
        sound = len(state["shape"]) == 2 and all(type(size) is int and size > 0 for size in sizes)
        float(state.get("nested_offset", 0))
    except (ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        raise BadCheckpoint(_("quant_state is not the JSON of a quantized matrix."))
    return state
