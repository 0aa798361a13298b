"""W204 dead-channels: zero rows or columns (dead channels), not explained by padding.

Why: a zero column in a linear that reads the residual stream, or a zero row in one that writes it, is a channel that
the decoder layer ignores. Padding makes zero rows in gate and up and zero columns in down, never these; so the cause is
pruning or a damaged copy.

Do: nothing, if the model was pruned. Otherwise compare the shard with its source.

False alarms: structured pruning. A few such channels occur in trained models, so less than DEAD_SHARE of them is not
reported.

Fix safety: unsafe, with `--from`: where the donor's tensor differs in zeros only, it is taken, which would undo
pruning. Without a donor nothing is changed: it is not certain that anything is broken.

Sources: casper-hansen/AutoAWQ PR 522 (zero channels and scales); arXiv 2309.04827 (neurons that never
fire).
"""

from doctor.lint.rule import ROW_PARALLEL, _, finding, plural, rule, zeros_from_base
from doctor.lint.testing import tiny

# Share of channels. Trained models have a few, below this share; a zeroed tail or pruning affects whole percents.
DEAD_SHARE = 0.01


@rule("W204", "info", certainty="hint", implied_by=("W202", "W203"))
def dead_channels(linear, zero_rows, zero_columns, tensors, base):
    writes = linear.role in ROW_PARALLEL
    dead, size = (zero_rows, linear.out_features) if writes else (zero_columns, linear.in_features)
    if not dead > DEAD_SHARE * size:
        return
    yield finding(
        plural(
            "{n:,} of {size:,} rows of {tensor} is all 0",
            "{n:,} of {size:,} rows of {tensor} are all 0",
            dead,
            size=size,
            tensor=linear.tensor,
        )
        if writes
        else plural(
            "{n:,} of {size:,} columns of {tensor} is all 0",
            "{n:,} of {size:,} columns of {tensor} are all 0",
            dead,
            size=size,
            tensor=linear.tensor,
        ),
        evidence={"dead": dead, "size": size},
        fix=zeros_from_base(base, tensors[linear.tensor]),
        advice=_("compare the shard with its source, unless the model was pruned"),
    )


def bad():
    case = tiny()
    case.down()[3] = 0
    return case, f"1 of 64 rows of {case.name('down')} is all 0"


def good():
    return tiny()
