"""C152 dtype-against-tensors: dtype in config.json does not match the weights.

Why: readers cast to the stated dtype. From bfloat16 to float16, large values become Inf and small ones 0. From float32,
the file is twice as large as necessary, and memory is planned for the wrong size.

Seen as:
- PyTorch: `expected m1 and m2 to have the same dtype`
- llama.cpp: `cannot be represented within F16`

Do: state the stored dtype; or save the model again in the stated dtype, if that was intended.

False alarms: models stored in more than one dtype are judged by the dtype of most of their linears' bytes.

Fix safety: safe: with the stored dtype stated, loading changes no value.

Sources: transformers src/transformers/modeling_utils.py (`dtype="auto"` takes the stated type); ggml-org/llama.cpp
issue 14788.
"""

from doctor.lint.rule import Fix, Place, SetJson, _, finding, rule, stored_float
from doctor.lint.testing import tiny

SPELLINGS = {"half": "float16", "float": "float32", "double": "float64"}


@rule("C152", "warning", implied_by=("C147", "C173", "O620", "F056"))
def dtype_against_tensors(checkpoint, spec, tensors, config, quantization_block):
    if quantization_block is not None or not spec.linears:
        return
    amounts: dict[str, int] = {}
    for linear in spec.linears:
        info = tensors[linear.tensor]
        amounts[info.dtype.name] = amounts.get(info.dtype.name, 0) + info.nbytes
    stored = stored_float(max(amounts, key=amounts.__getitem__))
    for key in ("dtype", "torch_dtype"):
        inner = {spec.at(key): spec.section(config)} if spec.text_key else {}
        for pointer, block in {f"/{key}": config, **inner}.items():
            stated = block.get(key)
            if stored is None or not isinstance(stated, str) or stated == "auto":
                continue
            plain = stated.removeprefix("torch.")
            if SPELLINGS.get(plain, plain) != stored:
                yield finding(
                    _(
                        "{key} is {stated} in config.json; the linears are stored in {stored}",
                        key=key,
                        stated=stated,
                        stored=stored,
                    ),
                    at=Place("config.json", pointer=pointer, note=_("stored in {dtype}", dtype=stored)),
                    evidence={"said": stated, "stored": stored},
                    fix=Fix(
                        _('set "{key}": "{value}"', key=key, value=stored),
                        (SetJson("config.json", pointer, stored, stated),),
                    ),
                )


def bad():
    case = tiny()
    case.config["torch_dtype"] = "float16"
    return case, "torch_dtype is float16 in config.json; the linears are stored in bfloat16"


def good():
    return tiny()
