"""W209 always-zero-input: linear inputs are always 0, so its Hessian is singular.

Why: GPTQ factorises H = XᵀX. A channel that is always 0 gives H a row and a column of zeros. Only damping, or a tool
that handles such channels, makes the factorisation possible. Tools that replace the zero by 1 before they compute the
mean also change the damping of every other channel.

Seen as:
- PyTorch: `linalg.cholesky: The factorization could not be completed because the input is not positive-definite (the leading minor of order 1 is not positive-definite)`
- ExLlamaV2: `ValueError: Hessian is not invertible`

Do: nothing, if the rows were pruned. doctor quantize leaves such columns out of the mean, orders them last and rounds
them to nearest. With other tools keep the damping above 0. If the rows should not be zero, compare the shard with its
source.

False alarms: zero padding has a zero column behind every zero row and is not counted. A row with a bias that makes it
nonzero is not counted.

Fix safety: no fix: a row of zeros is a valid part of the model, whatever its cause.

Sources: IST-DASLab/gptq gptq.py (dead columns); turboderp/exllamav2 exllamav2/conversion/adaptivegptq.py:242 (commented
out there).
"""

from doctor.lint.rule import _, finding, plural, rule
from doctor.lint.testing import never_in, tiny


@rule("W209", "warning", implied_by=("W202",))
def always_zero_input(linear, dead_inputs, mlp_makers):
    if dead_inputs:
        makers = mlp_makers[linear.name.rpartition(".")[0], linear.block, linear.expert]
        yield finding(
            plural(
                "{n:,} of {in_features:,} inputs of {tensor} is 0 for every token: its Hessian is singular",
                "{n:,} of {in_features:,} inputs of {tensor} are 0 for every token: its Hessian is singular",
                dead_inputs,
                in_features=linear.in_features,
                tensor=linear.tensor,
            ),
            evidence={
                "dead_inputs": dead_inputs,
                "in_features": linear.in_features,
                "made_by": [x.tensor for x in makers],
            },
            advice=_(
                "doctor quantize handles such columns; with other tools keep damping above 0, or copy the shard again"
            ),
        )


def bad():
    case = tiny(never_in("opt", why="its bias makes such a row nonzero"))
    for role in ("up", "gate_up"):
        try:
            case.tensors[case.name(role)][[2, 3]] = 0
        except KeyError:
            continue
    return case, f"2 of 128 inputs of {case.name('down')} are 0 for every token: its Hessian is singular"


def good():
    return tiny()
