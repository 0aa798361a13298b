"""G310 packing-indivisible: matrix cannot be packed into whole 32-bit words.

Why: eight 4-bit codes share one word. GPTQ packs weights along in_features and zero points along out_features; AWQ
packs both along out_features. A size that does not fill whole words cannot be stored, and packers fail at the end of
the run.

Seen as:
- AutoGPTQ: `in_feature and out_feature must be divisible by 32`
- vLLM: `The output size is not aligned with the quantized weight shape`

Do: keep these linears in 16 bits (`--ignore PATTERN`), or choose compressed-tensors, which pads the last word.

False alarms: none; the division is exact arithmetic.

Fix safety: unsafe: it changes the recipe that you asked for, never the checkpoint.

Sources: ModelCloud/GPTQModel nn_modules/qlinear/__init__.py (pack_block); casper-hansen/AutoAWQ
awq/modules/linear/gemm.py.
"""

from doctor.lint.rule import Fix, Place, _, finding, keep_edits, plural, rule, shown_role
from doctor.lint.testing import tiny


@rule("G310", "error")
def packing_indivisible(checkpoint, layout):
    unit_in, unit_out = layout.packing.unit
    misfits: dict[tuple, list] = {}
    for linear in layout.linears:
        if not layout.quantized and (linear.in_features % unit_in or linear.out_features % unit_out):
            misfits.setdefault(
                (shown_role(linear.role, linear.name), linear.in_features, linear.out_features), []
            ).append(linear)
    for (role, width, height), linears in misfits.items():
        side, size, unit = ("in_features", width, unit_in) if width % unit_in else ("out_features", height, unit_out)
        yield finding(
            plural(
                "{role} ({n:,} linear) cannot be packed as {format}: {side} {size} is not a multiple of {unit}",
                "{role} ({n:,} linears) cannot be packed as {format}: {side} {size} is not a multiple of {unit}",
                len(linears),
                role=role,
                format=layout.format,
                side=side,
                size=size,
                unit=unit,
            ),
            at=Place("", tensor=f"{linears[0].name}.weight"),
            evidence={"in_features": width, "out_features": height, "linears": len(linears)},
            fix=Fix(
                _("keep {roles} in 16 bits", roles=role),
                keep_edits(layout.linears, [x.name for x in linears]),
                "unsafe",
            ),
            advice=_("--ignore '{name}' leaves them in 16 bits", name=linears[0].name.rsplit(".", 1)[-1]),
        )


def bad():
    case = tiny(mlp=144)
    case.recipe = case.recipe.with_field("group_size", -1)
    return case, "down (2 linears) cannot be packed as gptq: in_features 144 is not a multiple of 32"


def good():
    return tiny()
