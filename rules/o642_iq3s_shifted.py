"""O642 iq3s-shifted: IQ3_S blocks whose values stand one place too early.

Why: ggml's quantizer of IQ3_S (seen in 0.25.1) does not move on past 32 values that are all zero, so every later block of
the same 256 is stored one place too early and the last one is left empty: a relative error of 1.2 to 1.5 there instead
of 0.16. Rows with 32 zeros come from padding and pruning.

Do: quantize again with another type (IQ3_XXS, Q3_K and IQ4_XS are not affected), or take the zeros out first.

False alarms: a block whose last 32 values are the smallest positive ones of the lattice, all with plus; by chance that is
one in 10^21.

Fix safety: manual; the values must be quantized again.

Sources: ggml-org/llama.cpp ggml/src/ggml-quants.c (quantize_row_iq3_s_impl); executed, fixtures/vectors/gguf_blocks.json.
"""

from doctor.lint.rule import Place, _, finding, rule
from doctor.lint.testing import np, tiny_gguf


@rule("O642", "warning", certainty="likely")
def iq3s_shifted(checkpoint, gguf_models, gguf_counts):
    for model in gguf_models:
        for name, counts in gguf_counts[model.name].items():
            if counts.shifted:
                yield finding(
                    _(
                        "{tensor}: {n:,} of {all:,} IQ3_S blocks are written one place too early after 32 zeros",
                        tensor=name,
                        n=counts.shifted,
                        all=model.tensors[name].numel // 256,
                    ),
                    at=Place(counts.file, tensor=name),
                    evidence={"blocks": counts.shifted},
                    advice=_("quantize again with another type than IQ3_S"),
                )


def bad():
    case = tiny_gguf()
    words = np.full((2, 110), 0x5A, np.uint8)
    words[:, :2] = 0, 0x2C
    words[1, 58:66] = words[1, 73] = words[1, 102:106] = 0
    case.values["blk.0.ffn_extra.weight"] = np.zeros((1, 512), "<f4")
    case.types["blk.0.ffn_extra.weight"] = ("IQ3_S", words.tobytes())
    return case, "blk.0.ffn_extra.weight: 1 of 2 IQ3_S blocks are written one place too early after 32 zeros"


def good():
    return tiny_gguf()
