"""K502 kv-scales-missing: KV cache quantization is configured, but its scales are missing.

Why: an FP8 cache stores keys and values divided by a scale. Without one the engine uses 1.0: values beyond 448
saturate, and small ones round to 0.

Seen as:
- vLLM: `KeyError: 'model.layers.0.self_attn.k_scale'`
- vLLM: `Using KV cache scaling factor 1.0 for fp8_e4m3`
- vLLM: `KV-cache scale expects a scalar weight, got shape`
- vLLM: `k_scale is not loaded`
- vLLM: `Checkpoint does not provide a q scaling factor`

Do: calibrate the scales (a kv_cache_scheme in llm-compressor), or remove the entry and leave the cache
dtype on auto.

False alarms: engines that compute scales while serving.

Fix safety: unsafe: the entry is removed, and the cache stays in 16 bits, which takes twice the memory. Scales need a
calibration.

Sources: vllm-project/vllm vllm/model_executor/layers/quantization/kv_cache.py; vllm-project/llm-compressor
issue 2176.
"""

import re

from doctor.lint.rule import Fix, Place, RemoveJson, _, finding, plural, rule
from doctor.lint.testing import tiny_gptq

# Names that vLLM maps to the scales of an attention (weight_utils.py, maybe_remap_kv_scale_name; get_cache_scale_mapper
# of its formats): kv_scale stands for both.
SCALE = re.compile(
    r"^(?P<at>.*?)(?:\.attn|\.mla_attn)*(?:\.[kv]_proj|\.qkv_proj|\.qkqkv_proj)?"
    r"\.(?:(?P<one>[kv])_scale|(?P<both>kv)_scale|(?P<cache>[kv])_cache\.scale)$"
)
OUTPUT = re.compile(r"^(?P<at>.*)\.(?P<one>[kv])_proj\.output_scale$")


@rule("K502", "warning")
def kv_scales_missing(checkpoint, quantization_block, tensors, split=None):
    if quantization_block is None:
        return
    raw, file, pointer = quantization_block
    key = next((k for k in ("kv_cache_scheme", "kv_cache_quant_algo", "kv_cache_quant_method") if raw.get(k)), None)
    if key is None or (isinstance(raw[key], dict) and raw[key].get("dynamic") is True):
        return
    found = _scales(tensors)
    if found:
        yield from _not_one(tensors, raw[key])
        yield from _partly(found, split.linears if split else (), file, f"{pointer}/{key}")
        return
    yield finding(
        _("{key} is set and no tensor ends in .k_scale or .v_scale: the cache would use scale 1.0", key=key),
        at=Place(file, pointer=f"{pointer}/{key}"),
        fix=Fix(_("remove {key}", key=key), (RemoveJson(file, f"{pointer}/{key}", raw[key]),), "unsafe"),
        advice=_("calibrate the scales, or remove the entry"),
    )


def _scales(tensors):
    """Attention module -> which of its scales are there, "k" and "v"."""
    found: dict[str, set[str]] = {}
    for name in tensors:
        match = SCALE.match(name) or OUTPUT.match(name)
        if match:
            groups = match.groupdict()
            found.setdefault(match["at"], set()).update(groups["one"] or groups.get("cache") or "kv")
    return found


def _not_one(tensors, scheme):
    """Scales of more values than one, but for one a head, where the scheme says so."""
    if isinstance(scheme, dict) and scheme.get("strategy") == "attn_head":
        return
    for name, info in tensors.items():
        if info.numel != 1 and (SCALE.match(name) or OUTPUT.match(name)):
            yield finding(
                _("{tensor} has {numel:,} values; must be one for the cache of a layer", tensor=name, numel=info.numel),
                at=Place(info.shard, tensor=name),
                evidence={"numel": info.numel},
                advice=_("calibrate the cache again"),
            )


def _partly(found, linears, file, pointer):
    """Decoder layers without a scale, where others have theirs."""
    attentions = {linear.name.rpartition(".")[0] for linear in linears if linear.role in ("k", "qkv")}
    if not attentions & set(found):
        return  # named otherwise than the linears
    absent = sorted(f"{at}.{one}_scale" for at in attentions for one in "kv" if one not in found.get(at, ()))
    if absent:
        yield finding(
            plural(
                "{n:,} scale of the cache is missing, though others are there ({first}): it would be 1.0",
                "{n:,} scales of the cache are missing, though others are there (first {first}): they would be 1.0",
                len(absent),
                first=absent[0],
            ),
            at=Place(file, pointer=pointer),
            evidence={"absent": absent[:100], "layers": len(attentions)},
            advice=_("copy the shard again from its source, or calibrate the cache again"),
        )


def bad():
    case = tiny_gptq()
    case.config["quantization_config"]["kv_cache_scheme"] = {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
    }
    return (
        case,
        "kv_cache_scheme is set and no tensor ends in .k_scale or .v_scale: the cache would use scale 1.0",
    )


def good():
    return tiny_gptq()
