"""Q421 embeddings-apart: embeddings or scores differ from the original's.

Why: an embedding model is used by the angles between its vectors, a reward model by the order of its scores. Neither has
next-token logits, so perplexity and divergence say nothing of them. Where the quantized model's vectors point elsewhere,
an index that was built with the original no longer fits its queries.

Do: use more bits or smaller groups, or calibrate on the documents and queries that it will embed. Embed an index anew with
the model that serves its queries.

False alarms: a few rows of text far from the model's use; the evidence has the counts.

Fix safety: no fix: bits and groups are the user's choice.

Sources: doctor/evaluate/own_measure.py.
"""

from doctor.lint.rule import _, finding, rule
from doctor.lint.testing import change, measured_by_its_own

COSINE = 0.95  # mean over the tokens: below it neighbours change places; 4 bits in groups of 32 stay above
CORRELATION = 0.95  # of scores over the rows


@rule("Q421", "warning", certainty="likely")
def embeddings_apart(checkpoint, own_measure):
    m = own_measure
    if m.nonfinite_quantized > m.nonfinite_original:
        yield finding(
            _(
                "the last hidden states of {bad:,} of {tokens:,} tokens are not finite; the original has {before:,}",
                bad=m.nonfinite_quantized,
                tokens=m.tokens,
                before=m.nonfinite_original,
            ),
            severity="error",
            evidence={"nonfinite": m.nonfinite_quantized, "original": m.nonfinite_original},
        )
        return
    if m.kind == "score" and not m.score_correlation >= CORRELATION:
        yield finding(
            _(
                "scores of {rows:,} rows have correlation {correlation:.3f} with the original's (from {least:.2f} passes)",
                rows=m.rows,
                correlation=m.score_correlation,
                least=CORRELATION,
            ),
            evidence={"correlation": m.score_correlation, "apart": m.score_apart},
            advice=_("use more bits or smaller groups, or calibrate on text closer to the text in use"),
        )
    if not m.cosine >= COSINE:
        yield finding(
            _(
                "the last hidden states of {tokens:,} tokens have cosine {cosine:.3f} with the original's on average "
                "(from {least:.2f} passes)",
                tokens=m.tokens,
                cosine=m.cosine,
                least=COSINE,
            ),
            evidence={"cosine": m.cosine, "cosine_least": m.cosine_least, "cosine_pooled": m.cosine_pooled},
            advice=_("use more bits or smaller groups, or calibrate on text closer to the text in use"),
        )


def bad():
    case = measured_by_its_own()
    change(case, "checkpoint:", "own_measure", cosine=0.9)
    return case, (
        "the last hidden states of 12,288 tokens have cosine 0.900 with the original's on average (from 0.95 passes)"
    )


def good():
    return measured_by_its_own()
