"""O625 packed-parts-incomplete: a packed linear of EXL2, EXL3, HQQ, MLX or bitsandbytes lacks a part.

Why: the words of a linear mean nothing without their scales, groups and permutations. A loader stops at the first linear
that lacks one, or takes it for a plain linear whose weight is absent.

Seen as:
- ExLlamaV3: `was not found in model`
- mlx-lm: `Missing 1 parameters`
- bitsandbytes: `'NoneType' object has no attribute 'absmax'`
- transformers: `KeyError: 'absmax'`
- mlx-swift: `Mismatched parameter scales shape`

Do: copy the shard again from its source.

False alarms: none known. Only names and shapes are judged; HQQ and MLX are not unpacked.

Fix safety: no fix: the part is not in the files.

Sources: turboderp-org/exllamav2 exllamav2/module.py (load_weight makes q_perm of q_invperm) and
exllamav2_ext/cuda/q_matrix.cu; turboderp-org/exllamav3 exllamav3/modules/linear.py (is_exl3_storage); mobiusml/hqq
hqq/core/quantize.py (state_dict; zero_scale with offload_meta); bitsandbytes-foundation/bitsandbytes
bitsandbytes/functional.py (QuantState.from_dict); ml-explore/mlx python/mlx/nn/layers/quantized.py and
base.py (load_weights); ml-explore/mlx-lm mlx_lm/utils.py (load_model).
"""

from doctor.lint.rule import (
    COMPANION_WORDS,
    KNOWN,
    Place,
    _,
    companion_shapes,
    companions_missing,
    finding,
    is_mlx_words,
    listed,
    mlx_parts_missing,
    mlx_shapes,
    rule,
)
from doctor.lint.testing import np, tiny


@rule("O625", "error")
def packed_parts_incomplete(checkpoint, tensors, kind, quantization_block, spec, config=None):
    mlx = (config or {}).get("quantization") if kind == "mlx" else None
    stating = quantization_block and next((f for f in KNOWN.values() if f.claims(quantization_block[0])), None)
    tails = (*COMPANION_WORDS, ".weight") if mlx is not None or stating else COMPANION_WORDS
    for name, info in sorted(item for item in tensors.items() if item[0].endswith(tails)):
        if mlx is not None and is_mlx_words(info):
            absent, misshapen = mlx_parts_missing(tensors, name, mlx), mlx_shapes(tensors, name, mlx)
        elif mlx is None and name.endswith(COMPANION_WORDS):
            absent, misshapen = companions_missing(tensors, name), companion_shapes(tensors, name)
        elif stating and info.dtype.bits == 8 and name.endswith(".weight"):
            absent, misshapen = stating.incomplete(info, tensors, spec.linear_shape)
        else:
            continue
        module = name.rpartition(".")[0]
        if absent:
            yield finding(
                _("{linear} is packed, but has no {absent}", linear=module, absent=listed(absent)),
                at=Place(info.shard, tensor=name),
                evidence={"absent": absent},
                advice=_("copy the shard again from its source"),
            )
        for part, found, wanted in misshapen if not absent else ():
            yield finding(
                _(
                    "{linear}: {part} is {found}; its words {words} ask for {wanted}",
                    linear=module,
                    part=part,
                    found=found,
                    words=list(info.shape),
                    wanted=wanted,
                ),
                at=Place(info.shard, tensor=f"{module}.{part}"),
                evidence={"found": found, "wanted": wanted},
                advice=_("copy the shard again from its source"),
            )


def packed():
    """tiny() in EXL2: 4 bits in groups of 32."""
    case = tiny()
    case.recipe = case.recipe.with_field("goal", "serve")
    rng = np.random.default_rng(3)
    for linear in case.spec.linears:
        n, k = linear.out_features, linear.in_features
        del case.tensors[linear.tensor]
        case.dtypes.pop(linear.tensor, None)
        groups = -(-k // 32)
        words = rng.integers(-(1 << 31), 1 << 31, (k // 8, n), np.int64).astype(np.int32)
        parts: dict[str, tuple[np.ndarray, str]] = {
            "q_weight": (words, "I32"),
            "q_scale": (rng.integers(0, 1 << 30, (groups, n // 8), np.int64).astype(np.int32), "I32"),
            "q_scale_max": (np.full(groups, 0.01, np.float16).view(np.uint16), "F16"),
            "q_groups": (np.array([(4, 4 * at) for at in range(groups)], np.int16).reshape(-1), "I16"),
            "q_invperm": (rng.permutation(k).astype(np.int32), "I32"),
        }
        for part, (values, dtype) in parts.items():
            case.tensors[f"{linear.name}.{part}"], case.dtypes[f"{linear.name}.{part}"] = values, dtype
    case.config["quantization_config"] = {"quant_method": "exl2", "version": "0.3.2", "bits": 4.0, "head_bits": 6}
    return case


def bad():
    module = tiny().name("down").removesuffix(".weight")
    case = packed()
    del case.tensors[f"{module}.q_scale"], case.dtypes[f"{module}.q_scale"]
    return case, f"{module} is packed, but has no q_scale"


def good():
    return packed()
