"""G305 plan-unsupported: runtime has no kernel for this format, bits, group size or symmetry.

Why: a quantized file is only useful with a kernel that reads it. Runtimes support some combinations of format, bits,
group size and symmetry and refuse the rest when they load the model, after hours of quantizing.

Seen as:
- vLLM: `Unsupported quantization config: bits=`
- vLLM: `Currently, only 2/3/4/8-bit weight quantization is supported for GPTQ`
- ExLlamaV2: `Tensor split not implemented for GPTQ matrices`

Do: choose a combination from the table.

False alarms: a runtime newer than the table, or one with kernels from a plugin.

Fix safety: unsafe: it changes the recipe that you asked for to the nearest one in the table, never the checkpoint. It
tries symmetry first, then groups, then the file format, and bits last.

Sources: rules/tables/kernels.toml and what it names.
"""

from doctor.lint.rule import Fix, SetRecipe, _, finding, nearest_plan, rule, table
from doctor.lint.testing import tiny


@rule("G305", "error")
def plan_unsupported(checkpoint, layout, kernels, recipe, spec):
    runtime = f"{recipe.runtime} {recipe.runtime_version}".strip()
    values = {"runtime": runtime, "format": layout.format, "bits": layout.bits, "group": layout.group_size}
    if not kernels:
        rows: list[tuple] = [(_("kernel"), _("formats"), _("bits"), _("groups"))]
        for row in table("kernels")[recipe.runtime]:
            rows.append((row["name"], ", ".join(row["formats"]), row["bits"], row["groups"] or _("any")))
        yield finding(
            _("{runtime} has no kernel for {format} {bits}-bit group {group}", **values)
            if layout.sym
            else _("{runtime} has no kernel for {format} {bits}-bit group {group}, asymmetric", **values),
            facts_table=rows,
            fix=_nearest(layout, recipe, spec),
            advice=_("choose a combination from the table"),
            evidence={
                "runtime": recipe.runtime,
                "format": layout.format,
                "bits": layout.bits,
                "group_size": layout.group_size,
            },
        )
    elif recipe.runtime == "exllamav2" and recipe.tp > 1:
        yield finding(
            _(
                "exllamav2 does not split {format} matrices across GPUs; the recipe has --tp {tp}",
                format=layout.format,
                tp=recipe.tp,
            ),
            fix=None
            if layout.quantized
            else Fix(_("plan for one GPU, or for a split by layers"), (SetRecipe("tp", 1),), "unsafe"),
            advice=_("split by layers instead (gpu_split), or serve EXL2"),
            evidence={"tp": recipe.tp},
        )


def _nearest(layout, recipe, spec):
    found = None if layout.quantized else nearest_plan(recipe, layout, spec.n_kv_heads)
    return found and Fix(found[0], tuple(SetRecipe(k, v) for k, v in found[1].items()), "unsafe")


def bad():
    case = tiny()
    case.recipe = case.recipe.with_field("runtime", "exllamav2").with_field("bits", 8)
    return case, "exllamav2 has no kernel for gptq 8-bit group 32"


def good():
    case = tiny()
    case.recipe = case.recipe.with_field("runtime", "exllamav2")
    return case


def more():
    """Cases whose fixes the example above does not show."""
    case = tiny()
    case.recipe = case.recipe.with_field("runtime", "exllamav2").with_field("tp", 2)
    yield case
