"""F059 empty-tensor: a weight has no element.

Why: DeepSpeed ZeRO-3 keeps each weight in parts and leaves an empty shell on the module; saving the shells gives a
small checkpoint that looks complete by its names.

Seen as:
- PyTorch: `copying a param with shape torch.Size([0]) from checkpoint`
- transformers: `size mismatch for`

Do: gather the weights: `zero_to_fp32.py` in the training directory, or `stage3_gather_16bit_weights_on_model_save`.

False alarms: none known among weights; empty buffers that no family needs are not counted.

Fix safety: unsafe, and only with `--from`: the weights are taken from another copy. Else manual; the numbers are in the
training directory.

Sources: deepspeedai/DeepSpeed deepspeed/utils/zero_to_fp32.py.
"""

from doctor.lint.rule import Fix, Place, finding, rule
from doctor.lint.testing import never_in, tiny


@rule("F059", "error")
def empty_tensor(checkpoint, tensors, base):
    found = sorted(n for n, i in tensors.items() if i.numel == 0 and n.endswith((".weight", ".bias")))
    if found:
        info = tensors[found[0]]
        verb = "holds no element" if len(found) == 1 else "hold no element"
        yield finding(
            f"{len(found):,} of {len(tensors):,} tensors {verb}, the first is {found[0]} {list(info.shape)}",
            at=Place(info.shard, tensor=found[0]),
            evidence={"tensors": len(found)},
            fix=_from_base(base, found),
        )


def _from_base(base, names):
    """All of them as --from has them, whole there."""
    donor = base.checkpoint.tensors if base is not None else {}
    offers = [base.offer(n, donor[n].dtype.name, donor[n].shape) for n in names if n in donor and donor[n].numel]
    if len(offers) < len(names) or None in offers:
        return Fix("gather the weights (zero_to_fp32.py) and save again", (), "manual")
    return Fix(f"take {len(offers):,} tensors from {base.text}", tuple(offers), "unsafe")


def bad():
    import numpy as np

    case = tiny(never_in("opt", why="its last norm has another name and a bias"))
    case.tensors["model.norm.weight"] = np.zeros((0,), np.uint16)
    return case, "1 of 21 tensors hold no element, the first is model.norm.weight [0]".replace("hold ", "holds ")


def good():
    return tiny()
