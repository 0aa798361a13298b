"""F059 empty-tensor: a weight has no element.

Why: DeepSpeed ZeRO-3 keeps each weight in parts and leaves an empty shell on the module; saving the shells gives a small checkpoint
that looks complete by its names.

Seen as:
- PyTorch: `copying a param with shape torch.Size([0]) from checkpoint`
- transformers: `size mismatch for`

Do: gather the weights: `zero_to_fp32.py` in the training directory, or `stage3_gather_16bit_weights_on_model_save`.

False alarms: none known among weights; empty buffers that no family needs are not counted.

Fix safety: manual; the numbers are in the training directory.

Sources: deepspeedai/DeepSpeed deepspeed/utils/zero_to_fp32.py.
"""

from doctor.rule import Fix, Place, finding, rule
from doctor.testing import tiny


@rule("F059", "error")
def empty_tensor(checkpoint, tensors):
    found = sorted(n for n, i in tensors.items() if i.numel == 0 and n.endswith((".weight", ".bias")))
    if found:
        info = tensors[found[0]]
        verb = "holds no element" if len(found) == 1 else "hold no element"
        yield finding(f"{len(found):,} of {len(tensors):,} tensors {verb}, the first is {found[0]} {list(info.shape)}",
                      at=Place(info.shard, tensor=found[0]), evidence={"tensors": len(found)},
                      fix=Fix("gather the weights (zero_to_fp32.py) and save again", (), "manual"))


def bad():
    import numpy as np

    case = tiny("llama")
    case.tensors["model.norm.weight"] = np.zeros((0,), np.uint16)
    return case, "1 of 21 tensors hold no element, the first is model.norm.weight [0]".replace("hold ", "holds ")


def good():
    return tiny()
