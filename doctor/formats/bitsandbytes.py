"""bitsandbytes: known by the names of its tensors, not read.

Its files hold packed bytes under `.weight` and what undoes them beside it (SCB for 8 bits; absmax, quant_map and
quant_state for 4). As a quantization_config alone it says that a loader quantizes a plain checkpoint.

Source: bitsandbytes-foundation/bitsandbytes bitsandbytes/functional.py (QuantState.as_dict).
"""

from __future__ import annotations

from doctor.formats.base import Format, register


@register
class BitsAndBytes(Format):
    """Read as far as its names."""

    name = "bitsandbytes"
    label = "bitsandbytes"
    quant_methods = ("bitsandbytes",)
    writes = False
    at_load = True
