"""Q400 linear-failed: a linear could not be quantized and no better reason is known.

Why: the run ended at this linear, or its weights are not in the output. The attempts that were made are
listed.

Seen as:
- GPTQModel: `Quantization: Failed due to `NaN` loss for`
- ExLlamaV2: `ValueError: Hessian is not invertible`

Do: look at the findings on the same linear first. If there are none, report the line with its attempts: it
is a case we do not know.

False alarms: none; the linear has no quantized weights.

Fix safety: unsafe: the linear stays in 16 bits, with those that engines fuse with it, and the block is quantized again.

Sources: the run's own record of the linear.
"""

from doctor.lint.rule import Fix, Keep, finding, is_kept, rule, together
from doctor.lint.testing import change, measured


@rule("Q400", "error", implied_by=("Q401", "W201"))
def linear_failed(linear, solve, spec, recipe):
    if solve.outcome != "failed" or is_kept(recipe, linear.name):
        return
    tried = (
        "; ".join(f"damp {damp:g} in {precision}: {what}" for damp, precision, what in solve.attempts)
        or "nothing was tried"
    )
    yield finding(
        f"{linear.name} was not quantized: {solve.note or 'no reason recorded'} ({tried})",
        evidence={"attempts": [list(a) for a in solve.attempts]},
        fix=Fix("keep it in 16 bits", tuple(Keep(n) for n in together(spec.linears, [linear.name])), "unsafe"),
        advice=f"--ignore {linear.name} leaves it in 16 bits",
    )


def bad():
    case = measured()
    name = case.name("down").removesuffix(".weight")
    change(
        case,
        f"linear:{name}",
        "solve",
        outcome="failed",
        note="no factor",
        attempts=((0.01, "float64", "order 7"),),
    )
    return case, f"{name} was not quantized: no factor (damp 0.01 in float64: order 7)"


def good():
    return measured()
