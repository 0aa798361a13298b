"""G318 widths-unread: runtime does not read per-linear bit widths in this format.

Why: in the GPTQ format the "dynamic" object gives single linears their own bits, which only some readers know. Other
readers build every linear with the common bits, and the sizes of the packed words do not match.

Seen as:
- transformers: `Reinit due to size mismatch - ckpt: torch.Size([384, 576]) vs model:torch.Size([192, 576])`
- transformers: `You set `ignore_mismatched_sizes` to `False``

Do: write compressed-tensors, whose per-linear bits transformers and vLLM read, or serve with vLLM, SGLang or GPTQModel.

False alarms: a newer version that reads them; the versions that were tested are listed under the sources.

Fix safety: unsafe: it changes the format that you asked for, never the checkpoint. A checkpoint that is already
quantized must be quantized again.

Sources: run with transformers 5.24 (size mismatch), GPTQModel 7.7 (loads and answers) and vLLM 0.32 (reads the widths;
its CPU build has no 8-bit kernel); turboderp/exllamav2 exllamav2/linear.py reads 4-bit GPTQ only.
"""

from doctor.lint.rule import KNOWN, Fix, Place, SetRecipe, _, finding, plural, rule
from doctor.lint.testing import tiny

ONE_WIDTH = ("transformers", "exllamav2")


@rule("G318", "error")
def widths_unread(checkpoint, recipe, quantization_block):
    if recipe.runtime not in ONE_WIDTH:
        return
    raw: dict = {}
    file = pointer = ""
    if quantization_block is not None:
        raw, file, pointer = quantization_block
    dynamic = raw.get("dynamic")
    stored = [
        name
        for name, own in (dynamic if isinstance(dynamic, dict) else {}).items()
        if not name.startswith("-:") and isinstance(own, dict) and "bits" in own
    ]
    if stored:
        yield finding(
            plural(
                '"dynamic" gives {n:,} pattern its own bits, which {runtime} does not read ({first})',
                '"dynamic" gives {n:,} patterns their own bits, which {runtime} does not read (first {first})',
                len(stored),
                runtime=recipe.runtime,
                first=stored[0],
            ),
            at=Place(file, pointer=f"{pointer}/dynamic"),
            evidence={"runtime": recipe.runtime, "patterns": len(stored)},
            advice=_("quantize the original again, into compressed-tensors or with the same bits for all linears"),
        )
    elif quantization_block is None and recipe.bits_for and KNOWN[recipe.output_format].widths_key:
        read = next(f.name for f in KNOWN.values() if f.writes and f.own_widths and not f.widths_key)
        fix = (
            Fix(_("write {format}", format=read), (SetRecipe("format", read),), "unsafe")
            if recipe.runtime == "transformers"
            else None
        )
        yield finding(
            _(
                "{patterns}: in the {format} format {runtime} reads the same bits for all linears",
                patterns=", ".join(recipe.bits_for),
                format=recipe.output_format,
                runtime=recipe.runtime,
            ),
            evidence={"runtime": recipe.runtime, "bits_for": list(recipe.bits_for)},
            fix=fix,
            advice=_("use the same bits for all linears, or another runtime"),
        )


def bad():
    case = tiny()
    case.recipe = case.recipe.with_field("runtime", "transformers").with_field("bits_for", ("*.1.*=8",))
    return case, "*.1.*=8: in the gptq format transformers reads the same bits for all linears"


def good():
    case = tiny()
    case.recipe = case.recipe.with_field("runtime", "vllm").with_field("bits_for", ("*.1.*=8",))
    return case
