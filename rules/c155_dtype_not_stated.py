"""C155 dtype-not-stated: config.json does not say in which type the weights are meant to run.

Why: transformers 4 then loads them in float32, at twice the memory; others look into the files. Nothing breaks.

Seen as:
- PyTorch: `torch.OutOfMemoryError: CUDA out of memory`

Do: state the type that is stored.

False alarms: older models never had the key; this is information only.

Fix safety: safe; the stored type is stated.

Sources: transformers 4 src/transformers/modeling_utils.py (default float32); sgl-project/mini-sglang issue 38.
"""

from doctor.lint.rule import MISSING, Fix, Place, SetJson, finding, rule
from doctor.lint.testing import tiny

STORED = {"F16": "float16", "BF16": "bfloat16"}


@rule("C155", "info", implied_by=("C147",))
def dtype_not_stated(checkpoint, spec, tensors, config):
    inner = config.get(spec.text_key) or {}
    if (
        any(isinstance(block.get(key), str) for block in (config, inner) for key in ("dtype", "torch_dtype"))
        or not spec.linears
    ):
        return
    kinds = {tensors[linear.tensor].dtype.name for linear in spec.linears}
    stored = STORED.get(next(iter(kinds))) if len(kinds) == 1 else None
    if stored is not None:
        yield finding(
            f"config.json states no dtype; the linears are stored in {stored}",
            at=Place("config.json", pointer="/torch_dtype"),
            evidence={"stored": stored},
            fix=Fix(
                f'set "torch_dtype": "{stored}"',
                (SetJson("config.json", "/torch_dtype", stored, config.get("torch_dtype", MISSING)),),
            ),
        )


def bad():
    case = tiny()
    del case.config["torch_dtype"]
    return case, "config.json states no dtype; the linears are stored in bfloat16"


def good():
    return tiny()
