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

标题: 线性层有许多行或列为零，且补零解释不了

原因: 读残差流的线性层出现零列，或写残差流的线性层出现零行，表示这一层忽略了该通道。补零只会在 gate、up 里产生
零行，在 down 里产生零列，绝不会是这样；所以是剪枝或复制损坏。

处理: 若模型就是这样剪枝的，无需处理。否则与来源对照该分片。

误报: 结构化剪枝。训练好的模型也会有少量这种通道，少于 DEAD_SHARE 不报。

修复: 不安全，且需 `--from`：若基座的张量与这里只在零上不同，就取它，这会撤销剪枝。没有基座时不改：不能断定坏了什么。
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
