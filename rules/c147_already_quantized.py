"""C147 already-quantized: weights are already quantized.

Why: their numbers are meaningful only together with their scales. Read as plain weights they are wrong by orders of
magnitude: mlx once read bytes as integers, a factor of 20,000.

Seen as:
- llama.cpp: `Can not map tensor 'model.layers.0.mlp.down_proj.qweight'`
- vLLM: `Cannot find the config file for`
- llama.cpp: `NotImplementedError: Quant method is not yet supported`

Do: use the 16-bit original. If there is none, `--unsafe-fixes=C147` dequantizes to the numbers that an engine computes
with and writes them as plain weights: FP8 with its scales, and packed GPTQ, AWQ and compressed-tensors too.
`doctor convert model/ -o plain/ --format bf16` does the same as a command.

False alarms: a quantized checkpoint is judged to be served as it is (`--for serve`, its default): then this is a note,
and packed GPTQ, AWQ and compressed-tensors checkpoints have none unless this fix is requested by name. It is an error
where a plan to quantize is asked for, as by `--for gptq`.

Fix safety: unsafe, and only by name: what rounding removed does not come back, and the files become two to four times
as large. Each weight is code minus zero point times scale in float32, rounded once to the embedding's dtype. Other
formats stay manual.

Sources: ml-explore/mlx-lm issue 1192; ModelCloud/GPTQModel PR 2827; transformers PR 46763.
"""

from doctor.lint.rule import (
    Fix,
    Place,
    Unavailable,
    _,
    dequantize_beside,
    dequantize_packed,
    finding,
    is_scale_beside_weight,
    narrow_weights,
    packed_words,
    plural,
    read_quantization,
    readable,
    rule,
)
from doctor.lint.testing import tiny


@rule("C147", "error", implied_by=("F002", "F005", "G320", "O620", "O621", "O622", "O623"))
def already_quantized(checkpoint, tensors, config, quantization_block, asked, goal, every_stored_bytes=None):
    packed = packed_words(tensors)
    if packed:
        if goal == "quantize" or ("C147" in asked and quantization_block is not None):
            yield _packed(checkpoint, tensors, packed, quantization_block, "" if goal == "quantize" else "info")
        return
    narrow = narrow_weights(tensors)
    if not narrow:
        return
    scales = [n for n in tensors if is_scale_beside_weight(n)]
    first = min(narrow, key=lambda info: info.name)
    method = quantization_block[0].get("quant_method") if quantization_block else None
    named = {"dtype": first.dtype.name, "scales": len(scales), "first": first.name}
    yield finding(
        plural(
            "{n:,} weight is stored in {dtype} by {method} with {scales:,} scale tensors: {first}",
            "{n:,} weights are stored in {dtype} by {method} with {scales:,} scale tensors; the first is {first}",
            len(narrow),
            method=method,
            **named,
        )
        if method
        else plural(
            "{n:,} weight is stored in {dtype} with {scales:,} scale tensors: {first}",
            "{n:,} weights are stored in {dtype} with {scales:,} scale tensors; the first is {first}",
            len(narrow),
            **named,
        ),
        at=Place(first.shard, tensor=first.name),
        severity="" if goal == "quantize" else "info",
        evidence={"weights": len(narrow), "scales": len(scales), "dtype": first.dtype.name},
        fix=dequantize_beside(checkpoint, tensors, narrow, quantization_block, every_stored_bytes or {})
        or Fix(_("take the 16-bit original"), (), "manual"),
    )


def _packed(checkpoint, tensors, packed, block, severity):
    fix = None
    try:
        if block is None:
            raise Unavailable(_("no quantization_config"))
        quant = readable(read_quantization(*block))
        fix = dequantize_packed(checkpoint, tensors, block, quant)
        why = _("{bits} bits", bits=quant.bits)
    except Unavailable as error:
        why = error.args[0]
    method = block[0].get("quant_method", _("a quantizer")) if block else _("a quantizer")
    return finding(
        plural(
            "{n:,} linear is packed by {method} ({why}): {first}",
            "{n:,} linears are packed by {method} ({why}); the first is {first}",
            len(packed),
            method=method,
            why=why,
            first=packed[0].name,
        ),
        severity=severity,
        at=Place(packed[0].shard, tensor=packed[0].name),
        evidence={"linears": len(packed)},
        fix=fix or Fix(_("take the 16-bit original"), (), "manual"),
    )


def bad():
    import numpy as np

    case = tiny()
    case.recipe = case.recipe.with_field("goal", "quantize")
    rng = np.random.default_rng(3)
    for name in [linear.tensor for linear in case.spec.linears]:
        case.tensors[name] = rng.integers(1, 0x78, case.tensors[name].shape, np.uint8)
        case.tensors[name + "_scale_inv"] = np.full((1, 1), 0.01, np.float32)
        case.dtypes |= {name: "F8_E4M3", name + "_scale_inv": "F32"}
    case.config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    return (
        case,
        "14 weights are stored in F8_E4M3 by fp8 with 14 scale tensors; the first is model.layers.0.mlp.down_proj.weight",
    )


def good():
    return tiny()
