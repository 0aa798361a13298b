"""The routing bias of mixtures that balance their experts by it, where no decoder layer has one.

It is added to a router's scores only to choose experts (DeepSeek-V3). transformers registers zeros for it and loads a
checkpoint without it: other experts are chosen, in every layer, and the reply is worse without an error.

Sources: transformers src/transformers/models/deepseek_v3/modeling_deepseek_v3.py (e_score_correction_bias);
vllm-project/vllm vllm/model_executor/models/deepseek_v2.py (topk_method).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from doctor.core.messages import _
from doctor.model.tensor_map import Placement

_NAME = "e_score_correction_bias"


def routing_biases_missing(placement: Placement) -> dict[str, str]:
    """Name of each routing bias -> why it must be there; {} where any layer has one, under whatever name, or
    config.json says that routing goes without.
    """
    own = [t for t in placement.spec.templates if "{i}" in t.tensor and t.tensor.endswith(_NAME)]
    held = {tail for block in placement.counted for tail in placement.blocks[block]}
    routed = {tail for tail in held if "bias" in tail and "_proj" not in tail and "attn" not in tail}
    if len(own) != 1 or routed or _says_without(placement.spec.config):
        return {}
    tail = own[0].tensor.partition("{i}.")[2]
    return {
        placement.name(block, tail): _("no decoder layer has it")
        for block in placement.counted
        if placement.spec.in_layer(own[0].layers, block) is not False
        and any(".experts." in other for other in placement.blocks[block])
    }


def _says_without(config: Mapping[str, Any]) -> bool:
    """Whether experts are chosen by their scores alone: another topk_method than noaux_tc, or a flag that is off."""
    method = config.get("topk_method")
    off = {key for key, value in config.items() if value is False}
    return (method is not None and method != "noaux_tc") or any(
        key == "moe_use_aux_free" or ("bias" in key and ("rout" in key or "expert" in key)) for key in off
    )
