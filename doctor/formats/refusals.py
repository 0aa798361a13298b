"""Values of a quantization_config at which a reader stops before it looks at any tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from doctor.formats.wanted import is_block

VLLM = "vllm"
# Releases of vLLM from which a value is refused: the first that was read with the refusal.
SPARSE, ORDERED = "0.24.0", "0.32.0"
REORDERED = "5.0.0"  # of transformers, whose compressed-tensors of that time (0.20) removed it
_STRATEGIES = ("tensor", "channel", "group", "block", "token", "tensor_group", "attn_head")
_MODELOPT = (
    "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4", "W4A16_NVFP4", "MXFP8", "MIXED_PRECISION",
)  # fmt: skip


class Instead(NamedTuple):
    """A value that says the same of the tensors, None to remove the key. unless: an ending of tensor names, of which
    none may be there. ordered: only where the groups of all linears are in the order of columns.
    """

    value: Any
    unless: str = ""
    ordered: bool = False


class Refused(NamedTuple):
    """One value. pointer: of it, from the quantization_config on. found: what is there, "" for nothing. must: what must
    be. reader: who refuses it, "" for everybody; since: from which release on, "" for all. instead: how else the same
    tensors may be stated.
    """

    pointer: str
    found: str
    must: str
    reader: str = ""
    since: str = ""
    instead: Instead | None = None


def of_compressed_tensors(raw: Mapping[str, Any]) -> Iterator[Refused]:
    """vllm-project/vllm compressed_tensors.py (from_config, _parse_sparsity_config, validate_kv_cache_scheme);
    vllm-project/compressed-tensors 0.20 quantization/quant_args.py (QuantizationArgs).
    """
    sparsity = raw.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("targets"):
        found, same = (
            f"of format {sparsity.get('format')}",
            Instead(None) if sparsity.get("format") == "dense" else None,
        )
        yield Refused("/sparsity_config", found, "no sparsity_config", VLLM, SPARSE, same)
    groups = raw.get("config_groups")
    for name, group in groups.items() if isinstance(groups, Mapping) else ():
        where = f"/config_groups/{name}"
        if not isinstance(group, Mapping):
            yield Refused(where, _shown(group), "an object")
            continue
        targets = group.get("targets")
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            yield Refused(f"{where}/targets", _shown(targets), "a list of names")
        for key in ("weights", "input_activations"):
            if isinstance(group.get(key), Mapping):
                yield from _of_args(f"{where}/{key}", group[key])
    yield from _of_cache(raw.get("kv_cache_scheme"))


def _of_args(where: str, args: Mapping[str, Any]) -> Iterator[Refused]:
    strategy, size = args.get("strategy"), args.get("group_size")
    if args.get("type", "int") not in ("int", "float"):
        yield Refused(f"{where}/type", _shown(args["type"]), "int or float")
    if strategy is not None and strategy not in _STRATEGIES:
        yield Refused(f"{where}/strategy", _shown(strategy), "one of " + ", ".join(_STRATEGIES))
    if strategy in ("group", "tensor_group") and not (type(size) is int and size > 0):
        yield Refused(f"{where}/group_size", _shown(size), f"positive for strategy {strategy}")
    if strategy == "block" and not is_block(args.get("block_structure")):
        yield Refused(f"{where}/block_structure", _shown(args.get("block_structure")), "two sizes for strategy block")
    if args.get("actorder") in ("group", "dynamic", True):
        for reader, since in ((VLLM, ORDERED), ("transformers", REORDERED)):
            yield Refused(f"{where}/actorder", _shown(args["actorder"]), "static, weight or null", reader, since)


def _of_cache(scheme: Any) -> Iterator[Refused]:
    if not isinstance(scheme, Mapping):
        return
    where = "/kv_cache_scheme"
    for key, must in (("type", ("float",)), ("num_bits", (8,)), ("strategy", ("tensor", "attn_head"))):
        if scheme.get(key) not in must:
            yield Refused(f"{where}/{key}", _shown(scheme.get(key)), " or ".join(map(str, must)), VLLM, ORDERED)
    if not scheme.get("symmetric"):
        yield Refused(f"{where}/symmetric", _shown(scheme.get("symmetric")), "true", VLLM, ORDERED)


def of_fp8(raw: Mapping[str, Any]) -> Iterator[Refused]:
    """vllm-project/vllm fp8.py (Fp8Config)."""
    scheme, block = raw.get("activation_scheme"), raw.get("weight_block_size")
    dynamic = Instead("dynamic", unless=".input_scale")
    if scheme not in ("static", "dynamic"):
        yield Refused("/activation_scheme", _shown(scheme), "dynamic or static", VLLM, "", dynamic)
    if block is not None and not is_block(block):
        yield Refused("/weight_block_size", _shown(block), "two sizes", VLLM)
    elif block is not None and scheme == "static":
        yield Refused("/activation_scheme", "static", "dynamic beside weight_block_size", VLLM, "", dynamic)


def of_gptq(raw: Mapping[str, Any]) -> Iterator[Refused]:
    """vllm-project/vllm auto_gptq.py (from_config) and utils/gptq_utils.py (normalize_and_validate_gptq_desc_act)."""
    yield from _keys(raw, (("bits",), ("group_size",), ("desc_act",), ("sym",)))
    if raw.get("desc_act") and raw.get("group_size") != -1:
        yield Refused("/desc_act", "true", "false, but for group_size -1", VLLM, ORDERED, Instead(False, ordered=True))


def of_awq(raw: Mapping[str, Any]) -> Iterator[Refused]:
    """vllm-project/vllm auto_awq.py (from_config); ModelCloud/GPTQModel 7.7 quantization/config.py."""
    yield from _keys(raw, (("bits", "w_bit"), ("group_size", "q_group_size"), ("zero_point",)))
    for key in ("checkpoint_format", "format"):  # GPTQModel's own choice of a reader, by quant_method first
        if raw.get(key) in ("gptq", "gptq_v2"):
            yield Refused(f"/{key}", str(raw[key]), "gemm or gemv for quant_method awq")


def of_modelopt(stated: Mapping[str, Any], where: str, excluded: str) -> Iterator[Refused]:
    """stated: where quant_algo stands, at the pointer `where`. vllm-project/vllm modelopt.py (from_config)."""
    algorithm = str(stated.get("quant_algo") or "").upper()
    if algorithm not in _MODELOPT:
        yield Refused(f"{where}/quant_algo", _shown(stated.get("quant_algo")), "one of " + ", ".join(_MODELOPT), VLLM)
    if not isinstance(stated.get(excluded, []), list):
        yield Refused(f"{where}/{excluded}", _shown(stated[excluded]), "a list", VLLM)


def _keys(raw: Mapping[str, Any], sets: Iterable[tuple[str, ...]]) -> Iterator[Refused]:
    """Keys of which one of each set must be there."""
    for names in sets:
        if not any(name in raw for name in names):
            yield Refused(f"/{names[0]}", "", "it", VLLM)


def _shown(value: Any) -> str:
    return "" if value is None else str(value)[:60]
