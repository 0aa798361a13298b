"""W210 one-signed-groups: groups of weights have one sign; a symmetric grid wastes a bit.

Why: a symmetric grid uses half of its codes for the sign that does not occur: 4 bits have the precision of 3. Programs
that compute the range from 0 to the largest weight, but place the zero point in the middle, clip everything above 7/15
of it.

Do: quantize asymmetrically (`--asym`), whose grid starts at the smallest weight of the group.

False alarms: only a few places of each matrix are checked. None known in trained models: of random signs, one group of
32 in two billion has a single one. Heavily pruned matrices have such groups, and lose the bit too.

Fix safety: unsafe: it changes the recipe that you asked for, never the checkpoint.

Sources: ModelCloud/GPTQModel gptqmodel/quantization/quantizer.py:112; AutoGPTQ auto_gptq/quantization/quantizer.py.
"""

from doctor.lint.rule import Fix, Place, SetRecipe, _, finding, plural, rule
from doctor.lint.testing import tiny

SHARE = 0.1  # of the groups checked. SmolLM2 has none among millions; a matrix of absolute values has all


@rule("W210", "warning", certainty="likely", implied_by=("W202", "W203", "W204", "W208"))
def one_signed_groups(linear, one_signed, layout, recipe):
    looked_at, alike = one_signed
    if layout.quantized or not recipe.sym or not alike > SHARE * looked_at:
        return
    # G305 reports whether a runtime reads an asymmetric grid in this format.
    yield finding(
        plural(
            "{n:,} of {checked:,} groups of weights checked in {tensor} has a single sign: a symmetric grid wastes half its codes",
            "{n:,} of {checked:,} groups of weights checked in {tensor} have a single sign: a symmetric grid wastes half its codes",
            alike,
            checked=looked_at,
            tensor=linear.tensor,
        ),
        at=Place("", tensor=linear.tensor),
        evidence={"groups": looked_at, "one_signed": alike},
        fix=Fix(_("quantize asymmetrically"), (SetRecipe("sym", False),), "unsafe"),
    )


def bad():
    case = tiny()
    case.down()[:] &= 0x7FFF  # every bf16 without its sign
    name = case.name("down")
    return (
        case,
        f"256 of 256 groups of weights checked in {name} have a single sign: a symmetric grid wastes half its codes",
    )


def good():
    case = tiny()
    case.down()[:] &= 0x7FFF
    case.recipe = case.recipe.with_field("sym", False)
    return case
