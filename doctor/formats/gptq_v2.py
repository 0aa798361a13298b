"""GPTQ, checkpoint_format "gptq_v2": the tensors of version 1, with zero points stored as they are.

Data of one version read as the other shifts every weight by one step: garbage, not an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from doctor.formats.base import Shapes
from doctor.formats.gptq import GPTQ
from doctor.formats.registry import register


@register
class GPTQv2(GPTQ):
    """GPTQ with zero_offset 0. Its quantization_config is read by GPTQ, which sees the version there."""

    name = "gptq_v2"
    label = "GPTQ v2"
    quant_methods = ()
    zero_offset = 0
    twin = "gptq"

    def claims(self, raw: Mapping[str, Any]) -> bool:
        return False

    def shown(self, shapes: Mapping[str, Shapes], words: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
        return None
