"""G317 kernel-reported-bad: runtime version has a reported bug for this model and format.

Why: a kernel that computes in float16 can overflow where the model does not. The files are correct, and another version
serves them well.

Do: serve with a newer version, or in another format.

False alarms: a build of that version with a fixed kernel. Only the versions that the reports name are judged.

Fix safety: no fix: the files are correct.

Sources: rules/tables/published.toml; vllm-project/vllm issues 3998 and 14126; turboderp/exllamav2 issue 493.
"""

from doctor.lint.rule import Unavailable, _, finding, rule
from doctor.lint.testing import tiny


@rule("G317", "warning", certainty="likely")
def kernel_reported_bad(checkpoint, layout, spec, recipe, published):
    if not recipe.runtime_version:
        raise Unavailable(_("no runtime version was given: use --runtime NAME==VERSION"))
    for row in published["reports"]:
        if (
            row["runtime"] == recipe.runtime
            and row.get("model_type", spec.model_type) == spec.model_type
            and recipe.runtime_version in row["versions"]
            and layout.format in row["formats"]
        ):
            yield finding(
                _(
                    "{runtime} {version}: {what}, users report ({source}): {cause}",
                    runtime=recipe.runtime,
                    version=recipe.runtime_version,
                    what=_(row["what"]),
                    source=row["source"],
                    cause=_(row["cause"]),
                ),
                advice=_("serve with a newer version"),
                evidence={"runtime": recipe.runtime, "version": recipe.runtime_version},
            )


def bad():
    case = tiny()
    case.put(
        "checkpoint:",
        "given_published",
        {
            "reports": [
                {
                    "runtime": "exllamav2",
                    "versions": ["0.0.0"],
                    "formats": ["gptq"],
                    "what": "an example answers with `!` only",
                    "cause": "it is none",
                    "source": "this rule's file",
                }
            ]
        },
    )
    case.recipe = case.recipe.with_field("runtime", "exllamav2").with_field("runtime_version", "0.0.0")
    return case, "exllamav2 0.0.0: an example answers with `!` only, users report (this rule's file): it is none"


def good():
    case = tiny("llama")
    case.recipe = case.recipe.with_field("runtime", "vllm").with_field("runtime_version", "0.25.0")
    return case
