"""Q400 linear-failed: linear could not be quantized, reason unknown.

Why: the run ended at this linear, or its weights are not in the output. The attempts that were made are listed.

Seen as:
- GPTQModel: `Quantization: Failed due to `NaN` loss for`
- ExLlamaV2: `ValueError: Hessian is not invertible`

Do: look at the findings on the same linear first. If there are none, report the line with its attempts: it is an
unknown case.

False alarms: none; the linear has no quantized weights.

Fix safety: unsafe: the linear stays in 16 bits, with those that engines fuse with it, and the decoder layer is
quantized again.

Sources: the record of the linear in the run.
"""

from doctor.lint.rule import Fix, Keep, _, finding, is_kept, listed, rule, together
from doctor.lint.testing import change, measured


@rule("Q400", "error", implied_by=("Q401", "W201"))
def linear_failed(linear, solve, spec, recipe):
    if solve.outcome != "failed" or is_kept(recipe, linear.name):
        return
    tried = listed(
        _("damp {damp:g} in {precision}: {outcome}", damp=damp, precision=precision, outcome=what)
        for damp, precision, what in solve.attempts
    )
    yield finding(
        _(
            "{linear} was not quantized: {reason} ({attempts})",
            linear=linear.name,
            reason=solve.note or _("no reason recorded"),
            attempts=tried or _("no attempts"),
        ),
        evidence={"attempts": [list(a) for a in solve.attempts]},
        fix=Fix(_("keep it in 16 bits"), tuple(Keep(n) for n in together(spec.linears, [linear.name])), "unsafe"),
        advice=_("--ignore {name} leaves it in 16 bits", name=linear.name),
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
