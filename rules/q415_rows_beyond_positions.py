"""Q415 rows-beyond-positions: calibration rows are longer than max_position_embeddings.

Why: a model was never trained beyond its last position: activations there are noise at best, an index error at worst,
and they enter the Hessian.

Seen as:
- transformers: `Token indices sequence length is longer than the specified maximum sequence length for this model`

Do: cut the rows to max_position_embeddings or less (`--max-seq-length`).

False alarms: a model whose rope scaling extends its range beyond that key.

Fix safety: no fix: the rows are yours.

Sources: ModelCloud/GPTQModel gptqmodel/utils/calibration.py:355.
"""

from doctor.lint.rule import Place, _, finding, rule
from doctor.lint.testing import change, measured


@rule("Q415", "warning", certainty="likely")
def rows_beyond_positions(checkpoint, calibration, spec):
    if not spec.max_positions or calibration.longest <= spec.max_positions:
        return
    yield finding(
        _(
            "the longest calibration row has {longest:,} tokens; the model has {positions:,} positions",
            longest=calibration.longest,
            positions=spec.max_positions,
        ),
        at=Place("config.json", pointer=spec.at(spec.key_for("max_position_embeddings"))),
        evidence={"longest": calibration.longest, "positions": spec.max_positions},
        advice=_("cut the rows: --max-seq-length {n}", n=spec.max_positions),
    )


def bad():
    case = measured()
    change(case, "checkpoint:", "calibration", longest=300)
    return case, "the longest calibration row has 300 tokens; the model has 256 positions"


def good():
    return measured()
