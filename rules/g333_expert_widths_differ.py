"""G333 expert-widths-differ: transformers reads experts of several bit widths as one width.

Why: transformers 5 joins the experts of a layer into one tensor while it loads a compressed-tensors file, and unpacks all
experts of the model by one scheme. Experts of another width come out with wrong values: the sizes fit, and no error says
so. vLLM reads each layer's experts by their own scheme.

Do: give all experts one width, or serve the file with vLLM. Linears that are no experts may have widths of their own.

False alarms: another release of transformers may read them; 5.24 was run.

Fix safety: no fix: which width the experts get is the user's choice.

Sources: transformers src/transformers/integrations/compressed_tensors.py (get_experts_scheme), run on a tiny random
Mixtral whose last layer's experts have 8 bits: 8 of 24 joined matrices differed from what compressed-tensors unpacks.
"""

from doctor.lint.rule import KNOWN, _, finding, listed, rule
from doctor.lint.testing import only_in, tiny


@rule("G333", "error")
def expert_widths_differ(checkpoint, layout, recipe):
    if layout.quantized or recipe.runtime not in ("", "transformers") or not KNOWN[layout.format].groups_of_modules:
        return
    widths = sorted({recipe.for_linear(x.name).bits for x in layout.linears if x.expert is not None})
    if len(widths) > 1:
        yield finding(
            _(
                "experts get {widths} bits: transformers unpacks all of them by one width, so some get wrong values and "
                "no error says so",
                widths=listed(list(map(str, widths))),
            ),
            severity="error" if recipe.runtime else "warning",
            evidence={"widths": widths},
            advice=_("give all experts one width, or serve it with vLLM"),
        )


def bad():
    case = tiny(only_in("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", why="it has no experts"))
    case.recipe = case.recipe.with_field("format", "compressed-tensors").with_field("bits_for", ("*.1.*experts.*=8",))
    case.recipe = case.recipe.with_field("runtime", "transformers")
    return case, (
        "experts get 4 and 8 bits: transformers unpacks all of them by one width, so some get wrong values and no error "
        "says so"
    )


def good():
    case = tiny(only_in("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", why="it has no experts"))
    case.recipe = case.recipe.with_field("format", "compressed-tensors").with_field("bits_for", ("*.1.*self_attn.*=8",))
    return case
