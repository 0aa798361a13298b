"""O614 packed-and-plain: linear is stored both packed and as a plain weight.

Why: an export written over an old checkpoint leaves both. Readers use one or the other, the file is up to five times
larger than needed, and the two may differ.

Do: drop the plain weight, if the packed one is the intended output.

False alarms: none; no format stores both.

Fix safety: unsafe: it discards the only full-precision copy in this directory.

Sources: AutoGPTQ/AutoGPTQ issue 306 (an old shard mixed with a new index gave NaN).
"""

from doctor.lint.rule import DropTensor, Fix, Place, _, finding, rule
from doctor.lint.testing import encode, np, tiny_gptq


@rule("O614", "warning")
def packed_and_plain(checkpoint, quantization, layout, tensors):
    for linear in layout.linears:
        plain = tensors.get(f"{linear.name}.weight")
        if layout.quantized and plain is not None:
            yield finding(
                _("{tensor} is stored as a plain weight and packed", tensor=plain.name),
                at=Place(plain.shard, tensor=plain.name),
                evidence={"bytes": plain.nbytes},
                fix=Fix(_("drop the plain weight"), (DropTensor(plain.name),), "unsafe"),
                advice=_("drop it, if the packed form is the intended output"),
            )


def bad():
    case = tiny_gptq()
    name = case.packed("down") + ".weight"
    case.tensors[name], case.dtypes[name] = encode(np.sin(np.arange(8192.0)).reshape(64, 128), "BF16"), "BF16"
    return case, f"{name} is stored as a plain weight and packed"


def good():
    return tiny_gptq()
