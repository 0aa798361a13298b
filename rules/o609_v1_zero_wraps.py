"""O609 v1-zero-wraps: an asymmetric file of version 1 holds zero points that wrap around.

Why: version 1 stores a zero point minus one. Zero point 0 would be -1: one writer borrows from the next
field, another overwrites seven neighbours with ones, and readers disagree about a stored 15, which is 0 to
some and 16 to others.

Do: quantize again with sym=true, or write gptq_v2, which stores zero points as they are.

False alarms: readers that add 1 without wrapping, of files whose zero point is meant to be 16.

Fix safety: no fix: which of the two was meant is not in the file.

Sources: AutoGPTQ/AutoGPTQ PR 640; huggingface/text-generation-inference PR 2120; ModelCloud/GPTQModel
gptqmodel/utils/model.py.
"""

from doctor.lint.rule import finding, rule
from doctor.lint.testing import np, tiny_gptq


@rule("O609", "warning", certainty="likely")
def v1_zero_wraps(checkpoint, quantization, packed_words):
    if not quantization.format.zero_offset or quantization.sym:
        return
    tail = f".{quantization.format.zeros}"
    for name, words in packed_words.items():
        if name.endswith(tail) and words.full_fields and quantization.bits_of(name.removesuffix(tail)) == 4:
            yield finding(
                f"{words.full_fields:,} of {words.count:,} words of {name} hold a zero point stored as 15, which wraps in version 1",
                evidence={"words": words.full_fields, "of": words.count},
                advice="quantize with sym=true or write gptq_v2",
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
