"""O620 bitsandbytes-leftovers: weights packed by bitsandbytes, but quantization_config is missing.

Why: a model that was loaded in 8 or 4 bits and then saved or merged holds packed codes beside their scales (`SCB`,
`absmax`, `quant_map`, `quant_state`). Without quantization_config no reader unpacks them: the codes are read as
weights, and the scales as tensors that belong to no model.

Seen as:
- llama.cpp: `Can not map tensor 'model.layers.0.mlp.down_proj.weight.absmax'`
- llama.cpp: `Can not map tensor 'model.layers.0.self_attn.q_proj.SCB'`
- vLLM: `There is no module or parameter named 'model.layers.0.mlp.down_proj.SCB'`

Do: merge the adapter into the 16-bit base model, which loses nothing. Without it, write the weights as plain numbers.
Never drop the scales: without them the codes mean nothing.

False alarms: none; no other format has these names.

Fix safety: unsafe: what rounding removed does not come back. 8 bits: code times SCB / 127 in float32; 4 bits: the table's
value times absmax of its block, absmax itself unpacked where it is quantized again. Rounded once to the embedding's
dtype.

Sources: ggml-org/llama.cpp issue 12923; bitsandbytes-foundation/bitsandbytes bitsandbytes/functional.py
(QuantState.from_dict) and backends/default/ops.py.
"""

from doctor.lint.rule import KNOWN, Fix, Place, Unavailable, _, decoding, decoding_fix, finding, listed, plural, rule
from doctor.lint.testing import np, tiny


@rule("O620", "error", implied_by=("F002", "F005"))
def bitsandbytes_leftovers(checkpoint, tensors, quantization_block, every_stored_bytes=None):
    raw = quantization_block[0] if quantization_block else None
    for form in KNOWN.values():
        if not form.at_load or (raw is not None and form.claims(raw)):
            continue
        found = {n: scheme for n, info in tensors.items() if (scheme := form.scheme_beside(info, tensors, raw))}
        if not found:
            continue
        narrow = [tensors[name] for name in sorted(found)]
        modules = [info.name.removesuffix(".weight") for info in narrow]
        scales = sorted({part for part in form.beside for m in modules if f"{m}.{part}" in tensors})
        bits = sorted({scheme.bits for scheme in found.values()})
        try:
            stored = decoding(checkpoint, tensors, quantization_block, every_stored_bytes or {})
            fix = decoding_fix(stored, by_name=False)
        except Unavailable:
            fix = Fix(_("merge into the 16-bit base model"), (), "manual")
        yield finding(
            plural(
                "{n:,} linear is packed by {label} in {bits} bits, and no quantization_config says so ({first})",
                "{n:,} linears are packed by {label} in {bits} bits, and no quantization_config says so (first {first})",
                len(narrow),
                label=form.label,
                bits=listed(map(str, bits)),
                first=narrow[0].name,
            ),
            at=Place(narrow[0].shard, tensor=narrow[0].name),
            evidence={"weights": len(narrow), "bits": bits, "scales": scales},
            fix=fix,
            advice=_("merge into the 16-bit base model; these weights lost precision when they were loaded"),
        )


def bad():
    case = tiny()
    rng = np.random.default_rng(3)
    for name in [n for n in case.tensors if "_proj.weight" in n]:
        module, rows = name.removesuffix(".weight"), case.tensors[name].shape[0]
        case.tensors[name] = rng.integers(-127, 128, case.tensors[name].shape, np.int8)
        case.tensors[f"{module}.SCB"] = rng.uniform(0.1, 0.3, (rows,)).astype(np.float32)
        case.tensors[f"{module}.weight_format"] = np.zeros((), np.uint8)
        case.dtypes |= {name: "I8", f"{module}.SCB": "F32", f"{module}.weight_format": "U8"}
    return case, (
        "14 linears are packed by bitsandbytes in 8 bits, and no quantization_config says so "
        "(first model.layers.0.mlp.down_proj.weight)"
    )


def good():
    return tiny()


def more():
    """Cases whose fixes the example above does not show."""
    yield packed_in_four_bits()


def packed_in_four_bits(kind="nf4", nested=True):
    """A model saved in 4 bits without its quantization_config."""
    import json

    case = tiny()
    rng = np.random.default_rng(4)
    table = np.linspace(-1, 1, 16).astype(np.float32)
    for name in [n for n in case.tensors if "_proj.weight" in n]:
        n, k = case.tensors[name].shape
        blocks = -(-n * k // 64)
        state = {"quant_type": kind, "blocksize": 64, "dtype": "bfloat16", "shape": [n, k]}
        parts = {"quant_map": (table, "F32"), "absmax": (rng.uniform(0.1, 0.2, blocks).astype(np.float32), "F32")}
        if nested:
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.15}
            parts |= {
                "absmax": (rng.integers(0, 256, blocks, np.uint8), "U8"),
                "nested_absmax": (np.full(-(-blocks // 256), 0.05, np.float32), "F32"),
                "nested_quant_map": (np.linspace(-1, 1, 256).astype(np.float32), "F32"),
            }
        parts[f"quant_state.bitsandbytes__{kind}"] = (np.frombuffer(json.dumps(state).encode(), np.uint8), "U8")
        case.tensors[name], case.dtypes[name] = rng.integers(0, 256, (n * k // 2, 1), np.uint8), "U8"
        for part, (codes, dtype) in parts.items():
            case.tensors[f"{name}.{part}"], case.dtypes[f"{name}.{part}"] = codes, dtype
    return case
