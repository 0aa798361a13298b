"""O611 quantization-config-missing: tensors are packed, but no file says how.

Why: bits, group size and zero points are not stated anywhere. Engines take such a
checkpoint for an unquantized one and look for weights that are not there.

Seen as:
- vLLM: `Cannot find the config file for gptq`
- transformers: `Some weights of the model checkpoint were not used`

Do: copy quantize_config.json from where the model came from, or write the quantization_config that its
maker used.

False alarms: none; without it no engine reads the file.

Fix safety: safe where the tensors determine all of it: bits and groups by their shapes, and symmetry and version by
zero points that are one symmetric word throughout; AWQ always. Zero points that vary leave GPTQ's version open, and
other forms are not read: then manual.

Sources: vllm-project/vllm issues 1100 and 13612; vllm-project/llm-compressor issues 959 and 967.
"""

from doctor.lint.rule import MISSING, PACKED_TAILS, Fix, Place, SetJson, finding, rule, symmetric_word
from doctor.lint.testing import np, tiny_gptq


@rule("O611", "error")
def quantization_config_missing(checkpoint, quantization_block, tensors, config, packed_words=None):
    packed = [name for name in tensors if name.endswith(PACKED_TAILS)]
    if quantization_block is not None or not packed:
        return
    yield finding(
        f"{len(packed):,} tensors are packed (first {packed[0]}) and there is no quantization_config",
        at=Place("config.json", pointer="/quantization_config"),
        evidence={"packed": len(packed)},
        fix=_fix(tensors, config, packed_words or {}),
        advice="copy quantize_config.json from where the model came from",
    )


def _fix(tensors, config, words):
    """quantization_config as the tensors and their words show it; None where they leave anything open."""
    modules = [n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight")]
    shapes = [
        [
            tensors[f"{m}.{part}"].shape if f"{m}.{part}" in tensors else None
            for part in ("qweight", "qzeros", "scales", "g_idx")
        ]
        for m in modules
    ]
    if not shapes or any(len(s or ()) != 2 for three in shapes for s in three[:3]):
        return None
    found = {_read(*four) for four in shapes}
    if len(found) != 1 or None in found:
        return None
    method, bits, group = found.pop()
    block = {"quant_method": method, "bits": bits, "group_size": group}
    if method == "awq":
        block |= {"zero_point": True, "version": "gemm"}
    else:
        zeros, orders = (
            [words[f"{m}.{part}"] for m in modules if f"{m}.{part}" in words] for part in ("qzeros", "g_idx")
        )
        versions = [
            v
            for v in ("gptq", "gptq_v2")
            if bits != 3 and all(z.kinds is not None and z.kinds.keys() == {symmetric_word(bits, v)} for z in zeros)
        ]
        if (
            len(versions) != 1
            or len(zeros) < len(modules)
            or (any(s[3] for s in shapes) and len(orders) < len(modules))
        ):
            return None
        block |= {
            "sym": True,
            "desc_act": not all(o.rising for o in orders),
            "checkpoint_format": versions[0],
            "lm_head": "lm_head" in modules,
        }
    edit = SetJson("config.json", "/quantization_config", block, config.get("quantization_config", MISSING))
    groups = f"groups of {group}" if group > 0 else "whole rows"
    return Fix(f"write quantization_config as the tensors show it: {method}, {bits} bits, {groups}", (edit,))


def _read(words, zeros, scales, index):
    """(method, bits, group_size) of one linear by its shapes, None where they do not fit together."""
    groups, height = scales
    bits = zeros[1] * 32 / height
    if words[1] == height and index is not None:
        width, method = index[0], "gptq"
    elif words[1] == height:
        width, method = words[0] * 32 / bits, "gptq"
    else:
        width, method = words[0], "awq"
    fits = words == ((width * bits / 32, height) if method == "gptq" else (width, height * bits / 32))
    if bits not in (2, 3, 4, 8) or not fits or zeros[0] != groups or width % groups or (method == "awq" and bits != 4):
        return None
    return method, int(bits), int(width // groups) if groups > 1 else -1


def bad():
    case = tiny_gptq()
    del case.config["quantization_config"]
    return (
        case,
        "14 tensors are packed (first model.layers.0.mlp.down_proj.qweight) and there is no quantization_config",
    )


def good():
    return tiny_gptq()


def more():
    """Cases whose cures the example above does not show."""
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
