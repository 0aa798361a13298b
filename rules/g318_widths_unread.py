"""G318 widths-unread: linears have other widths than the rest, in a form that the runtime does not read.

Why: in the GPTQ format a linear's own width stands under "dynamic", which only some readers know. The others build
every linear in the common width, and the sizes of the packed words do not fit.

Seen as:
- transformers: `Reinit due to size mismatch - ckpt: torch.Size([384, 576]) vs model:torch.Size([192, 576])`
- transformers: `You set `ignore_mismatched_sizes` to `False``

Do: write compressed-tensors, whose widths transformers and vLLM read, or serve with vLLM, SGLang or GPTQModel.

False alarms: a newer version that reads it; the versions that were run stand under the sources.

Fix safety: unsafe: it changes the format that you asked for, never the checkpoint. A stored one is quantized again by
you.

Sources: run with transformers 5.24 (size mismatch), GPTQModel 7.7 (loads and answers) and vLLM 0.32 (reads the widths;
its CPU build has no 8-bit kernel); turboderp/exllamav2 exllamav2/linear.py reads 4-bit GPTQ only.
"""

from doctor.lint.rule import KNOWN, Fix, Place, SetRecipe, finding, rule
from doctor.lint.testing import tiny

ONE_WIDTH = ("transformers", "exllamav2")


@rule("G318", "error")
def widths_unread(checkpoint, recipe, quantization_block):
    if recipe.runtime not in ONE_WIDTH:
        return
    raw, file, pointer = quantization_block or ({}, "", "")
    dynamic = raw.get("dynamic")
    stored = [
        name
        for name, own in (dynamic if isinstance(dynamic, dict) else {}).items()
        if not name.startswith("-:") and isinstance(own, dict) and "bits" in own
    ]
    if stored:
        yield finding(
            f'"dynamic" gives {len(stored):,} patterns a width of their own, which {recipe.runtime} does not read (first {stored[0]})',
            at=Place(file, pointer=f"{pointer}/dynamic"),
            evidence={"runtime": recipe.runtime, "patterns": len(stored)},
            advice="quantize the original again, into compressed-tensors or with one width",
        )
    elif quantization_block is None and recipe.bits_for and KNOWN[recipe.output_format].widths_key:
        read = next(f.name for f in KNOWN.values() if f.writes and f.own_widths and not f.widths_key)
        fix = Fix(f"write {read}", (SetRecipe("format", read),), "unsafe") if recipe.runtime == "transformers" else None
        yield finding(
            f"{', '.join(recipe.bits_for)}: in the {recipe.output_format} format {recipe.runtime} reads one width for all linears",
            evidence={"runtime": recipe.runtime, "bits_for": list(recipe.bits_for)},
            fix=fix,
            advice="one width for all, or another runtime",
        )


def bad():
    case = tiny()
    case.recipe = case.recipe.with_field("runtime", "transformers").with_field("bits_for", ("*.1.*=8",))
    return case, "*.1.*=8: in the gptq format transformers reads one width for all linears"


def good():
    case = tiny()
    case.recipe = case.recipe.with_field("runtime", "vllm").with_field("bits_for", ("*.1.*=8",))
    return case
