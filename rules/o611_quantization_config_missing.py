"""O611 quantization-config-missing: packed tensors, but quantization_config is missing.

Why: bits, group size and zero points are not stated anywhere. Engines treat such a checkpoint as unquantized and look
for weights that are not there.

Seen as:
- vLLM: `Cannot find the config file for gptq`
- transformers: `Some weights of the model checkpoint were not used`

Do: copy quantize_config.json from the source of the model, or write the quantization_config that its author used.

False alarms: none; without it no engine reads the file.

Fix safety: safe where the tensors determine all of it: bits and groups by their shapes, and symmetry and version by
zero points that are the same symmetric word throughout; always for AWQ. Zero points that vary do not show the GPTQ
version, and other formats are not read: then manual.

Sources: vllm-project/vllm issues 1100 and 13612; vllm-project/llm-compressor issues 959 and 967.
"""

from doctor.lint.rule import KNOWN, MISSING, Fix, Place, SetJson, _, finding, is_mlx_words, packed_tails, plural, rule
from doctor.lint.testing import np, tiny_gptq


@rule("O611", "error")
def quantization_config_missing(checkpoint, quantization_block, tensors, config, packed_words=None):
    if quantization_block is not None or isinstance(config.get("quantization"), dict):
        return
    tails = packed_tails()
    packed = [name for name in tensors if name.endswith(tails)]
    packed = packed or sorted(name for name, info in tensors.items() if _by_its_scales(info, tensors))
    if not packed:
        return
    yield finding(
        plural(
            "{n:,} tensor is packed ({first}), but there is no quantization_config",
            "{n:,} tensors are packed (first {first}), but there is no quantization_config",
            len(packed),
            first=packed[0],
        ),
        at=Place("config.json", pointer="/quantization_config"),
        evidence={"packed": len(packed)},
        fix=_fix(tensors, config, packed_words or {}),
        advice=_("copy quantize_config.json from the source of the model"),
    )


def _by_its_scales(info, tensors):
    """Whether a tensor is codes by what stands beside it: HQQ's, MLX's words, 8-bit floats."""
    if is_mlx_words(info):
        return f"{info.name.removesuffix('.weight')}.scales" in tensors
    if info.dtype.name == "F8_E4M3" and info.name.endswith(".weight"):
        return any(f"{info.name}_{tail}" in tensors for tail in ("scale", "scale_inv"))
    return info.name.endswith(".W_q")


def _fix(tensors, config, words):
    """quantization_config as the tensors and their words show it; None where they leave anything open. Older tools wrote
    it as compression_config, which vLLM still reads.
    """
    stated = config.get("compression_config")
    if isinstance(stated, dict) and any(form.claims(stated) for form in KNOWN.values()):
        edit = SetJson("config.json", "/quantization_config", stated, config.get("quantization_config", MISSING))
        return Fix(_("copy compression_config to quantization_config, as readers call it now"), (edit,))
    for form in KNOWN.values():
        tail = f".{form.words}"
        modules = [n.removesuffix(tail) for n in tensors if form.words and n.endswith(tail)]
        shapes, seen = ({m: _parts(m, form, facts) for m in modules} for facts in (tensors, words))
        block = form.shown({m: {k: info.shape for k, info in own.items()} for m, own in shapes.items()}, seen)
        if block is not None:
            break
    else:
        return None
    edit = SetJson("config.json", "/quantization_config", block, config.get("quantization_config", MISSING))
    values = {"method": block["quant_method"], "bits": block["bits"]}
    group = block["group_size"]
    title = (
        _(
            "write quantization_config as the tensors show it: {method}, {bits} bits, groups of {group}",
            group=group,
            **values,
        )
        if group > 0
        else _("write quantization_config as the tensors show it: {method}, {bits} bits, whole rows", **values)
    )
    return Fix(title, (edit,))


def _parts(module, form, facts):
    return {part: facts[f"{module}.{part}"] for part in form.part_names if f"{module}.{part}" in facts}


def bad():
    case = tiny_gptq()
    del case.config["quantization_config"]
    return (
        case,
        "14 tensors are packed (first model.layers.0.mlp.down_proj.qweight), but there is no quantization_config",
    )


def good():
    return tiny_gptq()


def more():
    """Cases whose fixes the example above does not show."""
    case = tiny_gptq(version="gptq_v2")
    del case.config["quantization_config"]
    yield case
    case = tiny_gptq()
    del case.config["quantization_config"]
    for name in [n for n in case.tensors if n.endswith((".g_idx", ".qweight"))]:
        if name.endswith(".g_idx"):
            del case.tensors[name]
        else:  # the other way round: rows are in_features, a word holds eight out_features
            case.tensors[name] = np.ascontiguousarray(case.tensors[name].reshape(case.tensors[name].shape[0] * 8, -1))
    yield case
