"""G322 output-would-not-load: the client would not load the quantized copy.

Why: a format may be well written and still have no reader. transformers replaces the linears of a class by packed ones
when it loads compressed-tensors; classes whose own code asks each linear for its weight, and linears that are no Linear
(GPT-2's Conv1D), cannot be loaded so.

Seen as:
- transformers: `'Linear' object has no attribute 'weight'`
- transformers: `We encountered some issues during automatic conversion of the weights`
- transformers: `were not initialized from the model checkpoint`

Do: choose another --format, or name the runtime that will serve it with --runtime. The client's own loader was asked, with
the headers that a run would write and no data.

False alarms: none known: it is the client's own answer. Another release of it may load the copy.

Fix safety: no fix: how it will be served is the user's choice.

Sources: transformers src/transformers/modeling_utils.py (from_pretrained); src/transformers/integrations/compressed_tensors.py.
"""

from doctor.lint.rule import _, finding, load_problem, rule
from doctor.lint.testing import rehearsed


@rule("G322", "error", implied_by=("C147", "G319", "G323"))
def output_would_not_load(checkpoint, rehearsal, spec, recipe, tensors):
    problem = load_problem(rehearsal.proof, recipe, spec.model_type, tensors) if rehearsal.proof else None
    if problem:
        yield finding(
            _("of the quantized copy, {what}", what=problem.message),
            severity=problem.severity,
            evidence=problem.evidence,
            advice=_("choose another format, or name the runtime that will serve it"),
        )


def bad():
    case = rehearsed(architecture="MambaForCausalLM", refused="KeyError: x")
    return case, "of the quantized copy, transformers 5 refuses to load it as MambaForCausalLM: KeyError: x"


def good():
    return rehearsed()
