"""How quantization_config has the inputs of linears rounded while they serve, as far as a comparison computes it.

Arguments are those of compressed-tensors' QuantizationArgs, whatever the format.

Source: vllm-project/vllm 0.32 vllm/model_executor/layers/quantization/compressed_tensors and fp8.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from doctor.formats.exclusions import Exclusion
from doctor.formats.widths import exactly

InputsOf = Callable[[str], Mapping[str, Any] | None]  # by the name of a linear; None where they stay as they are
MOST = {("int", 8): 127.0, ("float", 8): 448.0, ("float", 4): 6.0}  # the largest value of (type, num_bits)
BLOCK = {"type": "float", "num_bits": 8, "strategy": "group", "group_size": 128, "dynamic": True}
TOKEN = {"type": "float", "num_bits": 8, "strategy": "token", "dynamic": True}
TENSOR = {"type": "float", "num_bits": 8, "strategy": "tensor", "dynamic": False}
# Targets that are no class of linears by their look: names with dots, patterns, and other classes, as Conv2d.
OTHER_CLASS = re.compile(r"re:|.*\.|(?!\w*Linear)[A-Z]\w*$")


def of_fp8(raw: Mapping[str, Any]) -> InputsOf:
    """Of quant_method fp8."""
    block = raw.get("weight_block_size")
    args = TENSOR if raw.get("activation_scheme") == "static" else BLOCK if block else TOKEN
    return lambda _name: args


def of_groups(groups: Iterable[Mapping[str, Any]]) -> InputsOf | None:
    """Of config groups, whose "targets" are texts; None where none is known here."""
    known = [
        (t.startswith("re:") or "." in t, _matches(t), _known(group.get("input_activations")))
        for group in groups
        for t in group["targets"]
    ]
    known.sort(key=lambda one: not one[0])  # names come before classes of modules
    if not any(args for _named, _takes, args in known):
        return None
    return lambda name: next((args for _named, takes, args in known if takes(name)), None)


def _matches(target: str) -> Callable[[str], bool]:
    """Whether a target takes a linear; a class of modules takes all."""
    if OTHER_CLASS.match(target) is None:
        return lambda _name: True
    return Exclusion.of_pattern(target, "", target[3:] if target.startswith("re:") else exactly(target)).matches


def _known(args: Any) -> Mapping[str, Any] | None:
    """The arguments where they are of a kind that is computed here."""
    if not isinstance(args, Mapping) or args.get("symmetric") is False:
        return None
    kind, bits = args.get("type"), args.get("num_bits")
    if not isinstance(kind, str) or type(bits) is not int or (kind, bits) not in MOST:
        return None
    width, strategy = args.get("group_size"), args.get("strategy")
    grouped = strategy in ("group", "tensor_group") and type(width) is int and width > 0
    return args if grouped or strategy in ("token", "tensor") else None
