"""Q411 damp-too-small: damp is likely too small to factor the Hessian in float32.

Why: float32 rounding shifts eigenvalues by about 6e-7 of the largest. Where a few tokens dominate (attention sinks),
the smallest eigenvalues become negative unless damping is larger than that, and the factorisation fails late: order
14,960 of 24,576 in one report.

Seen as:
- AutoGPTQ: `(the leading minor of order 14314 is not positive-definite)`
- AutoGPTQ: `(the leading minor of order 13770 is not positive-definite)`
- PyTorch: `The factorization could not be completed because the input is not positive-definite (the leading minor of order 14314 is not positive-definite)`

Do: raise damp (0.05 is GPTQModel's default), or let doctor factor in float64, which it tries before it raises damping.

False alarms: it is a prediction: float64 may succeed with the requested damping.

Fix safety: unsafe: it changes the recipe that you asked for, never the checkpoint. The decoder layer is quantized
again, and later layers use the same damp.

Sources: AutoGPTQ/AutoGPTQ issues 637, 644 and 780; Higham, Accuracy and Stability of Numerical Algorithms,
theorem 10.7; doctor/quant/solve/hessian.py.
"""

from doctor.lint.rule import Fix, SetRecipe, _, finding, rule
from doctor.lint.testing import change, measured

STEPS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # the steps in which the run raises damp


@rule("Q411", "warning", certainty="likely", implied_by=("Q401",))
def damp_too_small(linear, hessian, recipe):
    added = recipe.damp_for(hessian.tokens)
    if not hessian.tokens or not hessian.finite or hessian.damp_needed <= added:  # without tokens: Q406 says it
        return
    step = next((s for s in STEPS if hessian.damp_needed <= s <= recipe.damp_max and s > added), None)
    fix = Fix(_("raise damp to {damp:g}", damp=step), (SetRecipe("damp", step),), "unsafe") if step else None
    yield finding(
        _(
            "{linear} needs damp {needed:.2g} in float32; {damp:.2g} is added first",
            linear=linear.name,
            needed=hessian.damp_needed,
            damp=added,
        ),
        fix=fix,
        evidence={
            "damp_needed": hessian.damp_needed,
            "max_eigenvalue": hessian.max_eigenvalue,
            "mean_diag": hessian.mean_diag,
        },
        advice=_("raise damp") if step else _("use more calibration text, or raise damp_max"),
    )


def bad():
    case = measured()
    name = case.name("down").removesuffix(".weight")
    change(case, f"linear:{name}", "hessian", damp_needed=0.081)
    return case, f"{name} needs damp 0.081 in float32; 0.049 is added first"


def good():
    return measured()
