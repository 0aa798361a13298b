"""Q401 nonfinite-hessian: linear inputs contain NaN or Inf during calibration.

Why: H is computed from these inputs, so it is not finite, and no damping makes NaN finite. Programs retry the
factorisation all the same and end with a message about the Hessian. The cause is before this linear: a weight that is
not finite, or activations beyond the range of float16.

Seen as:
- ExLlamaV3: `cannot be repaired by damping`
- ExLlamaV2: `ValueError: Hessian is not invertible`
- ExLlamaV2: `Applied additional damping`
- PyTorch: `linalg.cholesky: The factorization could not be completed because the input is not positive-definite (the leading minor of order 1 is not positive-definite)`
- GPTQModel: `Quantization: Failed due to `NaN` loss for`
- GPTQModel: `Hessian contains non-finite values`
- AutoGPTQ: `the leading minor of order 1 is not positive-definite`

Do: look for W201 and W205 in this and earlier decoder layers. If the weights are correct, run the calibration in
bfloat16 or float32.

False alarms: none; the values were counted.

Fix safety: unsafe where the inputs are finite and only their products overflow: the linear stays in 16 bits, with those
that engines fuse with it. Inputs that are NaN or Inf have no fix here: the cause is elsewhere.

Sources: turboderp/exllamav2 exllamav2/conversion/adaptivegptq.py:276-333, issues 453 and 459; turboderp-org/exllamav3
issue 58; AutoGPTQ/AutoGPTQ issue 708. LAPACK's spotrf returns success for a matrix with NaN, so a successful
factorisation proves nothing.
"""

from doctor.lint.rule import Fix, Keep, _, finding, is_kept, rule, together
from doctor.lint.testing import change, measured


@rule("Q401", "error", implied_by=("W201",))
def nonfinite_hessian(linear, hessian, spec, recipe):
    if (hessian.finite and not hessian.n_nonfinite) or is_kept(recipe, linear.name):
        return
    if hessian.n_nonfinite:
        first, values = hessian.first_nonfinite, {"n": hessian.n_nonfinite, "linear": linear.name}
        message = (
            _(
                "{n:,} NaN or Inf among the inputs of {linear}, the first at token {token}, channel {channel}",
                token=first[0],
                channel=first[1],
                **values,
            )
            if first
            else _("{n:,} NaN or Inf among the inputs of {linear}", **values)
        )
    else:
        message = _("the inputs of {linear} are finite, but their products overflow", linear=linear.name)
    yield finding(
        message,
        fix=None
        if hessian.n_nonfinite
        else Fix(_("keep it in 16 bits"), tuple(Keep(n) for n in together(spec.linears, [linear.name])), "unsafe"),
        evidence={"n_nonfinite": hessian.n_nonfinite, "tokens": hessian.tokens},
        advice=_("look for W201 and W205 in this and earlier layers; damping cannot help"),
    )


def bad():
    case = measured()
    name = case.name("down").removesuffix(".weight")
    change(case, f"linear:{name}", "hessian", n_nonfinite=12, first_nonfinite=(17, 3), finite=False)
    return case, f"12 NaN or Inf among the inputs of {name}, the first at token 17, channel 3"


def good():
    return measured()


def more():
    """Cases whose fixes the example above does not show."""
    case = measured()
    change(case, f"linear:{case.name('down').removesuffix('.weight')}", "hessian", finite=False)
    yield case
