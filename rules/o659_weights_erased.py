"""O659 weights-erased: all scales of a linear are 0, though its codes differ.

Why: a weight is its code times its scale, so the linear gives 0, or its bias, whatever it reads. The codes show that it
had weights: packing, a merge or an upload lost the scales. Every client loads such a file, and the text suffers or falls
apart, by the linear that is gone.

Do: take the scales from another copy of the file, or quantize again.

False alarms: none. Codes that are all one number beside scales of 0 may be a pruned linear, which O618 and O607 tell as warnings.

Fix safety: unsafe, and only with `--from`: the scales are taken from another copy of the quantized checkpoint.

Sources: run with transformers 5.23 and compressed-tensors, GPTQ, AWQ, FP8 and INT8 files whose scales were set to 0: all
load, none says a word, and their logits are others.
"""

from doctor.lint.rule import LOST_DATA, Fix, Place, Unavailable, _, finding, plural, rule, scale_tails
from doctor.lint.testing import np, tiny_gptq

MORE_TAILS = (".SCB", ".absmax", ".weight_scale_2")  # of rows, of blocks, of whole tensors
DIVISOR = ".weight_global_scale"  # of NVFP4 in compressed-tensors


@rule("O659", "error", implied_by=LOST_DATA)
def weights_erased(checkpoint, every_repeated_code, every_n_zero, tensors, base):
    floats = [n for n in every_n_zero if n.endswith(".weight") and tensors[n].dtype.bits == 8]
    if not every_repeated_code and not floats:
        raise Unavailable(_("no tensor holds packed codes"))
    differ = {name for name, code in every_repeated_code.items() if code is None}
    lost: list[str] = []
    divided: list[str] = []
    for name in sorted(differ.union(n for n in floats if every_n_zero[n] < tensors[n].numel)):
        owners = (name.rpartition(".")[0], name)  # bitsandbytes: weight.absmax belongs to weight
        for scales in (f"{owner}{tail}" for owner in owners for tail in (*scale_tails(), *MORE_TAILS, DIVISOR)):
            if 0 < every_n_zero.get(scales, 0) == tensors[scales].numel:
                (divided if scales.endswith(DIVISOR) else lost).append(scales)
    if lost:
        message = plural(
            "{n:,} linear decodes to 0: all scales in {first} are 0, and its codes differ",
            "{n:,} linears decode to 0: all their scales are 0, and their codes differ (first {first})",
            len(lost),
            first=min(lost),
        )
        yield _zeros(message, lost, tensors, base)
    if divided:
        message = plural(
            "{n:,} linear decodes to no number: its {part}, which divides its weights, is 0 ({first})",
            "{n:,} linears decode to no number: their {part}, which divides their weights, is 0 (first {first})",
            len(divided),
            first=min(divided),
            part=DIVISOR[1:],
        )
        yield _zeros(message, divided, tensors, base)


def _zeros(message, names, tensors, base):
    first = min(names)
    offers = [base.offer(name, tensors[name].dtype.name, tensors[name].shape) for name in names] if base else [None]
    return finding(
        message,
        at=Place(tensors[first].shard, tensor=first),
        evidence={"linears": len(names), "tensors": sorted(names)[:100]},
        fix=Fix(_("take them from {base}", base=base.text), tuple(offers), "unsafe") if all(offers) else None,
        advice=_("take the scales from another copy of the file, or quantize again"),
    )


def bad():
    case = tiny_gptq()
    name = case.packed("down") + ".scales"
    case.tensors[name] = np.zeros_like(case.tensors[name])
    return case, f"1 linear decodes to 0: all scales in {name} are 0, and its codes differ"


def good():
    return tiny_gptq()
