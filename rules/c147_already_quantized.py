"""C147 already-quantized: weights are already quantized.

Why: their numbers are meaningful only together with their scales. Read as plain weights they are wrong by orders of
magnitude: mlx once read bytes as integers, a factor of 20,000.

Seen as:
- llama.cpp: `Can not map tensor 'model.layers.0.mlp.down_proj.qweight'`
- vLLM: `Cannot find the config file for`
- llama.cpp: `NotImplementedError: Quant method is not yet supported`

Do: nothing, mostly: `doctor quantize` decodes such weights as it reads them, to the numbers that an engine computes with.
FP8, INT8, MXFP4, NVFP4, bitsandbytes, GGUF and packed GPTQ, AWQ and compressed-tensors are read. It is an error where scales
are absent, where a format is not read here, and where the plan has as many bits in a coarser grid than the stored
one: then take the 16-bit original, finer groups, fewer bits, or 8. `--unsafe-fixes=C147` writes
the plain weights, as `doctor convert model/ -o plain/ --format bf16` does.

False alarms: none known for the error. As a note it only says how the weights are stored.

Fix safety: unsafe, and only by name: what rounding removed does not come back, and the files become two to four times
as large. Each weight is code minus zero point times scale in float32, rounded once to the embedding's dtype. Other
formats stay manual.

Sources: ml-explore/mlx-lm issue 1192; ModelCloud/GPTQModel PR 2827; transformers PR 46763.
"""

from doctor.lint.rule import (
    Dequantize,
    DropTensor,
    Fix,
    Place,
    Unavailable,
    _,
    coarser,
    decoding,
    decoding_fix,
    finding,
    is_scale_beside_weight,
    is_written,
    packed_tails,
    plural,
    quantized,
    rule,
    undoes_packing,
)
from doctor.lint.testing import tiny

INTEGERS = ("I8", "U8", "I4", "U4")


@rule("C147", "error", implied_by=("F002", "F005", "G320", "G332", "O620", "O621", "O622", "O623"))
def already_quantized(
    checkpoint, tensors, config, quantization_block, asked, goal, recipe, decoded, every_stored_bytes=None
):
    if decoded is not None:
        if not decoded.stored:  # a GGUF file of floats
            return
        again = coarser(decoded, recipe)
        fix = Fix(_("take the 16-bit original"), (), "manual")
        yield _coarser(again, len(decoded.stored), recipe, fix) if again is not None else _decoded(decoded)
        return
    codes = sorted(quantized(tensors.values()), key=lambda info: info.name)
    packed = [i for i in codes if i.name.endswith(packed_tails())]
    served = packed or is_written(quantization_block and quantization_block[0])  # in a format that is read as it is
    if not codes or (served and goal != "quantize" and not ("C147" in asked and quantization_block)):
        return
    try:
        stored, why = decoding(checkpoint, tensors, quantization_block, every_stored_bytes or {}), ""
        fix = decoding_fix(stored)
        touched = {edit.tensor for edit in fix.edits if isinstance(edit, (Dequantize, DropTensor))}
        if any(undoes_packing(name) and name not in touched for name in tensors):  # what it scales is not known
            fix = Fix(_("take the 16-bit original"), (), "manual")
        again = coarser(stored, recipe) if goal == "quantize" else None
    except Unavailable as error:
        stored, why, again = None, error.args[0], None
        fix = Fix(_("take the 16-bit original"), (), "manual")
    method = quantization_block[0].get("quant_method") if quantization_block else None
    if again is not None:
        yield _coarser(again, len(codes), recipe, fix)
        return
    message = _packed(packed, method, stored, why) if packed else _beside(codes, tensors, method)
    first = (packed or codes)[0]
    no_config = not (quantization_block or packed or config.get("quantization"))  # readers take the codes for weights
    yield finding(
        message,
        at=Place(first.shard, tensor=first.name),
        severity=""
        if stored is None and (goal == "quantize" or (no_config and first.dtype.name in INTEGERS))
        else "info",
        evidence={"linears": len(packed)}
        if packed
        else {"weights": len(codes), "scales": _scales(tensors), "dtype": first.dtype.name},
        fix=fix,
        advice=_("quantize the 16-bit original: {why}", why=why) if stored is None and not packed else "",
    )


