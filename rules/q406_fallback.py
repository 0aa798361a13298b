"""Q406 fallback: linear fell back to RTN or stayed in 16 bits.

Why: other programs replace the method by rounding, or keep a linear in 16 bits, with one line in the log or none. The
file is then not what its name says, and serving engines that fuse q, k and v may refuse it.

Seen as:
- llm-compressor: `round-to-nearest instead of GPTQ`
- llm-compressor: `Hessian inversion failed for`
- GPTQModel: `Hessian remained non positive-definite after diagonal floor attempts`
- GPTQModel: `fallback quantization (observed`

Do: see the reason in the finding and fix it: finite inputs, more calibration text, a group size that divides.

False alarms: none; it reports what was done. Linears that `--ignore` names are not counted.

Fix safety: unsafe: a linear that was rounded stays in 16 bits, with those that engines fuse with it, and the decoder
layer is quantized again. One that stays in 16 bits already has no fix: it depends on the cause.

Sources: vllm-project/llm-compressor src/llmcompressor/modifiers/gptq/base.py:391; intel/auto-round
compressors/layer_config_resolver.py:69 (layers left in 16 bits without a word).
"""

from doctor.lint.rule import Fix, Keep, _, finding, is_kept, is_rounding, rule, together
from doctor.lint.testing import change, measured


@rule("Q406", "warning", implied_by=("Q401", "Q410", "G301", "G310"))
def fallback(linear, solve, spec, recipe):
    if (
        not (is_rounding(solve.outcome) or solve.outcome == "kept")
        or solve.outcome == recipe.method
        or is_kept(recipe, linear.name)
    ):
        return
    rounded = is_rounding(solve.outcome)
    values = {"linear": linear.name, "method": recipe.method, "reason": solve.note or _("no reason recorded")}
    yield finding(
        _("{linear} was rounded to nearest instead of {method}: {reason}", **values)
        if rounded
        else _("{linear} stays in 16 bits instead of {method}: {reason}", **values),
        evidence={"outcome": solve.outcome, "method": recipe.method},
        fix=None
        if solve.outcome == "kept"
        else Fix(_("keep it in 16 bits"), tuple(Keep(n) for n in together(spec.linears, [linear.name])), "unsafe"),
        advice=_("fix the cause given, or name the linear with --ignore"),
    )


def bad():
    case = measured()
    name = case.name("down").removesuffix(".weight")
    change(case, f"linear:{name}", "solve", outcome="rtn", note="its Hessian could not be factored")
    return case, f"{name} was rounded to nearest instead of gptq: its Hessian could not be factored"


def good():
    return measured()
