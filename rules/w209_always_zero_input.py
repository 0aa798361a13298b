"""W209 always-zero-input: a linear has inputs that are 0 for every token, so its Hessian is singular.

Why: GPTQ factorises H = XᵀX. A channel that is always 0 gives H a row and a column of zeros, and only damping, or a
tool that looks for such channels, makes it factorise at all. Tools that replace the zero by 1 before they take the mean
also change the damping of every other channel.

Seen as:
- PyTorch: `linalg.cholesky: The factorization could not be completed because the input is not positive-definite (the leading minor of order 1 is not positive-definite)`
- ExLlamaV2: `ValueError: Hessian is not invertible`

Do: nothing, if the rows were pruned. doctor quantize leaves such columns out of the mean, puts them last and rounds
them to nearest. With other tools keep the damping above 0. If the rows were not meant to be zero, compare the shard
with its source.

False alarms: zero padding has a zero column behind every zero row and is not counted. A row that a bias can wake is not
counted.

Fix safety: no fix: a row of zeros is a working part of the model, whatever made it.

Sources: IST-DASLab/gptq gptq.py (dead columns); turboderp/exllamav2 exllamav2/conversion/adaptivegptq.py:242 (commented
out there).
"""

from doctor.lint.rule import finding, rule
from doctor.lint.testing import never_in, tiny


@rule("W209", "warning", implied_by=("W202",))
def always_zero_input(linear, dead_inputs, mlp_makers):
    if dead_inputs:
        makers = mlp_makers[linear.name.rpartition(".")[0], linear.block, linear.expert]
        yield finding(
            f"{dead_inputs:,} of {linear.in_features:,} inputs of {linear.tensor} are 0 for every token: its Hessian is singular",
            evidence={
                "dead_inputs": dead_inputs,
                "in_features": linear.in_features,
                "made_by": [x.tensor for x in makers],
            },
            advice="doctor quantize handles such columns; with other tools keep damping above 0, or copy the shard again",
        )


def bad():
    case = tiny(never_in("opt", why="a bias makes such a row speak"))
    for role in ("up", "gate_up"):
        try:
            case.tensors[case.name(role)][[2, 3]] = 0
        except KeyError:
            continue
    return case, f"2 of 128 inputs of {case.name('down')} are 0 for every token: its Hessian is singular"


def good():
    return tiny()
