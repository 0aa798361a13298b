"""G310 packing-indivisible: a matrix cannot be packed into whole 32-bit words.

Why: eight 4-bit codes share one word. GPTQ packs weights along in_features and zero points along
out_features, AWQ both along out_features; what does not fill whole words cannot be stored, and packers fail
at the end of the run.

Seen as:
- AutoGPTQ: `in_feature and out_feature must be divisible by 32`
- vLLM: `The output size is not aligned with the quantized weight shape`

Do: keep these linears in 16 bits (`--ignore PATTERN`), or choose compressed-tensors, which fills up the last
word.

False alarms: none; the division is exact arithmetic.

Fix safety: unsafe: it changes the plan you asked for, never the checkpoint.

Sources: ModelCloud/GPTQModel nn_modules/qlinear/__init__.py (pack_block); casper-hansen/AutoAWQ
awq/modules/linear/gemm.py.
"""

from doctor.lint.rule import Fix, Place, finding, keep_edits, rule
from doctor.lint.testing import tiny


@rule("G310", "error")
def packing_indivisible(checkpoint, layout):
    unit_in, unit_out = layout.packing.unit
    misfits = {}
    for linear in layout.linears:
        if not layout.quantized and (linear.in_features % unit_in or linear.out_features % unit_out):
            misfits.setdefault((linear.role, linear.in_features, linear.out_features), []).append(linear)
    for (role, width, height), linears in misfits.items():
        wrong = (
            f"in_features {width} is no multiple of {unit_in}"
            if width % unit_in
            else f"out_features {height} is no multiple of {unit_out}"
        )
        yield finding(
            f"{role} ({len(linears)} linears) cannot be packed as {layout.format}: {wrong}",
            at=Place("", tensor=f"{linears[0].name}.weight"),
            evidence={"in_features": width, "out_features": height, "linears": len(linears)},
            fix=Fix(f"keep {role} in 16 bits", keep_edits(layout.linears, [x.name for x in linears]), "unsafe"),
            advice=f"--ignore '{linears[0].name.rsplit('.', 1)[-1]}' leaves them in 16 bits",
        )


def bad():
    case = tiny(mlp=144)
    case.recipe = case.recipe.with_field("group_size", -1)
    return case, "down (2 linears) cannot be packed as gptq: in_features 144 is no multiple of 32"


def good():
    return tiny()
