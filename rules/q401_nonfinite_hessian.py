"""Q401 nonfinite-hessian: the inputs of a linear hold NaN or Inf during calibration.

Why: H is made of these inputs, so it is not finite, and no damping makes NaN finite. Programs retry the
factorisation all the same and end in a message about the Hessian. The cause lies before this linear: a
weight that is not finite, or activations beyond the range of float16.

Seen as:
- ExLlamaV3: `cannot be repaired by damping`
- ExLlamaV2: `ValueError: Hessian is not invertible`
- ExLlamaV2: `Applied additional damping`
- PyTorch: `linalg.cholesky: The factorization could not be completed because the input is not positive-definite (the leading minor of order 1 is not positive-definite)`
- GPTQModel: `Quantization: Failed due to `NaN` loss for`
- GPTQModel: `Hessian contains non-finite values`
- AutoGPTQ: `the leading minor of order 1 is not positive-definite`

Do: look for W201 and W205 in this and earlier blocks. If the weights are sound, run the calibration in
bfloat16 or float32.

False alarms: none; the values were counted.

Fix safety: unsafe where the inputs are finite and only their products overflow: the linear stays in 16 bits, with those
that engines fuse with it. Inputs that are NaN or Inf have no fix here: the cause is elsewhere.

Sources: turboderp/exllamav2 exllamav2/conversion/adaptivegptq.py:276-333, issues 453 and 459;
turboderp-org/exllamav3 issue 58; AutoGPTQ/AutoGPTQ issue 708. LAPACK's spotrf returns success for a matrix
with NaN, so success of a factorisation proves nothing.
"""

from doctor.lint.rule import Fix, Keep, finding, is_kept, rule, together
from doctor.lint.testing import change, measured


@rule("Q401", "error", implied_by=("W201",))
def nonfinite_hessian(linear, hessian, spec, recipe):
    if (hessian.finite and not hessian.n_nonfinite) or is_kept(recipe, linear.name):
        return
    if hessian.n_nonfinite:
        first = hessian.first_nonfinite
        place = f", the first at token {first[0]}, channel {first[1]}" if first else ""
        what = f"{hessian.n_nonfinite:,} NaN or Inf among the inputs of {linear.name}{place}"
    else:
        what = f"the inputs of {linear.name} are finite, but their products overflow"
    yield finding(
        what,
        fix=None
        if hessian.n_nonfinite
        else Fix("keep it in 16 bits", tuple(Keep(n) for n in together(spec.linears, [linear.name])), "unsafe"),
        evidence={"n_nonfinite": hessian.n_nonfinite, "tokens": hessian.tokens},
        advice="look for W201 and W205 in this and earlier blocks; damping cannot help",
    )


def bad():
    case = measured()
    name = case.name("down").removesuffix(".weight")
    change(case, f"linear:{name}", "hessian", n_nonfinite=12, first_nonfinite=(17, 3), finite=False)
    return case, f"12 NaN or Inf among the inputs of {name}, the first at token 17, channel 3"


def good():
    return measured()


def more():
    """Cases whose cures the example above does not show."""
    case = measured()
    change(case, f"linear:{case.name('down').removesuffix('.weight')}", "hessian", finite=False)
    yield case
