"""Facts about the values of the weights: those that the scan provides, and those derived from its counters.

One fact for each counter, so that a rule names what it looks at.
"""

from doctor.core.facts import FactKey, fact, key_of, provide
from doctor.model.linears import Linear
from doctor.scan.stats import Outlier, Stats

STATS: FactKey[Stats] = provide(
    "stats", "tensor", "values", "Exact counters over every value of a tensor (stats.Stats)."
)
ZERO_GROUPS: FactKey[int] = provide(
    "zero_groups", "linear", "values", "Groups of group_size in_features whose weights are all 0, counted per row."
)
ZERO_GROUPS_FP16: FactKey[int] = provide(
    "zero_groups_fp16",
    "linear",
    "values",
    "Groups whose weights are all 0 after a cast to fp16, which turns tiny weights into 0; includes zero_groups.",
)
FIRST_ZERO_GROUP: FactKey[tuple[int, int] | None] = provide(
    "first_zero_group",
    "linear",
    "values",
    "(row, first column) of the first group of zeros, before or after a cast; or None.",
)
ONE_SIGNED: FactKey[tuple[int, int]] = provide(
    "one_signed",
    "linear",
    "values",
    "(groups sampled, groups whose weights all have one sign). Groups of zeros are not counted.",
)
ZERO_ROWS: FactKey[int] = provide("zero_rows", "linear", "values", "out_features whose weights are all 0.")
ZERO_COLUMNS: FactKey[int] = provide("zero_columns", "linear", "values", "in_features whose weights are all 0.")
OUTLIER_COLUMN: FactKey[Outlier | None] = provide(
    "outlier_column",
    "linear",
    "values",
    "The in_feature whose weights are largest against the median column, in samples of rows (Outlier); or None.",
)
OUTLIER_ENTRY: FactKey[Outlier | None] = provide(
    "outlier_entry",
    "tensor",
    "values",
    "The entry of a norm's weights that is largest against the median one (Outlier); or None. Of norms alone.",
)
SAME_BYTES: FactKey[bool] = provide(
    "same_bytes",
    "tensor",
    "values",
    "Whether the tensor equals, in dtype, shape and bytes, the one that `compared` names.",
)
DIGESTS: FactKey[dict[str, str]] = provide(
    "digests",
    "tensor",
    "values",
    "File -> blake2b (16 bytes, hexadecimal) of the tensor's bytes in it, for the tensors that `digested` names.",
)


@fact("tensor")
def n_nan(tensor, stats) -> int:
    """Values that are NaN."""
    return stats.n_nan


@fact("tensor")
def n_inf(tensor, stats) -> int:
    """Values that are +Inf or -Inf."""
    return stats.n_inf


@fact("tensor")
def n_zero(tensor, stats) -> int:
    """Values that are 0."""
    return stats.n_zero


@fact("tensor")
def numel(tensor, stats) -> int:
    """Values in all."""
    return stats.numel


@fact("tensor")
def n_fp16_overflow(tensor, stats) -> int:
    """Finite values that a cast to fp16 turns into Inf."""
    return stats.n_fp16_overflow


@fact("tensor")
def n_fp16_underflow(tensor, stats) -> int:
    """Values other than 0 that a cast to fp16 turns into 0."""
    return stats.n_fp16_underflow


@fact("tensor")
def absmax(tensor, stats) -> float:
    """Largest magnitude among finite values."""
    return stats.absmax


@fact("tensor")
def first_nonfinite(tensor, stats) -> int:
    """Flat index of the first NaN or Inf, -1 where there is none."""
    return stats.first_nonfinite


@fact("checkpoint")
def largest_values(checkpoint, every_absmax) -> dict[str, float]:
    """Tensor name -> largest magnitude among its finite values, for charts across decoder layers."""
    return every_absmax


@fact("checkpoint")
def head_equals_embed(checkpoint, spec, every_same_bytes) -> bool | None:
    """Whether output head and embedding hold the same bytes; None where not both are stored."""
    return every_same_bytes.get(spec.head_tensor)


@fact("checkpoint")
def mlp_makers(checkpoint, spec) -> dict[tuple, list[Linear]]:
    """(MLP module, decoder layer, expert) -> the linears whose outputs are the inputs of that MLP's down projection."""
    found: dict[tuple, list[Linear]] = {}
    for linear in spec.linears:
        if linear.role in ("gate", "up", "gate_up"):
            found.setdefault(_mlp(linear), []).append(linear)
    return found


@fact("linear")
def dead_inputs(linear, spec, mlp_makers, every_zero_rows, every_zero_columns) -> int:
    """in_features of an MLP's down projection that are 0 for every token, because the gate or up row that computes them
    is all 0.

    If the column that reads such an input is 0 too, it is padding and not counted. 0 for other linears, and where a
    bias gives the row an output.
    """
    makers = mlp_makers.get(_mlp(linear), []) if linear.role == "down" else []
    if not makers or any(f"{x.name}.bias" in spec.biases for x in makers):
        return 0
    dead = max(-(-every_zero_rows.get(x.name, 0) // (2 if x.role == "gate_up" else 1)) for x in makers)
    return max(0, dead - every_zero_columns.get(linear.name, 0))


def _mlp(linear: Linear) -> tuple:
    return linear.name.rpartition(".")[0], linear.block, linear.expert


ABSMAX = key_of(absmax)
HEAD_EQUALS_EMBED = key_of(head_equals_embed)
