"""G312 hessian-size: Hessian of a linear exceeds 32-bit indices and usual GPU memory.

Why: GPTQ needs H, float32[k, k] for in_features k. From k = 46,341 on it has more than 2^31 entries, which overflowed
32-bit indices in older programs, and it takes 8 GiB before any working copy.

Do: provide that much memory for the step (doctor factorises on the CPU where the GPU is too small), or use `--method
awq`, which needs no full Hessian.

False alarms: none; the sizes are exact. The checkpoint itself has no defect.

Fix safety: no fix is needed in the files.

Sources: turboderp/exllamav2 commit c49df4f (0.0.21).
"""

from doctor.lint.rule import Place, _, finding, rule, size_key
from doctor.lint.testing import only_in, tiny

INDEX_LIMIT = 2**31  # entries that a signed 32-bit index reaches


@rule("G312", "info")
def hessian_size(checkpoint, layout, spec, recipe):
    if not recipe.solver.factors or layout.quantized:
        return
    widest = max(layout.linears, key=lambda x: x.in_features, default=None)
    if widest is None or widest.in_features**2 < INDEX_LIMIT:
        return
    k = widest.in_features
    key = size_key(spec, widest.name, 1)
    yield finding(
        _(
            "{role} has in_features {k:,}: its Hessian takes {size:.1f} GiB in float32 and exceeds 32-bit indices",
            role=widest.role,
            k=k,
            size=4 * k * k / 2**30,
        ),
        at=Place("config.json", pointer=spec.at(key) if key else None),
        evidence={"in_features": k},
        advice=_("plan for the memory, or use --method awq"),
    )


def bad():
    # The next multiple of 32 above the square root of 2^31.
    case = tiny(
        only_in("llama", "phi3", "opt", why="of its kind three others are tried: the example is large"), mlp=46368
    )
    return case, "down has in_features 46,368: its Hessian takes 8.0 GiB in float32 and exceeds 32-bit indices"


def good():
    return tiny()
