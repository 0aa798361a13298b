"""C152 dtype-against-tensors: config.json states another type than the weights are stored in.

Why: readers cast to the stated type. From bfloat16 to float16 large values become Inf and small ones 0; from float32
the file is twice as large as it must be, and memory is planned for the wrong size.

Seen as:
- PyTorch: `expected m1 and m2 to have the same dtype`
- llama.cpp: `cannot be represented within F16`

Do: state the type that is stored; or save the model again in the stated type, if that is what was meant.

False alarms: models stored in more than one type are judged by what most of their linears' bytes are in.

Fix safety: safe: with the stored type stated, no value changes on loading.

Sources: transformers src/transformers/modeling_utils.py (`dtype="auto"` takes the stated type); ggml-org/llama.cpp
issue 14788.
"""

from doctor.lint.rule import Fix, Place, SetJson, finding, rule
from doctor.lint.testing import tiny

STORED = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
SPELLINGS = {"half": "float16", "float": "float32", "double": "float64"}


@rule("C152", "warning", implied_by=("C147", "F056"))
def dtype_against_tensors(checkpoint, spec, tensors, config, quantization_block):
    if quantization_block is not None or not spec.linears:
        return
    amounts: dict[str, int] = {}
    for linear in spec.linears:
        info = tensors[linear.tensor]
        amounts[info.dtype.name] = amounts.get(info.dtype.name, 0) + info.nbytes
    stored = STORED.get(max(amounts, key=amounts.get))
    for key in ("dtype", "torch_dtype"):
        for block, pointer in ((config, f"/{key}"), (config.get(spec.text_key) or {}, f"/{spec.text_key}/{key}")):
            said = block.get(key)
            if stored is None or not isinstance(said, str) or said == "auto":
                continue
            plain = said.removeprefix("torch.")
            if SPELLINGS.get(plain, plain) != stored:
                yield finding(
                    f"{key} is {said} in config.json; the linears are stored in {stored}",
                    at=Place("config.json", pointer=pointer, note=f"stored in {stored}"),
                    evidence={"said": said, "stored": stored},
                    fix=Fix(f'set "{key}": "{stored}"', (SetJson("config.json", pointer, stored, said),)),
                )


def bad():
    case = tiny()
    case.config["torch_dtype"] = "float16"
    return case, "torch_dtype is float16 in config.json; the linears are stored in bfloat16"


def good():
    return tiny()
