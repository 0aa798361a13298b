"""G301 group-size-indivisible: group_size does not divide in_features.

Why: one scale belongs to group_size consecutive in_features. With a remainder the last group of each row would be
short, and no kernel reads short groups: quantizers stop, or leave these linears in 16 bits.

Seen as:
- AutoAWQ: `must be a multiple of group_size`
- AutoAWQ: `assert self.in_features % self.group_size == 0`
- vLLM: `The input size is not aligned with the quantized weight shape`
- llm-compressor: `The following layers have weight column counts not divisible by group_size`

Do: choose a smaller group size that divides every width, or keep the linears concerned in 16 bits.

False alarms: none; the division is exact arithmetic.

Fix safety: unsafe: it changes the recipe that you asked for, never the checkpoint. A smaller group size means more
scales and a slightly larger file; where no common group size fits, the linears concerned stay in 16 bits.

Sources: casper-hansen/AutoAWQ awq/quantize/quantizer.py:77; vllm-project/llm-compressor
src/llmcompressor/modifiers/quantization/group_size_validation.py; intel/auto-round issue 388.
"""

from doctor.lint.rule import Fix, Place, SetRecipe, _, finding, keep_edits, listed, plural, rule, shown_role, size_key
from doctor.lint.testing import tiny

ROLES = " q k v qkv o gate up gate_up down "  # the order in which a decoder layer uses them
GROUP_SIZES = (128, 64, 32)  # the sizes that every common kernel has; 16 only a few


@rule("G301", "error")
def group_size_indivisible(checkpoint, layout, spec, recipe):
    group = layout.group_size
    if group == -1:
        return
    widths: dict[int, list] = {}
    for linear in layout.linears:
        if linear.in_features % group:
            widths.setdefault(linear.in_features, []).append(linear)
    sizes = {linear.in_features for linear in layout.linears}
    fitting = [g for g in GROUP_SIZES if g < group and not any(size % g for size in sizes)]
    for width, linears in sorted(widths.items()):
        roles = sorted({shown_role(x.role, x.name) for x in linears}, key=lambda role: (ROLES.find(f" {role} "), role))
        keys = [key for linear in linears if (key := size_key(spec, linear.name, 1))]
        at = Place(
            "config.json",
            pointer=spec.at(keys[0]) if keys else None,
            note=_("{width} = {groups:g} × {group}", width=width, groups=width / group, group=group),
        )
        table = (
            (_("group size"), group, *(g for g in GROUP_SIZES if g < group)),
            (_("groups per row"), f"{width / group:g}", *(f"{width / g:g}" for g in GROUP_SIZES if g < group)),
        )
        fix = None
        if fitting and not layout.quantized:
            fix = Fix(_("quantize in groups of {n}", n=fitting[0]), (SetRecipe("group_size", fitting[0]),), "unsafe")
        elif not layout.quantized:
            names = keep_edits(layout.linears, [x.name for x in linears])
            fix = Fix(_("keep {roles} of width {width} in 16 bits", roles=listed(roles), width=width), names, "unsafe")
        yield finding(
            plural(
                "in_features {width} of {roles} ({n:,} linear) = {groups:g} × {group}: group size {group} does not divide it",
                "in_features {width} of {roles} ({n:,} linears) = {groups:g} × {group}: group size {group} does not divide it",
                len(linears),
                width=width,
                roles=listed(roles),
                groups=width / group,
                group=group,
            ),
            at=at,
            fix=fix,
            facts_table=table,
            evidence={"in_features": width, "group_size": group, "linears": len(linears)},
            advice=_("--group-size {n} divides every width", n=fitting[0])
            if fitting
            else _("keep these linears in 16 bits"),
        )


def bad():
    case = tiny()
    case.recipe = case.recipe.with_field("group_size", 128)
    return (
        case,
        "in_features 64 of q, k, v, o, gate and up (12 linears) = 0.5 × 128: group size 128 does not divide it",
    )


def good():
    case = tiny()
    case.recipe = case.recipe.with_field("group_size", 64)
    return case


def more():
    """Cases whose fixes the example above does not show."""
    case = tiny(mlp=112)
    case.recipe = case.recipe.with_field("group_size", 32)
    yield case
