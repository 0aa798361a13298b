"""Facts derived from the counters of the scan: one fact a counter, and what the counters of several tensors say together."""

from doctor.core.facts import fact


@fact("tensor")
def n_nan(tensor, stats):
    """Values that are NaN."""
    return stats.n_nan


@fact("tensor")
def n_inf(tensor, stats):
    """Values that are +Inf or -Inf."""
    return stats.n_inf


@fact("tensor")
def n_zero(tensor, stats):
    """Values that are 0."""
    return stats.n_zero


@fact("tensor")
def numel(tensor, stats):
    """Values in all."""
    return stats.numel


@fact("tensor")
def n_fp16_overflow(tensor, stats):
    """Finite values that a cast to fp16 turns into Inf."""
    return stats.n_fp16_overflow


@fact("tensor")
def n_fp16_underflow(tensor, stats):
    """Values other than 0 that a cast to fp16 turns into 0."""
    return stats.n_fp16_underflow


@fact("tensor")
def absmax(tensor, stats):
    """Largest magnitude among finite values."""
    return stats.absmax


@fact("tensor")
def first_nonfinite(tensor, stats):
    """Flat index of the first NaN or Inf, -1 where there is none."""
    return stats.first_nonfinite


@fact("checkpoint")
def largest_values(checkpoint, every_absmax):
    """tensor -> largest magnitude among its finite values, for pictures across blocks."""
    return every_absmax


@fact("checkpoint")
def head_equals_embed(checkpoint, spec, every_same_bytes):
    """Whether head and embedding hold the same bytes; None where not both are stored."""
    return every_same_bytes.get(spec.head_tensor)


@fact("checkpoint")
def mlp_makers(checkpoint, spec):
    """(module that holds them, block, expert) -> the linears whose rows make the inputs of an MLP's second matrix."""
    found: dict[tuple, list] = {}
    for linear in spec.linears:
        if linear.role in ("gate", "up", "gate_up"):
            found.setdefault(_mlp(linear), []).append(linear)
    return found


@fact("linear")
def dead_inputs(linear, spec, mlp_makers, every_zero_rows, every_zero_columns):
    """in_features of an MLP's second matrix whose input is 0 for every token, because the row that makes it is all 0.

    Where the column that reads it is 0 as well it is padding, and not counted. 0 for other linears, and where a bias
    may make such a row speak.
    """
    makers = mlp_makers.get(_mlp(linear), []) if linear.role == "down" else []
    if not makers or any(f"{x.name}.bias" in spec.biases for x in makers):
        return 0
    dead = max(-(-every_zero_rows.get(x.name, 0) // (2 if x.role == "gate_up" else 1)) for x in makers)
    return max(0, dead - every_zero_columns.get(linear.name, 0))


def _mlp(linear) -> tuple:
    return linear.name.rpartition(".")[0], linear.block, linear.expert
