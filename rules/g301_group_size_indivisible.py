"""G301 group-size-indivisible: group_size does not divide a linear's in_features.

Why: a scale belongs to group_size consecutive in_features. With a remainder the last group of every row
would be short, and no kernel reads short groups: quantizers stop, or leave these linears in 16 bits.

Seen as:
- AutoAWQ: `must be a multiple of group_size`
- AutoAWQ: `assert self.in_features % self.group_size == 0`
- vLLM: `The input size is not aligned with the quantized weight shape`
- llm-compressor: `The following layers have weight column counts not divisible by group_size`

Do: take a smaller group size that divides every width, or keep the linears concerned in 16 bits.

False alarms: none; the division is exact arithmetic.

Fix safety: unsafe: it changes the plan you asked for (more scales, a slightly larger file; where no common group size
fits, the linears concerned stay in 16 bits), never the checkpoint.

Sources: casper-hansen/AutoAWQ awq/quantize/quantizer.py:77; vllm-project/llm-compressor
src/llmcompressor/modifiers/quantization/group_size_validation.py; intel/auto-round issue 388.
"""

from doctor.lint.rule import Fix, Place, SetRecipe, finding, keep_edits, rule, size_key
from doctor.lint.testing import tiny

ROLES = " q k v qkv o gate up gate_up down "  # the order in which a block uses them
GROUP_SIZES = (128, 64, 32)  # the sizes that every common kernel has; 16 only a few


@rule("G301", "error")
def group_size_indivisible(checkpoint, layout, spec, recipe):
    group = layout.group_size
    if group == -1:
        return
    widths = {}
    for linear in layout.linears:
        if linear.in_features % group:
            widths.setdefault(linear.in_features, []).append(linear)
    sizes = {linear.in_features for linear in layout.linears}
    fitting = [g for g in GROUP_SIZES if g < group and not any(size % g for size in sizes)]
    for width, linears in sorted(widths.items()):
        roles = sorted({linear.role for linear in linears}, key=lambda role: (ROLES.find(f" {role} "), role))
        keys = [key for linear in linears if (key := size_key(spec, linear.name, 1))]
        at = Place(
            "config.json",
            pointer=spec.at(keys[0]) if keys else None,
            note=f"{width} = {width / group:g} × {group}",
        )
        table = (
            ("group size", group, *(g for g in GROUP_SIZES if g < group)),
            ("groups per row", f"{width / group:g}", *(f"{width / g:g}" for g in GROUP_SIZES if g < group)),
        )
        fix = None
        if fitting and not layout.quantized:
            fix = Fix(f"quantize in groups of {fitting[0]}", (SetRecipe("group_size", fitting[0]),), "unsafe")
        elif not layout.quantized:
            names = keep_edits(layout.linears, [x.name for x in linears])
            fix = Fix(f"keep {_and(roles)} of width {width} in 16 bits", names, "unsafe")
        yield finding(
            f"in_features {width} of {_and(roles)} ({len(linears)} linears) = {width / group:g} × {group}: "
            f"group size {group} does not divide it",
            at=at,
            fix=fix,
            facts_table=table,
            evidence={"in_features": width, "group_size": group, "linears": len(linears)},
            advice=f"--group-size {fitting[0]} divides every width" if fitting else "keep these linears in 16 bits",
        )


def _and(words):
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


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
    """Cases whose cures the example above does not show."""
    case = tiny(mlp=112)
    case.recipe = case.recipe.with_field("group_size", 32)
    yield case
