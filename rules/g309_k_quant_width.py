"""G309 k-quant-width: in_features is not a multiple of 256, so k-quants fall back.

Why: k-quants pack 256 in_features together. For tensors of other widths llama.cpp falls back to a type with blocks of
32, or to float16: the file grows (4.5 to 6.2 bits a weight in one report) without an error.

Seen as:
- llama.cpp: `not divisible by 256, required for`
- llama.cpp: `using fallback quantization`

Do: expect the larger file, choose a type with blocks of 32 (Q4_0, Q8_0, IQ4_NL) yourself, or pad the MLP width to a
multiple of 256.

False alarms: none for widths; the cost is size, not quality.

Fix safety: no fix: the model is correct.

Sources: ggml-org/llama.cpp gguf-py/gguf/constants.py (GGML_QUANT_SIZES), pull request 3747, issue 6614.
"""

from doctor.lint.rule import Place, _, finding, plural, rule, size_key
from doctor.lint.testing import tiny

BLOCK, SMALL_BLOCK = 256, 32  # in_features in a block of a k-quant, and of the type it falls back to


@rule("G309", "info")
def k_quant_width(checkpoint, spec, recipe):
    if recipe.runtime != "llama.cpp":
        return
    widths: dict[int, list] = {}
    for linear in spec.linears:
        if linear.in_features % BLOCK:
            widths.setdefault(linear.in_features, []).append(linear)
    for width, linears in sorted(widths.items()):
        key = next((k for x in linears if (k := size_key(spec, x.name, 1))), None)
        fallback = _("a type with blocks of 32") if width % SMALL_BLOCK == 0 else "float16"
        yield finding(
            plural(
                "in_features {width} of {n:,} linear is not a multiple of {block}: k-quants fall back to {fallback}",
                "in_features {width} of {n:,} linears is not a multiple of {block}: k-quants fall back to {fallback}",
                len(linears),
                width=width,
                block=BLOCK,
                fallback=fallback,
            ),
            at=Place("config.json", pointer=spec.at(key) if key else None),
            evidence={"in_features": width, "linears": len(linears)},
            advice=_("expect a larger file, or choose Q4_0, Q8_0 or IQ4_NL yourself"),
        )


def bad():
    case = tiny()
    case.recipe = case.recipe.with_field("runtime", "llama.cpp")
    return case, "in_features 64 of 12 linears is not a multiple of 256: k-quants fall back to a type with blocks of 32"


def good():
    return tiny()
