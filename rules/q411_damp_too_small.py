"""Q411 damp-too-small: the spectrum of a Hessian foretells that float32 needs more damping than the recipe
has.

Why: float32 rounding shifts eigenvalues by about 6e-7 of the largest. Where a few tokens dominate
(attention sinks), the smallest turn negative unless damping is larger than that, and the factorisation
fails late: order 14,960 of 24,576 in one report.

Seen as:
- AutoGPTQ: `(the leading minor of order 14314 is not positive-definite)`
- AutoGPTQ: `(the leading minor of order 13770 is not positive-definite)`
- PyTorch: `The factorization could not be completed because the input is not positive-definite (the leading minor of order 14314 is not positive-definite)`

Do: raise damp (0.05 is GPTQModel's default), or let doctor factor in float64, which it tries before it
raises damping.

False alarms: it is a prediction: float64 may pass at the damping asked for.

Fix safety: unsafe: it changes the plan you asked for, never the checkpoint; the block is quantized again, and those
after it with the same damp.

Sources: AutoGPTQ/AutoGPTQ issues 637, 644 and 780; Higham, Accuracy and Stability of Numerical Algorithms,
theorem 10.7; doctor/quant/solve/hessian.py.
"""

from doctor.lint.rule import Fix, SetRecipe, finding, rule
from doctor.lint.testing import change, measured

STEPS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # the run's own rungs


@rule("Q411", "warning", certainty="likely", implied_by=("Q401",))
def damp_too_small(linear, hessian, recipe):
    if not hessian.finite or hessian.damp_needed <= recipe.damp:
        return
    step = next((s for s in STEPS if hessian.damp_needed <= s <= recipe.damp_max and s > recipe.damp), None)
    fix = Fix(f"raise damp to {step:g}", (SetRecipe("damp", step),), "unsafe") if step else None
    yield finding(
        f"{linear.name} needs damp {hessian.damp_needed:.2g} in float32 and the recipe has {recipe.damp:g}",
        fix=fix,
        evidence={
            "damp_needed": hessian.damp_needed,
            "max_eigenvalue": hessian.max_eigenvalue,
            "mean_diag": hessian.mean_diag,
        },
        advice="raise damp" if step else "give more calibration text, or raise damp_max",
    )


def bad():
    case = measured()
    name = case.name("down").removesuffix(".weight")
    change(case, f"linear:{name}", "hessian", damp_needed=0.031)
    return case, f"{name} needs damp 0.031 in float32 and the recipe has 0.01"


def good():
    return measured()
