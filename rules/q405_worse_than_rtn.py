"""Q405 worse-than-rtn: GPTQ or AWQ loss is higher than round-to-nearest.

Why: the purpose of GPTQ is to lose less than RTN on the calibration text. Where it loses more, its Hessian misled it,
its groups fit badly, or the arithmetic failed.

Do: quantize again with act-order and smaller groups or with more calibration text, or keep this linear in 16 bits.

False alarms: none on the calibration text; on other text the order may differ.

Fix safety: unsafe: the linear stays in 16 bits, with those that engines fuse with it, and the decoder layer is
quantized again.

Sources: qwopqwop200/GPTQ-for-LLaMa README (7B: perplexity 6.79 with GPTQ and 6.28 with RTN, without
act-order).
"""

from doctor.lint.rule import Fix, Keep, _, finding, is_calibrated, is_kept, rule, together
from doctor.lint.testing import change, measured

MARGIN = 1.01  # ratio of the two losses; both are sums in float32, so within a percent they are the same


@rule("Q405", "warning")
def worse_than_rtn(linear, solve, spec, recipe):
    # Written so that a loss that is NaN counts as worse.
    if not is_calibrated(solve.outcome) or solve.loss <= MARGIN * solve.rtn_loss or is_kept(recipe, linear.name):
        return
    yield finding(
        _(
            "{linear}: {method} lost {loss:.3g} of the output's energy, rounding {rtn_loss:.3g}",
            linear=linear.name,
            method=solve.outcome,
            loss=solve.loss,
            rtn_loss=solve.rtn_loss,
        ),
        evidence={"loss": solve.loss, "rtn_loss": solve.rtn_loss},
        fix=Fix(_("keep it in 16 bits"), tuple(Keep(n) for n in together(spec.linears, [linear.name])), "unsafe"),
        advice=_("use act-order, smaller groups or more calibration text"),
    )


def bad():
    case = measured()
    name = case.name("down").removesuffix(".weight")
    change(case, f"linear:{name}", "solve", loss=0.02)
    return case, f"{name}: gptq lost 0.02 of the output's energy, rounding 0.01"


def good():
    return measured()
