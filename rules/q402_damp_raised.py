"""Q402 damp-raised: a linear needed more damping than the recipe asked for.

Why: H could not be factored as it was. More damping makes it definite and pulls the result towards plain
rounding, so quality drops a little; it is named because nothing here happens in silence.

Seen as:
- AutoGPTQ: `(the leading minor of order 14960 is not positive-definite)`
- llm-compressor: `Failed to invert hessian due to numerical instability. Consider increasing GPTQModifier.dampening_frac`
- ExLlamaV2: `Applied additional damping`
- PyTorch: `The factorization could not be completed because the input is not positive-definite (the leading minor of order 14960 is not positive-definite)`
- NumPy: `14960-th leading minor of the array is not positive definite`
- GPTQModel: `Applying Hessian diagonal floor`
- GPTQModel: ``Hessian Cholesky failed with `damp_percent=``

Do: nothing, if the loss stays below that of rounding (Q405 says so otherwise). More and longer calibration
rows help wide linears.

False alarms: none; it reports what was done.

Fix safety: no fix is needed.

Sources: Frantar et al. 2022 (arXiv 2210.17323) §3; AutoGPTQ/AutoGPTQ issues 637, 644 and 780;
vllm-project/llm-compressor issue 109.
"""

from doctor.lint.rule import finding, rule
from doctor.lint.testing import change, measured


@rule("Q402", "warning")
def damp_raised(linear, solve):
    if solve.outcome == "failed":
        return
    tries = "1 attempt" if len(solve.attempts) == 1 else f"{len(solve.attempts)} attempts"
    if solve.damp_used > solve.damp_asked:
        yield finding(
            f"damp raised from {solve.damp_asked:g} to {solve.damp_used:g} for {linear.name} after {tries}",
            evidence={"attempts": [list(a) for a in solve.attempts]},
            advice="more or longer calibration rows",
        )
    elif solve.precision == "eigen":
        yield finding(
            f"negative eigenvalues of the Hessian of {linear.name} were raised to {solve.damp_used:g} of its mean after {tries}",
            evidence={"attempts": [list(a) for a in solve.attempts]},
            advice="more or longer calibration rows",
        )


def bad():
    case = measured()
    name = case.name("down").removesuffix(".weight")
    tried = ((0.01, "float32", "order 90"), (0.05, "float32", "ok"))
    change(case, f"linear:{name}", "solve", damp_used=0.05, attempts=tried)
    return case, f"damp raised from 0.01 to 0.05 for {name} after 2 attempts"


def good():
    return measured()
