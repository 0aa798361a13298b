"""G308 expert-shape: expert sizes do not fit the runtime's mixture-of-experts kernel.

Why: the fused kernel runs all experts at once. It needs hidden_size in steps of 128, and the width of an expert on each
GPU in steps of 64 or of the group size. Otherwise the runtime uses a slower path, or refuses.

Seen as:
- vLLM: `Falling back to Moe WNA16 kernels`
- vLLM: `input_size_per_partition = 10944 is not divisible by min_thread_k = 128`

Do: use fewer GPUs or expert parallelism, which keeps experts whole.

False alarms: runtimes with kernels that the table does not know.

Fix safety: unsafe, and for the width of the experts only: zero-padded, their outputs are the same in exact arithmetic.
hidden_size cannot grow.

Sources: rules/tables/kernels.toml; vllm-project/vllm
vllm/model_executor/layers/quantization/utils/marlin_utils.py (check_moe_marlin_supports_layer), pull
request 45703.
"""

from doctor.lint.rule import Fix, Place, _, axis_expression, finding, grown, in_force, resized, rule, size_key, table
from doctor.lint.testing import only_in, tiny


@rule("G308", "warning", certainty="likely", implied_by=("G301", "G302"))
def expert_shape(checkpoint, layout, spec, recipe, tensors):
    experts = {(x.in_features, x.out_features): x for x in layout.linears if x.expert is not None and x.role == "down"}
    rows = [
        r for r in table("kernels")["moe"] if r["runtime"] == recipe.runtime and in_force(r, recipe.runtime_version)
    ]
    for row in rows:
        inner = max(row["inner"], layout.group_size)
        for (width, hidden), linear in experts.items():
            bad_hidden, bad_width = hidden % row["hidden"], width % (inner * recipe.tp)
            if not (bad_hidden or bad_width):
                continue
            values = {"kernel": row["name"], "runtime": recipe.runtime}
            if bad_hidden:
                message = _(
                    "{kernel} of {runtime}: hidden_size {hidden} is not a multiple of {unit}",
                    hidden=hidden,
                    unit=row["hidden"],
                    **values,
                )
            else:
                message = _(
                    "{kernel} of {runtime}: expert width {width} / {tp} GPUs is not a multiple of {unit}",
                    width=width,
                    tp=recipe.tp,
                    unit=inner,
                    **values,
                )
            key = size_key(spec, linear.name, 0 if bad_hidden else 1)
            yield finding(
                message,
                at=Place("config.json", pointer=spec.at(key) if key else None),
                evidence={"hidden": hidden, "width": width, "tp": recipe.tp},
                fix=None
                if bad_hidden or layout.quantized or not key
                else _padding(checkpoint, spec, tensors, key, axis_expression(spec, linear.name, 1), inner * recipe.tp),
                advice=_("use fewer GPUs or expert parallelism"),
            )


def _padding(checkpoint, spec, tensors, key, expression, unit):
    found = expression and grown(
        checkpoint, spec, tensors, key, lambda v: not (resized(spec, expression, key, v) or 1) % unit, unit
    )
    return Fix(*found, "unsafe", needs=("W201", "G301", "G302")) if found else None


def bad():
    case = tiny(only_in("qwen2_moe", "mixtral", "qwen3_moe", "olmoe", why="it has no experts"))
    case.recipe = case.recipe.with_field("runtime", "vllm")
    return case, "Marlin MoE of vllm: hidden_size 64 is not a multiple of 128"


def good():
    return tiny(only_in("qwen2_moe", "mixtral", "qwen3_moe", "olmoe", why="it has no experts"))


def more():
    """Cases whose fixes the example above does not show."""
    case = tiny("mixtral", mlp=96, hidden=128)
    case.recipe = case.recipe.with_field("runtime", "vllm").with_field("runtime_version", "0.20.0")
    yield case
