"""G302 group-count-indivisible-by-tp: quantization groups cannot be split evenly across GPUs.

Why: tensor parallelism cuts o and down along their in_features. Each GPU must hold whole groups, because a group has
one scale: so in_features must be a multiple of group_size × tp. Engines refuse other sizes, or generate token 0 without
end, which is "!" in Qwen's vocabulary.

Seen as:
- vLLM: `is not divisible by group_size`
- vLLM: `The input size is not aligned with the quantized weight shape. This can be caused by too large tensor parallel size.`
- vLLM: `is not divisible by min_thread_k = 128. Consider reducing tensor_parallel_size`

Do: change the recipe (`--tp 1`, or a smaller group size), or pad the MLP: zero rows in gate and up, zero columns in
down. Qwen's own 14B and 72B GPTQ uploads are padded in this way (13696 to 14336, 29568 to 29696). Never cut weights to
fit.

False alarms: you will serve on one GPU only, or with pipeline parallelism.

Fix safety: unsafe: shapes change. In exact arithmetic the outputs do not: a padded hidden unit is act(0) · 0 = 0, and
its column in down is 0 too. The zeros are spread between the columns, so that no group is all zero.

Sources: vllm-project/vllm vllm/model_executor/layers/quantization/gptq.py (create_weights); QwenLM/Qwen3
issues 63 and 258; QwenLM/Qwen2 docs/source/quantization/gptq.md.
"""

from doctor.lint.rule import (
    ROW_PARALLEL,
    Fix,
    Place,
    _,
    axis_expression,
    finding,
    fits,
    grown,
    resized,
    rule,
    shown_role,
    size_key,
)
from doctor.lint.testing import tiny

TPS = (1, 2, 4, 8)  # the GPU counts people rent
OTHER_GROUPS = (64, 32)


@rule("G302", "error")
def group_count_indivisible_by_tp(checkpoint, layout, spec, recipe, tensors):
    group, tp = layout.group_size, recipe.tp
    if group == -1 or tp == 1 or recipe.runtime == "llama.cpp":  # llama.cpp splits by rows
        return
    misfits: dict[tuple, list] = {}
    for linear in layout.linears:
        width = linear.in_features
        # Groups that do not fit even one GPU are G301; heads that cannot be shared out are G304.
        whole = width % group == 0 and not (linear.role == "o" and spec.n_heads and spec.n_heads % tp)
        if linear.role in ROW_PARALLEL and whole and width % (group * tp):
            misfits.setdefault((size_key(spec, linear.name, 1), linear.role), []).append(linear)
    for (key, role), linears in misfits.items():
        width = max(linear.in_features for linear in linears)
        where = Place("config.json", pointer=spec.at(key or "num_attention_heads"), note=_factors(width, group))
        name = (
            key
            if key and spec.lookup(key) == width
            else _("in_features of {role}", role=shown_role(role, linears[0].name))
        )
        fix = None if layout.quantized or not key else _padding(checkpoint, spec, tensors, key, linears, group * tp)
        others = [g for g in OTHER_GROUPS if g < group and not width % (g * tp)]
        recipe_change = (
            _("or change the recipe: --tp 1, or --group-size {group} --tp {tp}", group=others[0], tp=tp)
            if others
            else _("or change the recipe: --tp 1")
        )
        yield finding(
            _(
                "{key} {width} = {groups} × {group}: {groups} groups cannot be split across {tp} GPUs",
                key=name,
                width=width,
                groups=width // group,
                group=group,
                tp=tp,
            ),
            at=where,
            fix=fix,
            facts_table=_table(width, group, tp),
            advice=recipe_change,
            evidence={"in_features": width, "group_size": group, "tp": tp, "linears": len(linears)},
        )


def _factors(width, group):
    groups = width // group
    prime = groups > 1 and all(groups % d for d in range(2, int(groups**0.5) + 1))
    values = {"width": width, "groups": groups, "group": group}
    if prime:
        return _("{width} = {groups} × {group}, and {groups} is prime", **values)
    return _("{width} = {groups} × {group}", **values)


def _table(width, group, tp):
    tps = sorted({*TPS, tp})
    return (
        (_("tensor parallel"), *tps),
        (_("groups per GPU"), *(f"{width / group / n:.4g}" for n in tps)),
        (_("next size that fits"), *(fits(width, group * n) for n in tps)),
    )


def _padding(checkpoint, spec, tensors, key, linears, unit):
    """Fix that grows config[key] until every one of these linears fits, or None where no exact padding is known."""
    expressions = {axis_expression(spec, linear.name, 1) for linear in linears}
    if None in expressions:
        return None
    known = [e for e in expressions if e]
    found = grown(
        checkpoint,
        spec,
        tensors,
        key,
        lambda v: all(not (resized(spec, e, key, v) or 1) % unit for e in known),
        unit,
    )
    return found and Fix(*found, "unsafe", needs=("W201", "G301"))


def bad():
    case = tiny(mlp=96)
    case.recipe = case.recipe.with_field("tp", 2)
    return case, "intermediate_size 96 = 3 × 32: 3 groups cannot be split across 2 GPUs"


def good():
    case = tiny()
    case.recipe = case.recipe.with_field("tp", 2)
    return case
