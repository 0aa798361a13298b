"""Q430 mixture-no-better: a mixture of bit widths is no closer to the original than one width for all linears.

Why: a mixture spends the bits of a budget (--bpw, --size) where a prediction says that they help most. The prediction
is an estimate from some thousand tokens, and choosing prefers linears whose error it takes for too small. So both
models are compared with the original on rows that neither was calibrated on. Where the mixture does not win, the model
of one width is written: it is as good, and more engines read it.

Do: use what was written. For a mixture that wins, calibrate on more text, of the kind that the model will see, or name
a budget between two widths: at the size of a width itself there is least to gain.

False alarms: where both are close, a few thousand tokens of other text may order them the other way.

Fix safety: no fix: the better of the two was written.

Sources: measured: SmolLM2-135M, relative error of outputs as the measure, 4.0 bits: 0.347 nats a token for the mixture,
0.174 for 4 bits everywhere.
"""

from doctor.lint.rule import _, finding, rule
from doctor.lint.testing import Allocation, measured


@rule("Q430", "warning")
def mixture_no_better(checkpoint, allocation):
    if allocation.written == "mixture":
        return
    yield finding(
        _(
            "{name} for all linears ({same:.3f} bits a weight) was written: KL {uniform:.4f} on held-back rows, "
            "{mixed:.4f} of the mixture ({bpw:.3f} bits a weight)",
            name=allocation.uniform,
            same=allocation.uniform_bpw,
            uniform=allocation.kl_uniform,
            mixed=allocation.kl,
            bpw=allocation.bpw,
        ),
        evidence={"kl": allocation.kl, "kl_uniform": allocation.kl_uniform, "tokens": allocation.tokens},
        advice=_("calibrate on more text of the kind that the model will see, or use what was written"),
    )


def _allocation(written):
    kl = 0.0310 if written == "mixture" else 0.0462
    return Allocation(4.25, 4.249, 4.25, "4-bit g64", {3: 20, 4: 160, 8: 30}, 0.0287, kl, 0.0451, 4096, written)


def bad():
    case = measured()
    case.put("checkpoint:", "allocation", _allocation("uniform"))
    return case, (
        "4-bit g64 for all linears (4.250 bits a weight) was written: KL 0.0451 on held-back rows, 0.0462 of the mixture "
        "(4.249 bits a weight)"
    )


def good():
    case = measured()
    case.put("checkpoint:", "allocation", _allocation("mixture"))
    return case
