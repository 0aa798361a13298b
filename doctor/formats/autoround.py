"""AutoRound's own quantization_config: other words for a file that lies as GPTQ or AWQ do.

Source: intel/auto-round 0.16.1 auto_round/inference/backend.py (GPTQ_FORMAT stores zero points minus one,
GPTQ_FORMAT_NO_ZP as they are), and files that it wrote.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from doctor.formats.base import Format, Quantization
from doctor.formats.registry import KNOWN, register
from doctor.formats.widths import Widths, exactly, own_entries

# packing_format -> the format that it packs in.
_PACKINGS = {
    "auto_round:auto_gptq": "gptq",
    "auto_round:gptqmodel": "gptq_v2",
    "auto_round": "gptq_v2",
    "auto_round:auto_awq": "awq",
}


@register
class AutoRound(Format):
    """A reader: its files are of other formats."""

    name = "auto-round"
    label = "AutoRound"
    quant_methods = ("auto-round", "intel/auto-round")
    writes = False

    def read(self, raw: Mapping[str, Any], file: str, pointer: str, own: bool = True) -> Quantization:
        packed = _PACKINGS.get(str(raw.get("packing_format"))) if raw.get("data_type", "int") == "int" else None
        if packed is None:
            return super().read(raw, file, pointer, own)
        sym = raw.get("sym", True)
        plain = {key: raw[key] for key in ("bits", "group_size", "sym", "extra_config") if key in raw}
        plain |= {"data_type": "int", "zero_point": not sym, "desc_act": False, "checkpoint_format": packed}
        entries = (
            [(exactly(name), value.get("bits")) for name, value in own_entries(plain, "extra_config")] if own else ()
        )
        found = KNOWN[packed].read(plain, file, pointer, own)
        return replace(found, reader=self, raw=dict(raw), widths=Widths.of_patterns(entries))

    def version_key(self, raw: Mapping[str, Any]) -> str:
        return "packing_format"

    def spelled(self, form: Format) -> str:
        return next(packing for packing, name in _PACKINGS.items() if name == form.name)
