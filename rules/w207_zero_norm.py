"""W207 zero-norm: a norm's weights are all 0.

Why: such a norm puts out 0 for every token, so the linears behind it get nothing and their Hessian is 0.
Zeros that fill the end of a damaged file reach the small tensors first.

Do: compare the shard's checksum with its source's and copy it again.

False alarms: norms that are stored as an offset from 1 (Gemma) are 0 in a fresh model and are not looked
at. A norm after a block may be switched off with zeros on purpose.

Fix safety: unsafe, and only with `--from`: the tensor is taken from a base model. Nothing here says that it was not
trained.

Sources: rules/tables/architectures/ (norm of each family).
"""

from doctor.lint.rule import finding, rule, tensor_from_base
from doctor.lint.testing import never_in, tiny

FACTOR = "weight * xhat"  # how a family stores a norm whose weights multiply; "(1 + weight) * xhat" is the other way


@rule("W207", "warning", certainty="likely")
def zero_norm(tensor, n_zero, numel, spec, base):
    if len(tensor.shape) != 1 or not tensor.name.endswith("norm.weight") or not numel or n_zero != numel:
        return
    if spec.norm_of(tensor.name) == FACTOR:
        yield finding(
            f"all {numel:,} weights of {tensor.name} are 0: nothing passes this norm",
            evidence={"numel": numel},
            fix=tensor_from_base(base, tensor),
            advice=f"compare the checksum of {tensor.shard} with its source and copy the shard again",
        )


def bad():
    case = tiny(never_in("gemma", "opt", why="its norm weights are added to 1, or are named otherwise"))
    case.tensors["model.layers.1.input_layernorm.weight"][:] = 0
    return case, "all 64 weights of model.layers.1.input_layernorm.weight are 0: nothing passes this norm"


def good():
    case = tiny("gemma")
    case.tensors["model.layers.1.input_layernorm.weight"][:] = 0
    return case


def donor():
    """What the missing is taken from."""
    return tiny()
