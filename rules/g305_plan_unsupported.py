"""G305 plan-unsupported: the runtime has no kernel for this format, width, group size or symmetry.

Why: a quantized file is only as good as the kernel that reads it. Runtimes take some combinations of
format, bits, group size and symmetry and refuse the rest when they load the model, after the hours of
quantizing.

Seen as:
- vLLM: `Unsupported quantization config: bits=`
- vLLM: `Currently, only 2/3/4/8-bit weight quantization is supported for GPTQ`
- ExLlamaV2: `Tensor split not implemented for GPTQ matrices`

Do: choose a combination from the table.

False alarms: a runtime newer than the table, or one with kernels added by a plugin.

Fix safety: unsafe: it changes the plan you asked for to the nearest one of the table, never the checkpoint: symmetry
before groups, groups before the form of the file, bits last.

Sources: rules/tables/kernels.toml and what it names.
"""

from doctor.lint.rule import Fix, SetRecipe, finding, nearest_plan, rule, table
from doctor.lint.testing import tiny


@rule("G305", "error")
def plan_unsupported(checkpoint, layout, kernels, recipe, spec):
    kind = "" if layout.sym else ", asymmetric"
    plan = f"{layout.format} {layout.bits}-bit group {layout.group_size}{kind}"
    version = f" {recipe.runtime_version}" if recipe.runtime_version else ""
    if not kernels:
        rows = [("kernel", "formats", "bits", "groups")]
        for row in table("kernels")[recipe.runtime]:
            rows.append((row["name"], ", ".join(row["formats"]), row["bits"], row["groups"] or "any"))
        yield finding(
            f"{recipe.runtime}{version} has no kernel for {plan}",
            facts_table=rows,
            fix=_nearest(layout, recipe, spec),
            advice="choose a plan from the table",
            evidence={
                "runtime": recipe.runtime,
                "format": layout.format,
                "bits": layout.bits,
                "group_size": layout.group_size,
            },
        )
    elif recipe.runtime == "exllamav2" and recipe.tp > 1:
        yield finding(
            f"exllamav2 does not split {layout.format} matrices among GPUs, and the plan says tp {recipe.tp}",
            fix=None
            if layout.quantized
            else Fix("plan for one GPU, or for a split by layers", (SetRecipe("tp", 1),), "unsafe"),
            advice="split by layers instead (gpu_split), or serve EXL2",
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
    """Cases whose cures the example above does not show."""
    case = tiny()
    case.recipe = case.recipe.with_field("runtime", "exllamav2").with_field("tp", 2)
    yield case
