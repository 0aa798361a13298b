"""G340 gguf-types-swapped: GGUF's K types do not fit the model's widths, so others are written.

Why: a K type needs in_features to be a multiple of 256. Where they are not, llama.cpp takes Q5_0 for Q4_K, Q5_1 for Q5_K,
Q8_0 for Q6_K and IQ4_NL for IQ4_XS, and tells only its log; doctor writes the same types. The file is larger than its
name says, and so must be compared by its true bits.

Seen as:
- llama.cpp: `fallback quantization`

Do: take it as it is, or --scheme Q4_0, which fits every multiple of 32.

False alarms: none; the widths are the model's.

Fix safety: manual; the width is the model's.

Sources: ggml-org/llama.cpp src/llama-quant.cpp (tensor_type_fallback).
"""

from collections import Counter

from doctor.lint.rule import Place, Unavailable, _, finding, format_of, planned_types, rule, with_mixture
from doctor.lint.testing import Recipe, only_in, tiny


@rule("G340", "info")
def gguf_types_swapped(checkpoint, spec, recipe, goal):
    if goal != "quantize" or not format_of(recipe).in_blocks:
        raise Unavailable(_("the recipe writes no GGUF"))
    types = planned_types(with_mixture(recipe, spec), spec)
    swapped = [t for t in types if t.wanted != t.given]
    if swapped:
        kinds = Counter((t.wanted, t.given) for t in swapped)
        yield finding(
            _(
                "256 does not divide in_features {width}: {n} of {all} linears get another type ({types}): {bits:.2f} "
                "bits a weight in them all",
                width=swapped[0].in_features,
                n=len(swapped),
                all=len(types),
                types=", ".join(f"{count} {new} for {old}" for (old, new), count in kinds.most_common()),
                bits=8 * sum(t.nbytes for t in types) / sum(t.weights for t in types),
            ),
            at=Place("", tensor=f"{swapped[0].linear}.weight"),
            evidence={"swapped": len(swapped), "linears": len(types)},
            advice=_("take it as it is, or --scheme Q4_0, which fits every multiple of 32"),
        )


def _planned():
    case = tiny(only_in("llama", "qwen2", "mistral", why="it is not written as GGUF"))
    case.recipe = Recipe(format="gguf", bits=4, group_size=32, sym=False, goal="quantize")
    return case


def bad():
    return _planned(), (
        "256 does not divide in_features 128: 14 of 14 linears get another type (12 Q5_0 for Q4_K, 2 Q8_0 for Q6_K): "
        "5.92 bits a weight in them all"
    )


def good():
    case = _planned()
    case.recipe = Recipe(format="gguf", bits=8, group_size=32, sym=False, goal="quantize")
    return case
