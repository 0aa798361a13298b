"""W204 dead-channels: many rows or columns of a linear are zero where padding does not explain them.

Why: a column of zeros in a linear that reads the residual stream, or a row of zeros in one that writes it,
is a channel the block ignores. Padding makes zero rows in gate and up and zero columns in down, never
these; so pruning or a damaged copy did.

Do: nothing, if the model was pruned so. Otherwise compare the shard with its source.

False alarms: structured pruning. A few such channels occur in trained models, so less than DEAD_SHARE of
them stays silent.

Fix safety: unsafe, with `--from`: where the base's tensor differs in zeros alone, it is taken, which would undo a
pruning. Without a base nothing is changed: nothing is broken for certain.

Sources: casper-hansen/AutoAWQ PR 522 (zero channels and scales); arXiv 2309.04827 (neurons that never
fire).
"""

from doctor.lint.rule import ROW_PARALLEL, finding, rule, zeros_from_base
from doctor.lint.testing import tiny

# Share of channels. Below it trained models have a few by nature; a zeroed tail or pruning takes whole percents.
DEAD_SHARE = 0.01


@rule("W204", "info", certainty="hint", implied_by=("W202", "W203"))
def dead_channels(linear, zero_rows, zero_columns, tensors, base):
    writes = linear.role in ROW_PARALLEL
    dead, size, what = (
        (zero_rows, linear.out_features, "rows") if writes else (zero_columns, linear.in_features, "columns")
    )
    if not dead > DEAD_SHARE * size:
        return
    yield finding(
        f"{dead:,} of {size:,} {what} of {linear.tensor} are all 0",
        evidence={"dead": dead, "size": size},
        fix=zeros_from_base(base, tensors[linear.tensor]),
        advice="compare the shard with its source, unless the model was pruned",
    )


def bad():
    case = tiny()
    case.down()[3] = 0
    return case, f"1 of 64 rows of {case.name('down')} are all 0"


def good():
    return tiny()
