"""O621 stored-bits-differ: quantization_config states another format than the weights have.

Why: an engine builds the linears that quantization_config describes and reads the tensors as their codes. Where an
export kept another format than its label says, 8-bit floats are read as pairs of 4-bit codes: the file does not load, or
the model takes half again as much memory as promised.

Seen as:
- vLLM: `assert param_data.shape == loaded_weight.shape`

Do: export again with the format that the label names, or correct the label.

False alarms: none; element types and shapes were compared. Weights without a scale beside them are not judged.

Fix safety: no fix: which of the two is meant is not in the files.

Sources: NVIDIA/Model-Optimizer issue 868 (an export labelled NVFP4 that holds FP8 weights of full width);
vllm-project/vllm vllm/model_executor/layers/quantization/modelopt.py.
"""

from collections import Counter

from doctor.lint.rule import KNOWN, Place, _, finding, plural, rule
from doctor.lint.testing import np, tiny


@rule("O621", "error", implied_by=("F002", "F005"))
def stored_bits_differ(checkpoint, quantization_block, stored_weights):
    if quantization_block is None:
        return
    raw, file, pointer = quantization_block
    form = next((f for f in KNOWN.values() if f.claims(raw)), None)
    stated = form.stored_bits(raw) if form is not None else None
    other = [w for w in stored_weights.values() if stated is not None and w.scheme.bits != stated]
    if form is None or not other:
        return
    first = other[0]
    bits = Counter(w.scheme.bits for w in other).most_common(1)[0][0]
    yield finding(
        plural(
            "quantization_config says {stated} ({bits} bits), but {n:,} weight is stored in {dtype} ({own} bits): {first}",
            "quantization_config says {stated} ({bits} bits), but {n:,} weights are stored in {dtype} ({own} bits), "
            "first {first}",
            len(other),
            stated=form.stated_name(raw),
            bits=stated,
            dtype=first.info.dtype.name,
            own=bits,
            first=first.info.name,
        ),
        at=Place(file, pointer=pointer or None),
        evidence={"stated": stated, "stored": bits, "weights": len(other), "of": len(stored_weights)},
        facts_table=(
            (_("weights"), _("element type"), _("bits")),
            *(
                (count, dtype, own)
                for (dtype, own), count in Counter(
                    (w.info.dtype.name, w.scheme.bits) for w in stored_weights.values()
                ).items()
            ),
        ),
        advice=_("export the model again; the label and the tensors are of two formats"),
    )


def bad():
    case = tiny()
    rng = np.random.default_rng(3)
    for name in [n for n in case.tensors if "_proj.weight" in n]:
        module = name.removesuffix(".weight")
        case.tensors[name] = rng.integers(1, 0x78, case.tensors[name].shape, np.uint8)
        case.tensors |= {
            f"{module}.weight_scale": np.full((), 0.01, np.float32),
            f"{module}.weight_scale_2": np.full((), 0.01, np.float32),
            f"{module}.input_scale": np.full((), 0.02, np.float32),
        }
        case.dtypes |= {name: "F8_E4M3"} | {
            f"{module}.{part}": "F32" for part in ("weight_scale", "weight_scale_2", "input_scale")
        }
    case.config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}
    return case, (
        "quantization_config says NVFP4 (4 bits), but 14 weights are stored in F8_E4M3 (8 bits), "
        "first model.layers.0.mlp.down_proj.weight"
    )


def good():
    return tiny()
