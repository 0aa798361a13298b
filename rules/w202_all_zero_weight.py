"""W202 all-zero-weight: a weight matrix holds nothing but zeros.

Why: a file whose tail was never written (an interrupted copy on a file system that fills gaps) reads as
zeros, and zeros pass every check for NaN. The matrix contributes nothing, and a quantizer that divides by a
group's largest weight gets 0/0.

Seen as:
- AutoAWQ: `assert torch.isnan(w).sum() == 0`

Do: compare the shard's checksum with the source's and copy it again. Where the block was added on purpose
with zero output (block expansion), say `ignore = ["W202"]` after training it.

False alarms: a freshly expanded model whose new blocks start at zero. Biases, norms stored as offset from 1
and correction terms of a router may well be 0 and are not looked at.

Fix safety: unsafe, and only with `--from`: the tensor is taken from a base model. Nothing here says that it was not
trained.

Sources: safetensors reads any bytes inside the offsets as values (safetensors/src/tensor.rs);
casper-hansen/AutoAWQ PR 522.
"""

from doctor.lint.rule import finding, rule, tensor_from_base
from doctor.lint.testing import tiny


@rule("W202", "warning", certainty="likely")
def all_zero_weight(tensor, n_zero, numel, base):
    matrix = (
        len(tensor.shape) >= 2
        and min(tensor.shape) > 1
        and (tensor.name.endswith(".weight") or ".experts." in tensor.name)
    )
    if not (matrix and tensor.dtype.is_float and numel and n_zero == numel):
        return
    yield finding(
        f"all {numel:,} values of {tensor.name} are 0",
        evidence={"numel": numel, "bytes": [tensor.begin, tensor.end]},
        fix=tensor_from_base(base, tensor),
        advice=f"compare the checksum of {tensor.shard} with its source and copy the shard again",
    )


def bad():
    case = tiny()
    case.down()[:] = 0
    return case, f"all 8,192 values of {case.name('down')} are 0"


def good():
    return tiny()
