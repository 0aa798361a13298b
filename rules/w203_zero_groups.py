"""W203 zero-groups: groups of weights are all zero, not explained by padding.

Why: the scale of a group comes from its largest weight. For a group of zeros that is 0, and 0/0 is NaN in every program
that does not guard the division. Groups inside all-zero rows are padding of out_features and are not counted.

Seen as:
- AutoAWQ: `assert torch.isnan(w).sum() == 0`
- AutoAWQ: `assert torch.isnan(scales).sum() == 0`

Do: quantize with doctor, which gives such a group scale 1, or with AutoAWQ 0.2.6 or newer. If the zeros come from
padding at the end of in_features, pad again with the zeros spread between the columns, so that no group is all zero.

False alarms: pruned models have zero groups on purpose; they matter only for a program that divides by them.

Fix safety: unsafe, with `--from`: where the donor's tensor differs in zeros only, it is taken. Pruning makes such zeros
too, so the fix would undo it. Without a donor nothing is changed: the zeros may be intended.

Sources: casper-hansen/AutoAWQ PR 519 and 522; InternLM/lmdeploy issue 1786; QwenLM/Qwen2
docs/source/quantization/gptq.md.
"""

from doctor.lint.rule import Place, _, finding, plural, rule, zeros_from_base
from doctor.lint.testing import tiny


@rule("W203", "warning", certainty="likely", implied_by=("W202",))
def zero_groups(linear, zero_groups, zero_groups_fp16, zero_rows, first_zero_group, recipe, goal, tensors, base):
    if goal != "quantize":
        return
    size = linear.in_features if recipe.group_size == -1 else recipe.group_size
    per_row = linear.in_features // size
    inside = zero_groups - zero_rows * per_row
    if inside <= 0:
        return
    total = linear.out_features * per_row
    # The scan keeps the first group of any of three kinds; it is certainly this kind only where there are no others.
    alone = zero_rows == 0 and zero_groups_fp16 == zero_groups
    values = {"n": inside, "total": total, "size": size, "tensor": linear.tensor}
    yield finding(
        plural(
            "{n:,} of {total:,} groups of {size} weights in {tensor} is all 0, at row {row}, column {column}",
            "{n:,} of {total:,} groups of {size} weights in {tensor} are all 0, the first at row {row}, column {column}",
            row=first_zero_group[0],
            column=first_zero_group[1],
            **values,
        )
        if alone
        else plural(
            "{n:,} of {total:,} groups of {size} weights in {tensor} is all 0",
            "{n:,} of {total:,} groups of {size} weights in {tensor} are all 0",
            **values,
        ),
        at=Place("", tensor=linear.tensor, index=tuple(first_zero_group) if alone else None),
        evidence={"zero_groups": zero_groups, "zero_rows": zero_rows, "group_size": size},
        fix=zeros_from_base(base, tensors[linear.tensor]),
        advice=_("quantize with a program that gives an all-zero group scale 1 (doctor does), or spread the padding"),
    )


def bad():
    case = tiny()
    linear = case.name("down")
    case.down()[5, 32:64] = 0
    return case, f"1 of 256 groups of 32 weights in {linear} is all 0, at row 5, column 32"


def good():
    case = tiny()
    case.down()[:, ::5] = 0  # padding spread between the columns: no group is empty
    return case


def donor():
    return tiny()
