"""G303 kernel-shape: matrix does not fill the tiles of the runtime's kernel.

Why: fast kernels work on fixed tiles (Marlin: 128 in_features by 64 out_features on each GPU). A matrix that does not
fill them runs on a slower kernel, and where there is none the runtime refuses the checkpoint.

Seen as:
- vLLM: `Weight input_size_per_partition = 7392 is not divisible by min_thread_k = 128. Consider reducing tensor_parallel_size`
- vLLM: `is not divisible by  min_thread_n = 64`
- TGI: `The GPTQ Marlin kernel does not have a valid thread configuration for weight matrix with shape`
- AutoAWQ: `OC is not multiple of cta_N`

Do: use fewer GPUs, a newer runtime (vLLM pads the tiles itself since June 2026), or pad as G302 does.

False alarms: a runtime built with kernels that the table does not know. `--runtime vllm==VERSION` selects the rows that
apply.

Fix safety: unsafe, and for the MLP only: zero-padded to the tiles, its outputs are the same in exact arithmetic.
Attention matrices follow hidden_size, which cannot grow.

Sources: rules/tables/kernels.toml and what it names; vllm-project/vllm issues 9913 and 13640, pull request
45295.
"""

import math
from dataclasses import replace

from doctor.lint.rule import (
    Fix,
    GroupedLinear,
    Place,
    _,
    axis_expression,
    finding,
    grown,
    on_one_gpu,
    resized,
    rule,
    size_key,
)
from doctor.lint.testing import tiny


@rule("G303", "error", implied_by=("G301", "G302", "G304"))
def kernel_shape(checkpoint, layout, kernels, spec, recipe, tensors):
    if not kernels:  # reported by G305
        return
    shapes: dict[tuple, GroupedLinear] = {}
    for roles, width, height, linear in on_one_gpu(layout, recipe.tp, spec.n_kv_heads):
        shapes.setdefault((roles, width, height), linear)
    for (roles, width, height), linear in shapes.items():
        taking = next((kernel for kernel in kernels if kernel.takes(width, height)), None)
        if taking is kernels[0]:
            continue
        tile = ", ".join(f"{i} × {o}" for i, o in kernels[0].tiles)
        key = size_key(spec, linear.name, 1)
        values = {
            "roles": roles,
            "width": width,
            "height": height,
            "kernel": kernels[0].name,
            "tiles": tile,
            "runtime": recipe.runtime,
        }
        yield finding(
            _(
                "{roles}: {width} in_features × {height} out_features on each GPU do not fill {kernel}'s tiles of {tiles}: "
                "{runtime} uses its {slower} kernel, which is slower",
                slower=taking.name,
                **values,
            )
            if taking
            else _(
                "{roles}: {width} in_features × {height} out_features on each GPU do not fill {kernel}'s tiles of {tiles}: "
                "{runtime} has no other kernel",
                **values,
            ),
            at=Place("config.json", pointer=spec.at(key) if key else None),
            severity="warning" if taking else "error",
            evidence={
                "in_features": width,
                "out_features": height,
                "tp": recipe.tp,
                "kernel": kernels[0].name,
            },
            fix=None if layout.quantized else _padding(checkpoint, layout, kernels[0], spec, recipe, tensors, linear),
            advice=_("use fewer GPUs or a newer runtime"),
        )


def _padding(checkpoint, layout, kernel, spec, recipe, tensors, linear):
    """Fix that widens the MLP of this linear until all its matrices fill the kernel's tiles on each GPU, None where it
    is not the width.
    """
    parent = linear.name.rpartition(".")[0]
    mlp = [
        x for x in layout.linears if x.name.rpartition(".")[0] == parent and x.role in ("gate", "up", "gate_up", "down")
    ]
    key = next((size_key(spec, x.name, 1) for x in mlp if x.role == "down"), None)
    if key is None or linear not in mlp:
        return None
    shapes = {x.name: (axis_expression(spec, x.name, 1), axis_expression(spec, x.name, 0)) for x in mlp}
    if any(None in pair for pair in shapes.values()):
        return None

    def suits(width):
        sizes = {n: tuple(resized(spec, e or "", key, width) or 0 for e in pair) for n, pair in shapes.items()}
        wide = replace(
            layout, linears=tuple(x._replace(in_features=sizes[x.name][0], out_features=sizes[x.name][1]) for x in mlp)
        )
        found = on_one_gpu(wide, recipe.tp, spec.n_kv_heads)
        whole = all(k % (max(layout.group_size, 1)) == 0 for _, k, _, _ in found)
        return (
            whole
            and len(found) == len(on_one_gpu(replace(layout, linears=tuple(mlp)), 1, None))
            and all(kernel.takes(k, n) for _, k, n, _ in found)
        )

    period = math.lcm(max(layout.group_size, 1), *(size for tile in kernel.tiles for size in tile)) * recipe.tp
    found = grown(checkpoint, spec, tensors, key, suits, period)
    return found and Fix(*found, "unsafe", needs=("W201", "G301", "G302"))


def bad():
    case = tiny()
    case.recipe = case.recipe.with_field("runtime", "sglang")
    case.recipe = case.recipe.with_field("group_size", 64)
    return case, (
        "gate+up: 64 in_features × 256 out_features on each GPU do not fill Marlin's tiles of 128 × 64: sglang uses its "
        "ExLlama kernel, which is slower"
    )


def good():
    case = tiny()
    case.recipe = case.recipe.with_field("runtime", "vllm")
    return case


def more():
    """Cases whose fixes the example above does not show."""
    case = tiny(mlp=96)
    case.recipe = case.recipe.with_field("runtime", "vllm").with_field("runtime_version", "0.12.0").with_field("tp", 2)
    case.recipe = case.recipe.with_field("keep", ("self_attn", "gate", "up", "fc1"))
    yield case
