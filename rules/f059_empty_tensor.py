"""F059 empty-tensor: weight is an empty tensor.

Why: DeepSpeed ZeRO-3 keeps each weight in parts and leaves an empty placeholder on the module. Saving the placeholders
gives a small checkpoint whose names look complete.

Seen as:
- PyTorch: `copying a param with shape torch.Size([0]) from checkpoint`
- transformers: `size mismatch for`

Do: gather the weights: `zero_to_fp32.py` in the training directory, or `stage3_gather_16bit_weights_on_model_save`.

False alarms: none known among weights; empty buffers that no family needs are not counted.

Fix safety: unsafe, and only with `--from`: the weights are taken from the donor. Else manual: the values are in the
training directory.

Sources: deepspeedai/DeepSpeed deepspeed/utils/zero_to_fp32.py.
"""

from doctor.lint.rule import Fix, Place, _, finding, plural, rule
from doctor.lint.testing import never_in, tiny


@rule("F059", "error")
def empty_tensor(checkpoint, tensors, base):
    found = sorted(n for n, i in tensors.items() if n.endswith((".weight", ".bias")) and i.numel == 0)
    if found:
        info = tensors[found[0]]
        yield finding(
            plural(
                "{n:,} of {total:,} tensors is empty: {first} {shape}",
                "{n:,} of {total:,} tensors are empty; the first is {first} {shape}",
                len(found),
                total=len(tensors),
                first=found[0],
                shape=list(info.shape),
            ),
            at=Place(info.shard, tensor=found[0]),
            evidence={"tensors": len(found)},
            fix=_from_base(base, found),
        )


def _from_base(base, names):
    """All of them as the donor stores them, if it has every one."""
    donor = base.checkpoint.tensors if base is not None else {}
    offers = [base.offer(n, donor[n].dtype.name, donor[n].shape) for n in names if n in donor and donor[n].numel]
    if len(offers) < len(names) or None in offers:
        return Fix(_("gather the weights (zero_to_fp32.py) and save again"), (), "manual")
    title = plural("take {n:,} tensor from {base}", "take {n:,} tensors from {base}", len(offers), base=base.text)
    return Fix(title, tuple(offers), "unsafe")


def bad():
    import numpy as np

    case = tiny(never_in("opt", why="its last norm has another name and a bias"))
    case.tensors["model.norm.weight"] = np.zeros((0,), np.uint16)
    return case, "1 of 21 tensors is empty: model.norm.weight [0]"


def good():
    return tiny()
