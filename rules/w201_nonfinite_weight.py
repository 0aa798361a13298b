"""W201 nonfinite-weight: weight tensor contains NaN or Inf.

Why: every quantizer derives a scale from the largest and smallest weight of a group, so one NaN destroys its whole
group. In a forward pass it spreads to every later decoder layer, which is then calibrated on NaN.

Seen as:
- AutoAWQ: `assert torch.isnan(w).sum() == 0`
- ExLlamaV2: `ValueError: Hessian is not invertible`
- llama.cpp: `ggml_validate_row_data: found nan value at block`
- PyTorch: `linalg.cholesky: The factorization could not be completed because the input is not positive-definite (the leading minor of order 1 is not positive-definite)`
- AutoGPTQ: `the leading minor of order 1 is not positive-definite`

Do: copy the shard again from its source, or take the tensor from the base model (`--from DIR`). Zero is a guess: it is
offered only by name (`--unsafe-fixes=W201`).

False alarms: none known. A NaN that no token reaches (an unused embedding row) still breaks tools that check whole
tensors.

Fix safety: zero is unsafe, and only by name, because the true values are not in the files. With `--from` the donor's
tensor is taken: safe where all remaining finite values equal the donor's bit by bit (then the tensor was never
trained), else unsafe.

Sources: casper-hansen/AutoAWQ awq/quantize/quantizer.py:80; turboderp/exllamav2
exllamav2/conversion/adaptivegptq.py:332; ggml-org/llama.cpp PR 6884.
"""

from doctor.lint.rule import Fix, ReplaceNonfinite, _, element, finding, rule
from doctor.lint.testing import tiny


@rule("W201", "error")
def nonfinite_weight(tensor, n_nan, n_inf, numel, first_nonfinite, base):
    if not (n_nan or n_inf):
        return
    values = {"n_nan": n_nan, "n_inf": n_inf, "numel": numel, "tensor": tensor.name}
    if n_nan and n_inf:
        message = _("{n_nan:,} NaN and {n_inf:,} Inf among {numel:,} values of {tensor}", **values)
    elif n_nan:
        message = _("{n_nan:,} NaN among {numel:,} values of {tensor}", **values)
    else:
        message = _("{n_inf:,} Inf among {numel:,} values of {tensor}", **values)
    yield finding(
        message,
        at=element(tensor, first_nonfinite),
        evidence={"n_nan": n_nan, "n_inf": n_inf, "numel": numel},
        fix=(base and _from_base(base, tensor))
        or Fix(_("replace the non-finite values by 0"), (ReplaceNonfinite(tensor.name),), "unsafe", by_name=True),
        advice=_("copy the shard again from its source; doctor invents no values unless the fix is selected by name"),
    )


def _from_base(base, tensor):
    edit = base.offer(tensor.name, tensor.dtype.name, tensor.shape)
    if edit is None:
        return None
    same, found = base.agrees(tensor)
    return Fix(
        _("take the tensor from {base}: {found}", base=base.text, found=found), (edit,), "safe" if same else "unsafe"
    )


def bad():
    case = tiny()
    case.down()[3, 5] = 0x7FC0  # a bf16 NaN
    return case, f"1 NaN among 8,192 values of {case.name('down')}"


def good():
    return tiny()
