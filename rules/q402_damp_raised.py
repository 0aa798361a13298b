"""Q402 damp-raised: Hessian needed more damping than the recipe.

Why: H could not be factored with the requested damping. More damping makes it positive definite and moves the result
towards RTN, so quality drops a little. It is reported because doctor changes nothing silently.

Seen as:
- AutoGPTQ: `(the leading minor of order 14960 is not positive-definite)`
- llm-compressor: `Failed to invert hessian due to numerical instability. Consider increasing GPTQModifier.dampening_frac`
- ExLlamaV2: `Applied additional damping`
- PyTorch: `The factorization could not be completed because the input is not positive-definite (the leading minor of order 14960 is not positive-definite)`
- NumPy: `14960-th leading minor of the array is not positive definite`
- GPTQModel: `Applying Hessian diagonal floor`
- GPTQModel: ``Hessian Cholesky failed with `damp_percent=``

Do: nothing, if the loss stays below that of RTN (Q405 reports it otherwise). More and longer calibration rows help wide
linears.

False alarms: none; it reports what was done.

Fix safety: no fix is needed.

Sources: Frantar et al. 2022 (arXiv 2210.17323) §3; AutoGPTQ/AutoGPTQ issues 637, 644 and 780;
vllm-project/llm-compressor issue 109.
"""

from doctor.lint.rule import _, finding, plural, rule
from doctor.lint.testing import change, measured


@rule("Q402", "warning")
def damp_raised(linear, solve):
    if solve.outcome == "failed":
        return
    values = {"linear": linear.name, "used": solve.damp_used}
    if solve.damp_used > solve.damp_first:
        yield finding(
            plural(
                "damp raised from {asked:g} to {used:g} for {linear} after {n} attempt",
                "damp raised from {asked:g} to {used:g} for {linear} after {n} attempts",
                len(solve.attempts),
                asked=solve.damp_first,
                **values,
            ),
            evidence={"attempts": [list(a) for a in solve.attempts]},
            advice=_("use more or longer calibration rows"),
        )
    elif solve.precision == "eigen":
        yield finding(
            plural(
                "negative eigenvalues of the Hessian of {linear} raised to {used:g} of its mean after {n} attempt",
                "negative eigenvalues of the Hessian of {linear} raised to {used:g} of its mean after {n} attempts",
                len(solve.attempts),
                **values,
            ),
            evidence={"attempts": [list(a) for a in solve.attempts]},
            advice=_("use more or longer calibration rows"),
        )


def bad():
    case = measured()
    name = case.name("down").removesuffix(".weight")
    tried = ((0.01, "float32", "order 90"), (0.05, "float32", "ok"))
    change(case, f"linear:{name}", "solve", damp_used=0.05, attempts=tried)
    return case, f"damp raised from 0.01 to 0.05 for {name} after 2 attempts"


def good():
    return measured()
