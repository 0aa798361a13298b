"""G307 fused-linears-differ: only some of the fused linears q, k, v (or gate, up) are quantized.

Why: serving engines store q, k and v as one matrix, and gate and up as one. All parts need the same bits and groups, so
a checkpoint that keeps one of them in 16 bits cannot be loaded.

Seen as:
- vLLM: `Detected some but not all shards of`
- vLLM: `Found different quantization schemes for the shards of`
- ExLlamaV2: `Partially quantized`

Do: keep all parts of a fused matrix in 16 bits, or none.

False alarms: a runtime that never fuses (transformers).

Fix safety: unsafe: it changes the recipe that you asked for, never the checkpoint. A checkpoint that is already
quantized in this way must be quantized again.

Sources: vllm-project/vllm vllm/model_executor/layers/quantization/utils/quant_utils.py (is_layer_skipped);
vllm issues 47473, 50214 and 53992; turboderp/exllamav2 exllamav2/module.py.
"""

from doctor.lint.rule import FUSED, Fix, Keep, Place, _, finding, listed, rule
from doctor.lint.testing import never_in, tiny

FUSING = ("vllm", "sglang", "exllamav2")


@rule("G307", "error")
def fused_linears_differ(checkpoint, split, recipe):
    if not split.missed:
        return
    of_role = {role: group for group in reversed(FUSED) for role in group}
    seen: dict[tuple, list] = {}
    for linear in split.linears:
        fused = of_role.get(linear.role)
        if fused:
            seen.setdefault((linear.name.rpartition(".")[0], fused), []).append(linear)
    for (parent, _fused), members in sorted(seen.items()):
        inside = [x.role for x in members if x.name not in split.missed]
        outside = [x.role for x in members if x.name in split.missed]
        if inside and outside:
            yield finding(
                _(
                    "{parent}: {quantized} in {bits} bits and {kept} in 16 bits, but engines fuse them into one matrix",
                    parent=parent,
                    quantized=listed(inside),
                    bits=split.bits,
                    kept=listed(outside),
                ),
                at=Place("", tensor=next(x.tensor for x in members if x.name in split.missed)),
                severity="error" if recipe.runtime in FUSING else "warning",
                evidence={"quantized": inside, "kept": outside},
                fix=None
                if split.stored
                else Fix(
                    _("keep {roles} in 16 bits too", roles=listed(inside)),
                    tuple(Keep(x.name) for x in members if x.name not in split.missed),
                    "unsafe",
                ),
                advice=_("keep all of them in 16 bits, or none"),
            )


def bad():
    case = tiny(never_in("phi3", why="query, key and value are stored as one matrix"))
    case.recipe = case.recipe.with_field("keep", ("layers.1.self_attn.k_proj",)).with_field("runtime", "vllm")
    return (
        case,
        "model.layers.1.self_attn: q and v in 4 bits and k in 16 bits, but engines fuse them into one matrix",
    )


def good():
    case = tiny(never_in("phi3", why="query, key and value are stored as one matrix"))
    case.recipe = case.recipe.with_field("keep", ("*.self_attn.[qkv]_proj",))
    return case
