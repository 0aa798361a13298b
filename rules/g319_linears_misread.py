"""G319 linears-misread: runtime silently misloads or skips packed linears of this family.

Why: a runtime may reorder the weights of a family while it loads them. Where it selects them by tensor name, it skips
the tensors that a quantized checkpoint has instead, and the model generates random text although file and kernel are
correct.

Seen as:
- vLLM: random text from a Llama 4 in the GPTQ or AWQ format, while compressed-tensors answers well
- transformers: unexpected and missing experts in its load report, then random text from a quantized mixture

Do: for Llama 4 in vLLM, write symmetric compressed-tensors, or leave q, k and v in 16 bits. For mixture-of-experts
models in transformers 5, load the file with GPTQModel.load or serve it with vLLM.

False alarms: a version newer than the table may be fixed. Without --runtime only the behaviour of vLLM is reported, as
a warning. GPTQModel.load reads mixtures that transformers' from_pretrained does not: a plan gets a warning for them, a
stored file under --runtime transformers an error.

Fix safety: unsafe: another format, or linears in 16 bits, is the user's choice. A quantized checkpoint has no fix.

Sources: rules/tables/published.toml (misread), run with vLLM 0.32 and transformers 5.23 on tiny random models;
vllm-project/vllm vllm/model_executor/models/llama4.py (permute_qk_weight_for_rotary) and pull request 34243, where the
same mismatch took Llama 4 Scout from 90.9 to 5.4 on GSM8k.
"""

from doctor.lint.rule import FUSED, Fix, SetRecipe, _, finding, in_force, keep_edits, listed, rule
from doctor.lint.testing import tiny


@rule("G319", "error")
def linears_misread(checkpoint, layout, spec, recipe, published):
    for row in published["misread"]:
        asked = recipe.runtime == row["runtime"]
        if (not asked and (recipe.runtime or not row.get("unasked"))) or not in_force(row, recipe.runtime_version):
            continue
        if row.get("model_type", spec.model_type) != spec.model_type or not _reads_so(
            row, layout.format, layout.sym, recipe
        ):
            continue
        wrong = [
            x for x in layout.linears if x.role in row["roles"] and (x.expert is not None or not row.get("experts"))
        ]
        if wrong:
            yield finding(
                _(
                    "{runtime} {what} (first {first}, {n:,} in all): {cause}",
                    runtime=row["runtime"],
                    what=_(row["what"]),
                    first=wrong[0].name,
                    n=len(wrong),
                    cause=_(row["cause"]),
                ),
                severity=_severity(row, layout.quantized) if asked else "warning",
                evidence={"runtime": row["runtime"], "format": layout.format, "linears": len(wrong)},
                fix=None if layout.quantized or row.get("experts") else _other_plan(row, layout, recipe, wrong),
                advice=_(row["advice"]),
            )


def _severity(row, quantized):
    """A plan may still choose another reader of the same runtime; what is stored already is loaded as it is."""
    return "error" if quantized else row.get("severity", "error")


def _reads_so(row, form, sym, recipe):
    """Whether a row holds for this format. Activations are planned: a stored layout of words has no others."""
    planned = recipe.output_format == form and recipe.activations in row.get("activations", ())
    return form in row["formats"] or planned or (not sym and form in row.get("asymmetric", ()))


def _other_plan(row, layout, recipe, wrong):
    instead = row.get("instead")
    if instead and instead != layout.format and not _reads_so(row, instead, recipe.sym, recipe):
        return Fix(_("write {format}", format=instead), (SetRecipe("format", instead),), "unsafe")
    roles = next((fused for fused in FUSED if set(row["roles"]) & set(fused)), row["roles"])
    return Fix(
        _("keep {roles} in 16 bits", roles=listed(roles)), keep_edits(layout.linears, [x.name for x in wrong]), "unsafe"
    )


def bad():
    case = tiny()
    case.put(
        "checkpoint:",
        "given_published",
        {
            "misread": [
                {
                    "runtime": "exllamav2",
                    "formats": ["gptq"],
                    "roles": ["down"],
                    "what": "loads an example's down upside down",
                    "cause": "it is none",
                    "advice": "load the file with GPTQModel.load, or serve it with vLLM",
                }
            ]
        },
    )
    case.recipe = case.recipe.with_field("runtime", "exllamav2")
    name = case.name("down").removesuffix(".weight")
    return case, f"exllamav2 loads an example's down upside down (first {name}, 2 in all): it is none"


def good():
    case = tiny("llama")
    case.recipe = case.recipe.with_field("runtime", "vllm")
    return case


def more():
    """Cases whose fixes the example above does not show."""
    for changes in ({"format": "gptq"}, {"format": "awq"}, {"format": "compressed-tensors", "sym": False}):
        case = tiny("llama4_text")
        for name, value in changes.items():
            case.recipe = case.recipe.with_field(name, value)
        yield case
