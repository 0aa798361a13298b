"""C155 dtype-not-stated: config.json states no dtype.

Why: transformers 4 then loads the weights in float32, at twice the memory; other readers use the dtype in the files.
Nothing breaks.

Seen as:
- PyTorch: `torch.OutOfMemoryError: CUDA out of memory`

Do: state the stored dtype.

False alarms: older models never had the key, so the severity is only info.

Fix safety: safe: the stored dtype is stated.

Sources: transformers 4 src/transformers/modeling_utils.py (default float32); sgl-project/mini-sglang issue 38.
"""

from doctor.lint.rule import MISSING, Fix, Place, SetJson, _, finding, rule
from doctor.lint.testing import tiny

STORED = {"F16": "float16", "BF16": "bfloat16"}


@rule(
    "C155",
    "info",
    implied_by=(
        "C147",
        "O620",
    ),
)
def dtype_not_stated(checkpoint, spec, tensors, config, files):
    inner = spec.section(config)
    if (
        any(isinstance(block.get(key), str) for block in (config, inner) for key in ("dtype", "torch_dtype"))
        or not spec.linears
    ):
        return
    kinds = {tensors[linear.tensor].dtype.name for linear in spec.linears}
    stored = STORED.get(next(iter(kinds))) if len(kinds) == 1 else None
    if stored is not None:
        yield finding(
            _("config.json states no dtype; the linears are stored in {stored}", stored=stored),
            at=Place("config.json", pointer="/torch_dtype"),
            evidence={"stored": stored},
            fix=Fix(
                _('set "{key}": "{value}"', key="torch_dtype", value=stored),
                (SetJson("config.json", "/torch_dtype", stored, config.get("torch_dtype", MISSING)),),
            ),
        )


def bad():
    case = tiny()
    del case.config["torch_dtype"]
    return case, "config.json states no dtype; the linears are stored in bfloat16"


def good():
    return tiny()
