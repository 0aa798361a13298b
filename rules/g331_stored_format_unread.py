"""G331 stored-format-unread: the runtime has no reader for the stored format.

Why: a runtime looks quant_method up in a list of its own and stops where it is not there. Formats leave those lists, too:
vLLM 0.32 reads no bitsandbytes, HQQ or EXL2; 0.6 reads no MXFP4. The releases of vLLM that were read are listed in the
table; of one between two of them is said what both have or neither has.

Seen as:
- vLLM: `Unknown quantization method`
- vLLM: `Invalid quantization method: bitsandbytes`
- transformers: `Unknown quantization type, got`

Do: serve it with a runtime that the message names. `doctor convert` stores GPTQ, AWQ and compressed-tensors in each other,
and what doctor unpacks as plain 16-bit weights.

False alarms: a runtime with a plugin that registers the format.

Fix safety: no fix: the files are correct.

Sources: rules/tables/stored.toml.
"""

from doctor.lint.rule import (
    Place,
    Unavailable,
    _,
    finding,
    first_with,
    listed,
    newest,
    plural,
    readers_of,
    reads_method,
    rule,
    version_before,
)
from doctor.lint.testing import tiny_gptq


@rule("G331", "error", implied_by=("O620",))
def stored_format_unread(checkpoint, quantization_block, goal, recipe, tensors):
    if quantization_block is None or goal != "serve":
        return
    if not recipe.runtime:
        raise Unavailable(_("no runtime was named: --runtime asks for one"))
    raw, file, pointer = quantization_block
    method = raw.get("quant_method")
    if not isinstance(method, str):
        return
    known = reads_method(recipe.runtime, recipe.runtime_version, method)
    if known is None:
        raise Unavailable(
            _(
                "no list of the formats that {runtime} reads",
                runtime=" ".join(filter(None, (recipe.runtime, recipe.runtime_version))),
            )
        )
    if known:
        return
    others = [name for name in readers_of(method) if name != recipe.runtime]
    later = recipe.runtime_version and first_with(recipe.runtime, method)
    if later and version_before(recipe.runtime_version, later):
        others.insert(0, f"{recipe.runtime} {later}")
    values = {
        "runtime": recipe.runtime,
        "version": recipe.runtime_version or newest(recipe.runtime),
        "method": method,
    }
    yield finding(
        plural(
            "{runtime} {version} has no reader for quant_method {method}; {others} has one",
            "{runtime} {version} has no reader for quant_method {method}; {others} have one",
            len(others),
            others=listed(others),
            **values,
        )
        if others
        else _("{runtime} {version} has no reader for quant_method {method}", **values),
        at=Place(file, pointer=f"{pointer}/quant_method"),
        evidence={"method": method, "readers": others},
        advice=_("serve it elsewhere, or store it in another format with `doctor convert`"),
    )


def bad():
    case = good()
    case.config["quantization_config"]["quant_method"] = "gptq_marlin"
    return case, "transformers 5.24.0 has no reader for quant_method gptq_marlin; vllm has one"


def good():
    case = tiny_gptq()
    case.recipe = case.recipe.with_field("goal", "serve").with_field("runtime", "transformers")
    return case
