"""W210 one-signed-groups: groups of weights have no negative value, or no positive one, and the plan is a symmetric
grid.

Why: a symmetric grid spends half of its codes on the sign that never comes: 4 bits do the work of 3. Programs that take
the range from 0 to the largest weight, but put the zero point in the middle, cut off all above 7/15 of it.

Do: quantize asymmetrically (`--asym`), whose grid begins where the group does.

False alarms: only a few places of each matrix are looked at. None known in trained models: of random signs, one group
of 32 in two billion has a single one. Heavily pruned matrices have such groups, and lose the bit too.

Fix safety: unsafe: it changes the plan you asked for, never the checkpoint.

Sources: ModelCloud/GPTQModel gptqmodel/quantization/quantizer.py:112; AutoGPTQ auto_gptq/quantization/quantizer.py.
"""

from doctor.lint.rule import Fix, Place, SetRecipe, finding, rule
from doctor.lint.testing import tiny

SHARE = 0.1  # of the groups looked at. SmolLM2 has none among millions; a matrix built without a sign has all


@rule("W210", "warning", certainty="likely", implied_by=("W202", "W203", "W204", "W208"))
def one_signed_groups(linear, one_signed, layout, recipe):
    looked_at, alike = one_signed
    if layout.quantized or not recipe.sym or not alike > SHARE * looked_at:
        return
    # Whether a runtime reads an asymmetric grid in this format is for G305 to say.
    yield finding(
        f"{alike:,} of {looked_at:,} groups of weights looked at in {linear.tensor} have a single sign: a symmetric grid wastes half its codes",
        at=Place("", tensor=linear.tensor),
        evidence={"groups": looked_at, "one_signed": alike},
        fix=Fix("quantize asymmetrically", (SetRecipe("sym", False),), "unsafe"),
    )


def bad():
    case = tiny()
    case.down()[:] &= 0x7FFF  # every bf16 without its sign
    name = case.name("down")
    return (
        case,
        f"256 of 256 groups of weights looked at in {name} have a single sign: a symmetric grid wastes half its codes",
    )


def good():
    case = tiny()
    case.down()[:] &= 0x7FFF
    case.recipe = case.recipe.with_field("sym", False)
    return case
