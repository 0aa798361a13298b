"""O640 gguf-nonfinite: a tensor of a GGUF file holds NaN or Inf.

Why: one NaN reaches every later value of the reply. In a block type it is the float16 scale that is NaN or Inf, and with
it all 32 or 256 values of the block: a scale past 65504 was stored as Inf, or the weights had NaN before.

Seen as:
- llama.cpp: `ggml_validate_row_data: found nan value at block`
- llama.cpp: `ggml_validate_row_data: found inf value at block`

Do: run `doctor check` on the original, and convert it again.

False alarms: none known.

Fix safety: manual; what the values were is not in the file.

Sources: ggml-org/llama.cpp ggml/src/ggml-quants.c (ggml_validate_row_data).
"""

from doctor.lint.rule import Place, _, finding, plural, rule
from doctor.lint.testing import np, tiny_gguf


@rule("O640", "error")
def gguf_nonfinite(checkpoint, gguf_models, gguf_counts):
    for model in gguf_models:
        for name, counts in gguf_counts[model.name].items():
            if not counts.nonfinite:
                continue
            kind = model.tensors[name].type
            block = kind.block if kind else 1
            yield finding(
                plural(
                    "{tensor} ({type}): {n:,} block of {block} has a scale that is NaN or Inf, first block {first:,}",
                    "{tensor} ({type}): {n:,} blocks of {block} have a scale that is NaN or Inf, first block {first:,}",
                    counts.nonfinite,
                    tensor=name,
                    type=kind.name if kind else "",
                    block=block,
                    first=counts.first,
                )
                if block > 1
                else _(
                    "{tensor} ({type}): {n:,} values are NaN or Inf, first {first:,}",
                    tensor=name,
                    type=kind.name if kind else "",
                    n=counts.nonfinite,
                    first=counts.first,
                ),
                at=Place(counts.file, tensor=name),
                evidence={"nonfinite": counts.nonfinite, "first": counts.first},
                advice=_("check the original, and convert it again"),
            )


def bad():
    case = tiny_gguf()
    words = np.zeros((64, 4, 34), np.uint8)
    words[:, :, 1] = 0x2C
    words[3, 2, 1] = 0x7C
    case.types["blk.0.ffn_down.weight"] = ("Q8_0", words.tobytes())
    return case, "blk.0.ffn_down.weight (Q8_0): 1 block of 32 has a scale that is NaN or Inf, first block 14"


def good():
    return tiny_gguf()


def more():
    """Cases whose fixes the example above does not show."""
    case = tiny_gguf()
    case.values["output_norm.weight"][7] = np.nan
    yield case
