"""W202 all-zero-weight: weight matrix is all zeros.

Why: a file whose tail was never written (an interrupted copy on a file system that fills gaps) reads as zeros, and
zeros pass every check for NaN. The matrix contributes nothing, and a quantizer that divides by the largest weight of a
group computes 0/0.

Seen as:
- AutoAWQ: `assert torch.isnan(w).sum() == 0`

Do: compare the checksum of the shard with its source and copy it again. Where the decoder layer was added on purpose
with zero output (block expansion), set `ignore = ["W202"]` after training it.

False alarms: a freshly expanded model whose new decoder layers start at zero. Biases, norms stored as an offset from 1
and correction terms of a router can be 0 and are not checked.

Fix safety: unsafe, and only with `--from`: the tensor is taken from the donor. Nothing shows that it was not trained.

Sources: safetensors reads any bytes inside the offsets as values (safetensors/src/tensor.rs);
casper-hansen/AutoAWQ PR 522.
"""

from doctor.lint.rule import _, finding, rule, scale_tails, tensor_from_base
from doctor.lint.testing import tiny

OTHERS = ("bias", *scale_tails())  # of experts, beside their weights; O607 and O659 judge scales


@rule("W202", "warning", certainty="likely")
def all_zero_weight(tensor, n_zero, numel, base):
    matrix = (
        len(tensor.shape) >= 2
        and min(tensor.shape) > 1
        and (tensor.name.endswith(".weight") or (".experts." in tensor.name and not tensor.name.endswith(OTHERS)))
    )
    if not (matrix and tensor.dtype.is_float and numel and n_zero == numel):
        return
    yield finding(
        _("all {numel:,} values of {tensor} are 0", numel=numel, tensor=tensor.name),
        evidence={"numel": numel, "bytes": [tensor.begin, tensor.end]},
        fix=tensor_from_base(base, tensor),
        advice=_("compare the checksum of {file} with its source and copy the shard again", file=tensor.shard),
    )


def bad():
    case = tiny()
    case.down()[:] = 0
    return case, f"all 8,192 values of {case.name('down')} are 0"


def good():
    return tiny()
