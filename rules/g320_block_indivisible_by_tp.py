"""G320 block-indivisible-by-tp: tensor parallelism cuts through FP8 blocks.

Why: one scale belongs to a block of 128 × 128 weights, so each GPU must hold whole blocks. Engines cut gate, up, q, k
and v along their outputs, down and o along their inputs, and refuse a share that is no multiple of the block.

Seen as:
- vLLM: `Weight output_partition_size = 192 is not divisible by weight quantization block_n = 128`
- vLLM: `Weight input_size_per_partition = 192 is not divisible by weight quantization block_k = 128.`
- vLLM: `The output_size of gate's and up's weight = 192 is not divisible by weight quantization block_n = 128`
- SGLang: `The input_size of down's weight = 192 is not divisible by weight quantization block_k = 128.`

Do: use a number of GPUs from the table, pipeline parallelism, or for experts expert parallelism, which keeps them
whole.

False alarms: an engine that pads or splits blocks. vLLM 0.14 and newer no longer refuses q, k, v, gate and up by their
outputs, and then fails or reads wrong scales where the blocks of a part begin inside another part's. vLLM 0.31 is
reported to cut the blocks of experts into smaller ones, so experts are a warning there.

Fix safety: no fix: the files are correct; the number of GPUs is yours to choose.

Sources: vllm-project/vllm vllm/model_executor/layers/quantization/utils/fp8_utils.py (validate_fp8_block_shape),
fp8.py (Fp8MoEMethod.create_weights), vllm/model_executor/layers/linear.py (adjust_block_scale_shard), issues 52997,
45784 and 54178; sgl-project/sglang python/sglang/srt/layers/quantization/fp8.py.
"""

from doctor.lint.rule import Place, Unavailable, _, cuts, finding, listed, rule, size_key, version_before
from doctor.lint.testing import np, tiny

TPS = (1, 2, 3, 4, 6, 8, 12, 16)
CUTS_BLOCKS = ("", "vllm", "sglang")  # runtimes that split such weights
REFINES = ("vllm", "0.31.0")  # from this version on, as its users report
ROLES = " q k v qkv o gate up gate_up down "  # the order in which a decoder layer uses them


@rule("G320", "error", implied_by=("G304",))
def block_indivisible_by_tp(checkpoint, blocked_linears, spec, recipe):
    if recipe.runtime not in CUTS_BLOCKS:
        raise Unavailable(_("{runtime} does not split weights with block scales", runtime=recipe.runtime))
    tp = recipe.tp
    every: set = set()
    misfits: dict[tuple, list] = {}
    for blocked in blocked_linears:
        linear = blocked.linear
        for cut in cuts(blocked, spec):
            every.add(cut)
            if cut.fits(tp) or (tp == 1 and (linear.expert is None or not recipe.runtime)):
                continue
            key = _key(spec, linear, cut)
            misfits.setdefault((key, cut.size, cut.block, linear.expert is not None), []).append((linear, cut))
    fitting = [n for n in TPS if all(cut.fits(n) for cut in every)]
    for (key, size, block, experts), found in misfits.items():
        linears = {linear.name for linear, _cut in found}
        roles = sorted({cut.role for _linear, cut in found}, key=lambda role: ROLES.find(f" {role} "))
        cut, share = found[0][1], found[0][1].share(tp)
        legal = [n for n in TPS if all(c.fits(n) for _linear, c in found)]
        heads = spec.lookup(key) if key in _head_keys(spec) else None
        yield finding(
            _(
                "{key} {size} on {tp} GPUs leaves {share:g} for {roles}: not a multiple of the block of {block}",
                key=key or _("size"),
                size=_("{n} × {width}", n=heads, width=size // heads) if heads and size % heads == 0 else size,
                tp=tp,
                share=share,
                roles=listed(roles),
                block=block,
            ),
            at=Place("config.json", pointer=spec.at(key) if key else None),
            severity="warning" if experts and _refines(recipe) else "",
            evidence={"size": size, "block": block, "tp": tp, "share": share, "linears": len(linears), "fits": legal},
            facts_table=(
                (_("tensor parallel"), *sorted({*TPS, tp})),
                (_("on each GPU"), *(f"{cut.share(n):g}" for n in sorted({*TPS, tp}))),
                (_("fits"), *(_("yes") if cut.fits(n) else _("no") for n in sorted({*TPS, tp}))),
                (_("tensor parallel that fits"), ", ".join(map(str, legal)) or "-"),
                (_("of all linears"), ", ".join(map(str, fitting)) or "-"),
            ),
            advice=_advice(fitting, tp, experts),
        )


def _refines(recipe):
    """Whether the runtime may cut the blocks of experts into smaller ones with the same scale."""
    if recipe.runtime and recipe.runtime != REFINES[0]:
        return False
    return not recipe.runtime_version or not version_before(recipe.runtime_version, REFINES[1])


def _head_keys(spec):
    return spec.key_for("num_key_value_heads"), spec.key_for("num_attention_heads")


def _key(spec, linear, cut):
    """The config key that sets the axis: heads for attention, else the width of the MLP."""
    if cut.role in ("k", "v") or (cut.copies and cut.role == "qkv"):
        return spec.key_for("num_key_value_heads")
    if cut.role in ("q", "o", "qkv"):
        return spec.key_for("num_attention_heads")
    return size_key(spec, linear.name, 1 if cut.role == "down" else 0)


def _advice(fitting, tp, experts):
    fewer = max((n for n in fitting if n <= tp), default=None)
    if experts:
        return _("use expert parallelism, which keeps experts whole, or fewer GPUs")
    return _("--tp {n}", n=fewer) if fewer else _("use pipeline parallelism, which splits no weight")


def bad():
    case = tiny(mlp=192)
    rng = np.random.default_rng(3)
    for name in [linear.tensor for linear in case.spec.linears]:
        rows, columns = case.tensors[name].shape
        case.tensors[name] = rng.integers(1, 0x78, (rows, columns), np.uint8)
        case.tensors[name + "_scale_inv"] = np.full((-(-rows // 32), -(-columns // 32)), 0.01, np.float32)
        case.dtypes |= {name: "F8_E4M3", name + "_scale_inv": "F32"}
    case.config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [32, 32],
    }
    case.recipe = case.recipe.with_field("tp", 4)
    return case, ("intermediate_size 192 on 4 GPUs leaves 48 for gate, up and down: not a multiple of the block of 32")


def good():
    case = tiny()
    case.recipe = case.recipe.with_field("tp", 2)
    return case