def _decoded(found):
    first = found.stored[0]
    return finding(
        plural(
            "{n:,} weight is stored in {label} and decoded as it is read: {first}",
            "{n:,} weights are stored in {label} and decoded as they are read; the first is {first}",
            len(found.stored),
            label=found.label,
            first=first.codes.name,
        ),
        at=Place(first.codes.shard, tensor=first.codes.name),
        severity="info",
        evidence={"weights": len(found.stored), "label": found.label},
    )


def _coarser(one, count, recipe, fix):
    plan, own = recipe.for_linear(one.module).scheme, one.scheme
    return finding(
        _(
            "{first} is stored in {label} with {bits} bits in groups of {group}; {plan_bits} bits in groups of "
            "{plan_group} would round it a second time and save nothing",
            first=one.codes.name,
            label=one.format.label,
            bits=own.bits,
            group=own.group_size,
            plan_bits=plan.bits,
            plan_group=plan.group_size,
        ),
        at=Place(one.codes.shard, tensor=one.codes.name),
        evidence={"weights": count, "bits": own.bits, "group_size": own.group_size, "sym": own.sym},
        fix=fix,
        advice=_("quantize the 16-bit original, serve it as it is, or plan fewer bits, or 8")
        if own.group_size == -1 or (plan.sym and not own.sym)
        else _(
            "quantize the 16-bit original, serve it as it is, or plan --group-size {group}, fewer bits, or 8",
            group=own.group_size,
        ),
    )


def _scales(tensors):
    return sum(map(is_scale_beside_weight, tensors))


def _beside(codes, tensors, method):
    named = {"dtype": codes[0].dtype.name, "scales": _scales(tensors), "first": codes[0].name}
    if method:
        return plural(
            "{n:,} weight is stored in {dtype} by {method} with {scales:,} scale tensors: {first}",
            "{n:,} weights are stored in {dtype} by {method} with {scales:,} scale tensors; the first is {first}",
            len(codes),
            method=method,
            **named,
        )
    return plural(
        "{n:,} weight is stored in {dtype} with {scales:,} scale tensors: {first}",
        "{n:,} weights are stored in {dtype} with {scales:,} scale tensors; the first is {first}",
        len(codes),
        **named,
    )


def _packed(packed, method, stored, why):
    return plural(
        "{n:,} linear is packed by {method} ({why}): {first}",
        "{n:,} linears are packed by {method} ({why}); the first is {first}",
        len(packed),
        method=method or _("a quantizer"),
        why=_("{bits} bits", bits=stored.stored[0].scheme.bits) if stored else why,
        first=packed[0].name,
    )


def bad():
    case = eight_bit_floats()
    for name in [n for n in case.tensors if n.endswith("_scale_inv")]:
        del case.tensors[name], case.dtypes[name]
    first = case.name("down")
    return (
        case,
        f"14 weights are stored in F8_E4M3 by fp8 with 0 scale tensors; the first is {first}",
    )


def good():
    return tiny()


def eight_bit_floats():
    """A model in FP8 with block scales, which a plan of 4 bits is for."""
    import numpy as np

    case = tiny()
    case.recipe = case.recipe.with_field("goal", "quantize")
    rng = np.random.default_rng(3)
    for name in [linear.tensor for linear in case.spec.linears]:
        case.tensors[name] = rng.integers(1, 0x78, case.tensors[name].shape, np.uint8)
        case.tensors[name + "_scale_inv"] = np.full((1, 1), 0.01, np.float32)
        case.dtypes |= {name: "F8_E4M3", name + "_scale_inv": "F32"}
    case.config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    return case
