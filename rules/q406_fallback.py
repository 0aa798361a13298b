"""Q406 fallback: a linear was quantized by a simpler method than asked, or left in 16 bits.

Why: other programs swap in rounding, or keep a linear in 16 bits, with a line in the log or none. The file
then is not what its name says, and serving engines that fuse q, k and v may refuse it.

Seen as:
- llm-compressor: `round-to-nearest instead of GPTQ`
- llm-compressor: `Hessian inversion failed for`
- GPTQModel: `Hessian remained non positive-definite after diagonal floor attempts`
- GPTQModel: `fallback quantization (observed`

Do: see why (the finding's text), and cure that: finite inputs, more calibration text, a group size that
divides.

False alarms: none; it reports what was done. Linears that `--ignore` names are not counted.

Fix safety: unsafe: a linear that was rounded stays in 16 bits, with those that engines fuse with it, and the block is
quantized again. One that stays in 16 bits already has no fix: the cause decides.

Sources: vllm-project/llm-compressor src/llmcompressor/modifiers/gptq/base.py:391; intel/auto-round
compressors/layer_config_resolver.py:69 (layers left in 16 bits without a word).
"""

from doctor.lint.rule import Fix, Keep, finding, is_kept, is_rounding, rule, together
from doctor.lint.testing import change, measured


@rule("Q406", "warning", implied_by=("Q401", "Q410", "G301", "G310"))
def fallback(linear, solve, spec, recipe):
    if (
        not (is_rounding(solve.outcome) or solve.outcome == "kept")
        or solve.outcome == recipe.method
        or is_kept(recipe, linear.name)
    ):
        return
    what = "was rounded to nearest" if is_rounding(solve.outcome) else "stays in 16 bits"
    yield finding(
        f"{linear.name} {what} instead of {recipe.method}: {solve.note or 'no reason recorded'}",
        evidence={"outcome": solve.outcome, "method": recipe.method},
        fix=None
        if solve.outcome == "kept"
        else Fix("keep it in 16 bits", tuple(Keep(n) for n in together(spec.linears, [linear.name])), "unsafe"),
        advice="cure the reason given, or name it with --ignore",
    )


def bad():
    case = measured()
    name = case.name("down").removesuffix(".weight")
    change(case, f"linear:{name}", "solve", outcome="rtn", note="its Hessian could not be factored")
    return case, f"{name} was rounded to nearest instead of gptq: its Hessian could not be factored"


def good():
    return measured()
