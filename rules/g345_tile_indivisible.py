"""G345 tile-indivisible: out_features does not fill whole tiles of the scales.

Why: FP8 in blocks has one scale a tile of 128 × 128. Kernels read whole tiles: vLLM refuses a matrix whose sides are no
multiples of 128, also where tensor parallelism cuts it into such pieces, and where it joins q, k and v.

Seen as:
- vLLM: `is not divisible by weight quantization block_n`

Do: choose FP8_DYNAMIC, whose scales are one a row, or keep these linears in 16 bits (`--ignore PATTERN`).

False alarms: none; the division is exact arithmetic.

Fix safety: unsafe: it changes the recipe that you asked for, never the checkpoint.

Sources: vllm-project/vllm vllm/model_executor/layers/quantization/utils/fp8_utils.py (validate_fp8_block_shape).
"""

from dataclasses import replace

from doctor.lint.rule import Fix, Place, _, finding, keep_edits, plural, rule, shown_role
from doctor.lint.testing import tiny


@rule("G345", "error")
def tile_indivisible(checkpoint, layout, recipe):
    height_of_tile = 1 if layout.quantized else (layout.packing.grid(recipe.scheme).tile or (1,))[0]
    misfits: dict[tuple, list] = {}
    for linear in layout.linears:
        if linear.out_features % height_of_tile:
            misfits.setdefault((shown_role(linear.role, linear.name), linear.out_features), []).append(linear)
    for (role, height), linears in misfits.items():
        yield finding(
            plural(
                "{role} ({n:,} linear): out_features {height} is no multiple of {unit}, the height of a tile of scales",
                "{role} ({n:,} linears): out_features {height} is no multiple of {unit}, the height of a tile of scales",
                len(linears),
                role=role,
                height=height,
                unit=height_of_tile,
            ),
            at=Place("", tensor=f"{linears[0].name}.weight"),
            evidence={"out_features": height, "tile": height_of_tile, "linears": len(linears)},
            fix=Fix(
                _("keep {roles} in 16 bits", roles=role),
                keep_edits(layout.linears, [x.name for x in linears]),
                "unsafe",
            ),
            advice=_("or choose a scheme with a scale a row, as FP8_DYNAMIC"),
        )


def planned(group_size):
    """All linears but down stay in 16 bits."""
    case = tiny(mlp=128)
    others = tuple(x.name for x in case.spec.linears if x.role != "down")
    case.recipe = replace(
        case.recipe,
        method="rtn",
        bits=8,
        group_size=group_size,
        sym=True,
        format="float-quantized",
        activations="fp8-block" if group_size == 128 else "fp8",
        keep=others,
    )
    return case


def bad():
    return planned(128), "down (2 linears): out_features 64 is no multiple of 128, the height of a tile of scales"


def good():
    return planned(-1)
