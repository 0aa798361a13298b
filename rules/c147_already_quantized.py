"""C147 already-quantized: the weights are stored in a quantized form from which nothing can be quantized again.

Why: their numbers mean something only together with their scales. Read as plain weights they are wrong by orders of
magnitude: mlx once took bytes for integers, a factor of 20,000.

Seen as:
- llama.cpp: `Can not map tensor 'model.layers.0.mlp.down_proj.qweight'`
- vLLM: `Cannot find the config file for`
- llama.cpp: `NotImplementedError: Quant method is not yet supported`

Do: take the 16-bit original. Where there is none, `--unsafe-fixes=C147` writes the numbers that an engine computes with
as plain weights: FP8 with its scales, and packed GPTQ, AWQ and compressed-tensors too.

False alarms: packed GPTQ, AWQ and compressed-tensors checkpoints are outputs of a quantizer and judged as such (O6xx);
they are named here only when this fix is asked for by name. `doctor quantize` refuses them by itself.

Fix safety: unsafe, and only by name: what rounding took away does not come back, and the files become two to four times
as large. Each weight is code minus zero point times scale in float32, rounded once to the type of the embedding. Other
forms stay manual.

Sources: ml-explore/mlx-lm issue 1192; ModelCloud/GPTQModel PR 2827; transformers PR 46763.
"""

import re

from doctor.lint.rule import (
    PARTS,
    WORD_TAILS,
    Dequantize,
    DropFile,
    DropTensor,
    Fix,
    Place,
    RemoveJson,
    Unavailable,
    finding,
    packed_size,
    read_quantization,
    rule,
)
from doctor.lint.testing import tiny

SCALES = re.compile(
    r"\.(weight_scale_inv|weight_scale|SCB|absmax|quant_state\.bitsandbytes__\w+|quant_map|_scales)$|_(blocks|scales)$"
)


FP8_PARTS = ("weight_scale_inv", "weight_scale", "input_scale", "activation_scale")
OWN_FILES = ("quantize_config.json", "quant_config.json")


@rule("C147", "error", implied_by=("F002", "F005"))
def already_quantized(checkpoint, tensors, config, quantization_block, asked):
    packed = [i for n, i in sorted(tensors.items()) if n.endswith(WORD_TAILS)]
    if packed:
        if "C147" in asked and quantization_block is not None:
            yield _packed(checkpoint, tensors, packed, quantization_block)
        return
    narrow = [
        i
        for n, i in tensors.items()
        if n.endswith((".weight", "_blocks", "_proj"))
        and len(i.shape) >= 2
        and (i.dtype.bits < 16 and i.dtype.name != "BOOL")
    ]
    if not narrow:
        return
    scales = [n for n in tensors if SCALES.search(n)]
    first = min(narrow, key=lambda info: info.name)
    method = (quantization_block or ({},))[0].get("quant_method")
    by = f" by {method}" if method else ""
    yield finding(
        f"{len(narrow):,} weights are stored in {first.dtype.name}{by} with {len(scales):,} tensors of scales, the first is {first.name}",
        at=Place(first.shard, tensor=first.name),
        evidence={"weights": len(narrow), "scales": len(scales), "dtype": first.dtype.name},
        fix=_fp8(checkpoint, tensors, narrow, quantization_block) or Fix("take the 16-bit original", (), "manual"),
    )


def _packed(checkpoint, tensors, packed, block):
    fix = None
    try:
        quant = read_quantization(*block)
        if quant.bits not in (2, 3, 4, 8) or quant.version not in ("gptq", "gptq_v2", "gemm", "pack-quantized"):
            raise Unavailable(f"{quant.version} with {quant.bits} bits is not unpacked here")
        edits, kind = [], _dtype(tensors)
        for info in packed:
            module, _, tail = info.name.rpartition(".")
            width, height = packed_size(quant, module, tail, info.shape)
            edits.append(
                Dequantize(
                    f"{module}.weight",
                    (height, width),
                    quant.method,
                    quant.bits_of(module),
                    2 if quant.version == "gptq_v2" else 1,
                    dtype=kind,
                )
            )
            edits += [DropTensor(f"{module}.{part}") for part in PARTS[quant.method] if f"{module}.{part}" in tensors]
        fix = _plain(checkpoint, block, edits, len(packed))
        why = f"{quant.bits} bits"
    except Unavailable as error:
        why = str(error)
    method = block[0].get("quant_method", "a quantizer")
    return finding(
        f"{len(packed):,} linears are packed by {method} ({why}), the first is {packed[0].name}",
        severity="info",
        at=Place(packed[0].shard, tensor=packed[0].name),
        evidence={"linears": len(packed)},
        fix=fix or Fix("take the 16-bit original", (), "manual"),
    )


def _fp8(checkpoint, tensors, narrow, block):
    """Each 8-bit weight with one scale, a row of them or one for each tile; None where something else is narrow."""
    edits, kind = [], _dtype(tensors)  # once: DeepSeek-V3 has 46,000 such weights
    for info in narrow:
        scales = [n for n in (f"{info.name}_scale_inv", f"{info.name}_scale") if n in tensors]
        if (
            info.dtype.name != "F8_E4M3"
            or len(info.shape) != 2
            or len(scales) != 1
            or not info.name.endswith(".weight")
        ):
            return None
        tile = (block[0].get("weight_block_size") if block else None) or ()
        whole = tensors[scales[0]].numel == 1 or tensors[scales[0]].shape[-1] == 1
        edits.append(Dequantize(info.name, info.shape, "fp8", 8, block=() if whole else tuple(tile), dtype=kind))
        module = info.name.removesuffix(".weight")
        edits += [DropTensor(f"{module}.{part}") for part in FP8_PARTS if f"{module}.{part}" in tensors]
    return _plain(checkpoint, block, edits, len(narrow))


def _plain(checkpoint, block, edits, count):
    if block is not None and block[2]:
        edits.append(RemoveJson(block[1], block[2], block[0]))
    edits += [DropFile(name) for name in OWN_FILES if name in checkpoint.entries]
    kind = edits[0].dtype
    return Fix(
        f"write {count:,} weights as plain {kind} numbers, without quantization_config",
        tuple(edits),
        "unsafe",
        by_name=True,
    )


def _dtype(tensors):
    """The type of the embedding, which these formats leave alone."""
    kinds = {i.dtype.name for n, i in tensors.items() if "embed" in n or "wte" in n}
    return next((k for k in ("BF16", "F16", "F32") if k in kinds), "BF16")


def bad():
    import numpy as np

    case = tiny()
    rng = np.random.default_rng(3)
    for name in [n for n in case.tensors if "_proj.weight" in n]:
        case.tensors[name] = rng.integers(1, 0x78, case.tensors[name].shape, np.uint8)
        case.tensors[name + "_scale_inv"] = np.full((1, 1), 0.01, np.float32)
        case.dtypes |= {name: "F8_E4M3", name + "_scale_inv": "F32"}
    case.config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    return (
        case,
        "14 weights are stored in F8_E4M3 by fp8 with 14 tensors of scales, the first is model.layers.0.mlp.down_proj.weight",
    )


def good():
    return tiny()
