"""O609 v1-zero-wraps: zero points of an asymmetric GPTQ v1 file wrap around.

Why: version 1 stores a zero point minus one, so zero point 0 would be -1. One writer borrows from the next field,
another overwrites seven neighbours with ones, and readers disagree about a stored 15: some read 0, others 16.

Do: quantize again with sym=true, or write gptq_v2, which stores zero points unchanged.

False alarms: readers that add 1 without wrapping, for files whose zero point is 16.

Fix safety: no fix: the file does not say which of the two is right.

Sources: AutoGPTQ/AutoGPTQ PR 640; huggingface/text-generation-inference PR 2120; ModelCloud/GPTQModel
gptqmodel/utils/model.py.
"""

from doctor.lint.rule import _, finding, rule
from doctor.lint.testing import np, tiny_gptq


@rule("O609", "warning", certainty="likely")
def v1_zero_wraps(checkpoint, quantization, packed_words):
    if not quantization.format.zero_offset or quantization.sym:
        return
    tail = f".{quantization.format.zeros}"
    for name, words in packed_words.items():
        if name.endswith(tail) and words.full_fields and quantization.bits_of(name.removesuffix(tail)) == 4:
            yield finding(
                _(
                    "{n:,} of {count:,} words of {tensor} hold a zero point stored as 15, which wraps in version 1",
                    n=words.full_fields,
                    count=words.count,
                    tensor=name,
                ),
                evidence={"words": words.full_fields, "of": words.count},
                advice=_("quantize with sym=true or write gptq_v2"),
            )


def bad():
    case = tiny_gptq()
    case.config["quantization_config"]["sym"] = False
    name = case.packed("down") + ".qzeros"
    case.tensors[name][0, 0] = np.uint32(0x777777F7).view(np.int32)
    return case, f"1 of 32 words of {name} hold a zero point stored as 15, which wraps in version 1"


def good():
    case = tiny_gptq()
    case.config["quantization_config"]["sym"] = False
    return case
