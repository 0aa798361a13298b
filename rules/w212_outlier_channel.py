"""W212 outlier-channel: a column of weights is a hundred times its neighbours.

Why: the weights of a group share a scale, and the largest of them sets it. A column a hundred times the median one takes
the scale of each group that it is in: at 4 bits its neighbours all become 0, at 8 bits they share a few codes. The
model then answers from that column alone in every row.

Do: leave the linear in 16 bits (`--ignore NAME`). Or divide the column by a power of two and multiply what makes this
input (the norm before it, or a row of the linear before it) by the same: the outputs stay the same to the bit.

False alarms: formats whose grid is a float of 8 bits keep small and large weights alike and are not judged. Sampled are
64 rows of every 4 million weights. The largest ratio of a linear of SmolLM2-135M is 4.2, of Gemma 3 270M 5.3; a single
large weight is not a column and is not counted.

Fix safety: unsafe: it changes the recipe that you asked for, never the checkpoint.

Sources: arXiv 2306.00978 section 3 (a group shares a scale); doctor/scan/outliers.py.
"""

from doctor.lint.rule import KNOWN, Fix, Keep, Place, _, finding, is_kept, rule, together
from doctor.lint.testing import np, tiny

TIMES = 50  # of the median column. A column a hundred times as wide measures 85 to 120; trained linears stay below 6


@rule("W212", "warning", certainty="likely", implied_by=("W201", "W202", "W203", "W204", "W205"))
def outlier_channel(linear, outlier_column, recipe, goal, spec):
    if (
        outlier_column is None
        or not outlier_column.times >= TIMES
        or goal != "quantize"
        or is_kept(recipe, linear.name)
    ):
        return
    grid = KNOWN[recipe.output_format].grid(recipe.for_linear(linear.name).scheme)
    if grid.levels and grid.bits > 4:
        return
    codes = 2**grid.bits - 1
    values = {
        "column": outlier_column.place,
        "tensor": linear.tensor,
        "times": outlier_column.times,
        "bits": grid.bits,
        "others": (linear.in_features if grid.group_size == -1 else grid.group_size) - 1,
        "codes": codes,
        "left": codes / outlier_column.times,
    }
    yield finding(
        _(
            "column {column:,} of {tensor} is {times:,.0f} times the median column: at {bits} bits the {others:,} "
            "weights that share its scale all become 0",
            **values,
        )
        if outlier_column.times >= codes
        else _(
            "column {column:,} of {tensor} is {times:,.0f} times the median column: at {bits} bits the {others:,} "
            "weights that share its scale have {left:.1f} of {codes} codes",
            **values,
        ),
        at=Place("", tensor=linear.tensor),
        evidence={"column": outlier_column.place, "times": outlier_column.times},
        fix=Fix(_("keep it in 16 bits"), tuple(Keep(n) for n in together(spec.linears, [linear.name])), "unsafe"),
    )


def planted(case, role="down", times=128.0):
    """Column 7 of a linear becomes `times` the median column's largest weights, in each half of its rows."""
    name = case.name(role)
    codes = case.tensors[name].astype(np.uint32) << 16
    halves = np.abs(codes.view(np.float32)).reshape(2, -1, codes.shape[1]).max(axis=1).min(axis=0)
    halves[7] = np.inf
    size = np.float32(times * np.median(halves))
    case.tensors[name][:, 7] = size.view(np.uint32) >> 16
    return name


def bad():
    case = tiny()
    name = planted(case)
    return case, (
        f"column 7 of {name} is 128 times the median column: at 4 bits the 31 weights that share its scale all become 0"
    )


def good():
    case = tiny()
    case.down()[9, 7] += 8 << 7  # one weight 256 times its value is no column
    return case
