"""W208 constant-weight: all values of a weight matrix are equal.

Why: no training produces a matrix of equal values. It was created and never loaded (a head that a tool resized, a
tensor that it did not know), so the model multiplies by a constant, and every group quantizes to one code.

Do: take the tensor from the base model, or find out which tool wrote it.

False alarms: a matrix made constant on purpose, for instance a mask stored under a weight's name.

Fix safety: unsafe, and only with `--from`: the tensor is taken from the donor. Nothing shows that it was not trained.

Sources: PyTorch leaves memory of torch.empty as it was; transformers initialises what it does not find and
says so only in a log line (modeling_utils, "newly initialized").
"""

from doctor.lint.rule import _, finding, rule, tensor_from_base
from doctor.lint.testing import encode, np, tiny

SMALLEST = 4096  # values; smaller tensors (a shared expert's gate, a toy model) may be equal by chance or design


@rule("W208", "warning", certainty="likely")
def constant_weight(tensor, stats, base):
    whole = len(tensor.shape) >= 2 and tensor.name.endswith(".weight") and stats.numel >= SMALLEST
    if not whole or not tensor.dtype.is_float or stats.n_nan or stats.n_inf or stats.min != stats.max or not stats.max:
        return
    yield finding(
        _("all {numel:,} values of {tensor} are {value:g}", numel=stats.numel, tensor=tensor.name, value=stats.max),
        evidence={"value": stats.max, "numel": stats.numel},
        fix=tensor_from_base(base, tensor),
        advice=_("take the tensor from the base model"),
    )


def bad():
    case = tiny()
    case.tensors[case.name("down")] = np.full_like(case.down(), encode([1.0], "BF16")[0])
    return case, f"all 8,192 values of {case.name('down')} are 1"


def good():
    return tiny()
