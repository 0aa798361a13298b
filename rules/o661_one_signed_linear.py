"""O661 one-signed-linear: all zero points of a linear stand at one end of its codes.

Why: the zero point is the code that stands for the weight 0. Where it is the smallest code in every group no weight of
the linear is below 0, where it is the largest none is above. Trained linears have both signs in nearly every group;
zero points like these were lost, or written by a tool that means others by them. Clients load the file and say nothing.

Do: take the zero points from another copy of the file, or quantize again.

False alarms: a linear that really has one sign.

Fix safety: unsafe, and only with `--from`: the zero points are taken from another copy of the quantized checkpoint.

Sources: run with transformers 5.23 and gptqmodel: an AWQ file whose qzeros of one linear were set to 0 loads, and its
logits are others.
"""

from doctor.lint.rule import Place, _, finding, rule, tensor_from_base
from doctor.lint.testing import np, tiny_gptq


@rule("O661", "warning", certainty="likely", implied_by=("O612", "O618"))
def one_signed_linear(checkpoint, quantization, packed_words, tensors, base):
    form = quantization.format
    if quantization.sym or form.zero_offset or not form.zeros:  # O657 and O609 judge those
        return
    for name, words in packed_words.items():
        kinds = list(words.kinds or ())
        if name.endswith(f".{form.zeros}") and len(kinds) == 1 and kinds[0] in (0, 0xFFFFFFFF):
            yield finding(
                _("all zero points in {tensor} are 0: none of its weights is below 0", tensor=name)
                if kinds[0] == 0
                else _("all zero points in {tensor} are the largest code: none of its weights is above 0", tensor=name),
                at=Place(tensors[name].shard, tensor=name),
                evidence={"word": f"0x{kinds[0]:08x}", "words": words.count},
                fix=tensor_from_base(base, tensors[name]),
                advice=_("take the zero points from another copy of the file, or quantize again"),
            )


def bad():
    case = good()
    name = case.packed("down") + ".qzeros"
    case.tensors[name] = np.zeros_like(case.tensors[name])
    return case, f"all zero points in {name} are 0: none of its weights is below 0"


def good():
    case = tiny_gptq(version="gptq_v2")
    case.config["quantization_config"]["sym"] = False
    return case
