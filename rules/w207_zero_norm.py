"""W207 zero-norm: norm weights are all zero.

Why: such a norm outputs 0 for every token, so the next linears get no input and their Hessian is 0. Zeros at the end of
a damaged file reach the small tensors first.

Do: compare the checksum of the shard with its source and copy it again.

False alarms: norms stored as an offset from 1 (Gemma) are 0 in a new model and are not checked. A norm after a sublayer
may be zero on purpose to switch it off.

Fix safety: unsafe, and only with `--from`: the tensor is taken from the donor. Nothing shows that it was not trained.

Sources: rules/tables/architectures/ (norm of each family).
"""

from doctor.lint.rule import _, finding, rule, tensor_from_base
from doctor.lint.testing import never_in, tiny

FACTOR = "weight * xhat"  # how a family stores a norm whose weights multiply; "(1 + weight) * xhat" is the other way


@rule("W207", "warning", certainty="likely")
def zero_norm(tensor, n_zero, numel, spec, base):
    if len(tensor.shape) != 1 or not tensor.name.endswith("norm.weight") or not numel or n_zero != numel:
        return
    if spec.norm_of(tensor.name) == FACTOR:
        yield finding(
            _("all {numel:,} weights of {tensor} are 0: the output of this norm is 0", numel=numel, tensor=tensor.name),
            evidence={"numel": numel},
            fix=tensor_from_base(base, tensor),
            advice=_("compare the checksum of {file} with its source and copy the shard again", file=tensor.shard),
        )


def bad():
    case = tiny(never_in("gemma", "opt", why="its norm weights are added to 1, or are named otherwise"))
    case.tensors["model.layers.1.input_layernorm.weight"][:] = 0
    return case, "all 64 weights of model.layers.1.input_layernorm.weight are 0: the output of this norm is 0"


def good():
    case = tiny("gemma")
    case.tensors["model.layers.1.input_layernorm.weight"][:] = 0
    return case


def donor():
    """The checkpoint that the tensor is taken from."""
    return tiny()
