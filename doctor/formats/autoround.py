"""AutoRound's own quantization_config: other words for a file that lies as GPTQ or AWQ do.

Source: intel/auto-round 0.16.1 auto_round/inference/backend.py (GPTQ_FORMAT stores zero points minus one,
GPTQ_FORMAT_NO_ZP as they are), and files that it wrote; vllm-project/vllm
vllm/model_executor/layers/quantization/inc.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from doctor.core.patterns import pattern_of
from doctor.formats.base import Format, Quantization
from doctor.formats.exclusions import Exclusion
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

    def exclusions(self, raw: Mapping[str, Any]) -> list[Exclusion]:
        """Entries of extra_config of 16 bits and more: a name, the end of one, or a pattern; and the output head."""
        found = [Exclusion("", "/extra_config", lambda module: module.rpartition(".")[2] == "lm_head")]
        stated = raw.get("extra_config")
        for entry, own in stated.items() if isinstance(stated, Mapping) else ():
            if isinstance(own, Mapping) and type(own.get("bits")) is int and own["bits"] >= 16:
                matches = partial(_has_entry, entry)
                found.append(Exclusion.of_words(entry, f"/extra_config/{entry.replace('/', '~1')}", matches))
        return found

    def takes(self, raw: Mapping[str, Any]) -> Callable[[str], bool] | None:
        """Every linear of block_name_to_quantize that no entry leaves out."""
        excluded, stated = self.excluded(raw), raw.get("block_name_to_quantize") or ""
        blocks = tuple(
            x.strip() for x in (stated.split(",") if isinstance(stated, str) else stated) if isinstance(x, str)
        )
        return lambda module: module.startswith(blocks) and not excluded(module)

    def version_key(self, raw: Mapping[str, Any]) -> str:
        return "packing_format"

    def spelled(self, form: Format) -> str:
        return next(packing for packing, name in _PACKINGS.items() if name == form.name)


def _has_entry(entry: str, module: str) -> bool:
    """As vLLM's inc/config_parser.py looks an entry of extra_config up."""
    if module == entry or module.endswith(f".{entry}"):
        return True
    found = pattern_of(f".*(?:{entry})") if re.search(r"[*+?^$()\[\]{}|\\]", entry) else None
    return found is not None and found.match(module)
