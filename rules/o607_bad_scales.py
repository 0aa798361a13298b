"""O607 bad-scales: quantization scales are 0, far too large or never set.

Why: every weight is a code times the scale of its group. A scale of 0 erases the group; one in the hundreds makes the
decoder layer overflow. A quantizer that continues after its Hessian has failed writes both. Scales that are 1
everywhere are what they were before calibration; scales that are all negative turn every weight's sign. One scale for a
whole tensor must be above 0; one that divides, as compressed-tensors' weight_global_scale, is in the hundreds, and
below 1 where it was stored as the factor.

Seen as:
- vLLM: `!!!!!!!!!!!!!!!!`
- AutoGPTQ: `avg loss: nan`

Do: quantize this linear again (Q401 and Q405 of that run say why it failed).

False alarms: scale 0 for a group whose weights are all 0, as some packers write for padding. bitsandbytes writes SCB 0
for a row of zeros, and such a row whose codes are 0 too is not reported. Scales that are 8-bit
floats themselves, as NVFP4's, reach 448 by design and are judged for 0 and for their sign only. Scales of both signs,
as AutoRound's symmetric grid has them, are not reported.

Fix safety: unsafe, and only with `--from`: the scales are taken from another copy of the quantized checkpoint, such as
its repository. Without one the weights behind a wrong scale are lost.

Sources: AutoGPTQ/AutoGPTQ issues 306, 582 and 587; casper-hansen/AutoAWQ PR 516 (sets such scales to 1);
bitsandbytes-foundation/bitsandbytes bitsandbytes/backends/default/ops.py (int8_vectorwise_quant).
"""

import re

from doctor.lint.rule import _, finding, rule, scale_tails, tensor_from_base
from doctor.lint.testing import encode, tiny_gptq

# A scale is at most twice the largest weight of its group divided by the number of steps; weights above a few hundred
# do not occur in trained linears, so a scale of 100 (weights of 800 at 4 bits) is an accident.
HUGE = 100.0
TINY = 1e-12  # weights under such scales vanish beside any others
# One scale for a whole tensor: of weights, of inputs. The first divides.
WHOLE = (".weight_global_scale", ".weight_scale_2", ".input_global_scale", ".input_scale")
VECTORS = (".q_scale_max", ".suh", ".svh")  # EXL2's and EXL3's, of which single ones may be 0
ROWS = ".SCB"  # of bitsandbytes' 8 bits: the largest weight of each row
EMBEDDING = re.compile(r"(?:embed_tokens|wte|embeddings?|lm_head)\.\w+$")
FACTOR = ".weight_scale_2"  # of ModelOpt: its product with 448 and 6 is the largest weight of a tensor
RELATIVE = "F8_E4M3"  # a scale of this type is multiplied by another one, which brings its largest to 448


@rule("O607", "warning", certainty="likely", implied_by=("W201", "O659"))
def bad_scales(tensor, n_zero, numel, absmax, stats, base, every_zero_code_rows):
    if tensor.name.endswith(WHOLE):
        yield from _whole(tensor, stats, base)
    lost = n_zero
    if tensor.name.endswith(ROWS):  # codes of a row of zeros are 0 too
        lost -= every_zero_code_rows.get(f"{tensor.name.removesuffix(ROWS)}.weight", 0)
    if (tensor.name.endswith(VECTORS) and n_zero == numel) or (tensor.name.endswith(ROWS) and lost > 0):
        yield finding(
            _("{n_zero:,} of {numel:,} scales in {tensor} are 0", n_zero=lost, numel=numel, tensor=tensor.name),
            evidence={"n_zero": lost, "numel": numel},
            fix=tensor_from_base(base, tensor),
            advice=_("quantize this linear again"),
        )
    if not tensor.name.endswith(scale_tails()):
        return
    if 0 < absmax < TINY or (numel > 1 and stats.min == stats.max == 1 and _of_integers(tensor)):
        yield finding(
            _(
                "all {numel:,} scales in {tensor} are {value:g}",
                numel=numel,
                tensor=tensor.name,
                value=absmax,
            )
            if stats.min == stats.max
            else _(
                "the largest of {numel:,} scales in {tensor} is {value:g}: its weights are 0",
                numel=numel,
                tensor=tensor.name,
                value=absmax,
            ),
            evidence={"absmax": absmax, "numel": numel},
            fix=tensor_from_base(base, tensor),
            advice=_("quantize this linear again"),
        )
    if stats.n_finite and not n_zero and (stats.max < 0 or (stats.min < 0 and tensor.dtype.name == RELATIVE)):
        yield finding(
            _(
                "all {numel:,} scales in {tensor} are negative, the least {value:g}; must be above 0",
                numel=numel,
                tensor=tensor.name,
                value=stats.min,
            )
            if numel > 1 and stats.max < 0
            else _("{tensor} has a scale of {value:g}; must be above 0", tensor=tensor.name, value=stats.min),
            evidence={"min": stats.min, "max": stats.max, "numel": numel},
            fix=tensor_from_base(base, tensor),
            advice=_("quantize this linear again"),
        )
    if n_zero and not EMBEDDING.search(tensor.name):  # the row of a padding token is 0
        yield finding(
            _("{n_zero:,} of {numel:,} scales in {tensor} are 0", n_zero=n_zero, numel=numel, tensor=tensor.name),
            evidence={"n_zero": n_zero, "numel": numel},
            fix=tensor_from_base(base, tensor),
            advice=_("quantize this linear again"),
        )
    if not absmax <= HUGE and tensor.dtype.name != RELATIVE:
        yield finding(
            _("{tensor} has a scale of {absmax:,.0f}", tensor=tensor.name, absmax=absmax),
            evidence={"absmax": absmax},
            fix=tensor_from_base(base, tensor),
            advice=_("quantize this linear again"),
        )


def _whole(tensor, stats, base):
    """Scales of whole tensors: above 0, and a divisor of weights no less than 1 (a largest weight of 2,688)."""
    least = 1.0 if tensor.name.endswith(WHOLE[0]) else 0.0
    if stats.n_finite and not (stats.min > 0 and stats.min >= least):
        yield finding(
            _("{tensor} is {value:g}; must be above {least:g}", tensor=tensor.name, value=stats.min, least=least),
            evidence={"min": stats.min},
            fix=tensor_from_base(base, tensor),
            advice=_("quantize this linear again"),
        )

    if stats.n_finite and tensor.name.endswith(FACTOR) and not stats.max < 1:
        yield finding(
            _("{tensor} is {value:g}; must be below {most:g}", tensor=tensor.name, value=stats.max, most=1.0),
            evidence={"max": stats.max},
            fix=tensor_from_base(base, tensor),
            advice=_("store the factor and not the divisor: its reciprocal"),
        )


def _of_integers(tensor):
    """Whether these are scales of groups of integers: a scale of 1 would mean weights of several units."""
    return tensor.dtype.bits >= 16 and len(tensor.shape) == 2 and min(tensor.shape) > 1


def bad():
    case = tiny_gptq()
    name = case.packed("down") + ".scales"
    case.tensors[name][0, 3] = encode([0.0], "F16")[0]
    return case, f"1 of 256 scales in {name} are 0"


def good():
    return tiny_gptq()
