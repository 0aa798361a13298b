"""Q403 dead-input-column: input columns stay 0 throughout calibration (dead columns).

Why: such columns have no entries in the Hessian, so they are rounded without guidance. Some programs even set their
weights to 0, which changes the model for text that does reach them. Without damping the factorisation fails at the
first of them.

Seen as:
- ExLlamaV2: `ValueError: Hessian is not invertible`

Do: calibrate on more varied text. In models with ReLU many units are 0 on any given text.

False alarms: padded columns are 0 by design and not counted, nor are columns whose weights are 0. Up to DEAD_SHARE of
the columns is not reported.

Fix safety: no fix: doctor keeps these weights and rounds them to nearest.

Sources: IST-DASLab/gptq gptq.py (dead); vllm-project/llm-compressor
src/llmcompressor/modifiers/gptq/helpers.py; arXiv 2309.04827.
"""

from doctor.lint.rule import _, finding, rule
from doctor.lint.testing import change, measured

# Share of a linear's columns. A few inactive units are normal; from a percent on the calibration misses part of the
# model.
DEAD_SHARE = 0.01


@rule("Q403", "warning", implied_by=("Q401", "Q410"))
def dead_input_column(linear, hessian, zero_columns):
    dead = hessian.n_dead - zero_columns
    if not hessian.tokens or not dead > DEAD_SHARE * hessian.in_features:
        return
    every = hessian.n_dead == hessian.in_features
    values = {"linear": linear.name, "tokens": hessian.tokens}
    yield finding(
        _("every input of {linear} was 0 in {tokens:,} calibration tokens", **values)
        if every
        else _(
            "{dead:,} of {in_features:,} inputs of {linear} stayed 0 in {tokens:,} calibration tokens",
            dead=dead,
            in_features=hessian.in_features,
            **values,
        ),
        severity="warning" if every else "info",
        evidence={"n_dead": hessian.n_dead, "zero_columns": zero_columns},
        advice=_("calibrate on more varied text"),
    )


def bad():
    case = measured()
    name = case.name("down").removesuffix(".weight")
    change(case, f"linear:{name}", "hessian", n_dead=5)
    return case, f"5 of 128 inputs of {name} stayed 0 in 4,096 calibration tokens"


def good():
    case = measured()
    case.down()[:, ::8] = 0  # padding: dead inputs that meet zero weights
    change(case, f"linear:{case.name('down').removesuffix('.weight')}", "hessian", n_dead=16)
    return case
