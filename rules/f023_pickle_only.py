"""F023 pickle-only: the weights are there only as pickle or as a format of another program.

Why: opening a pickle runs whatever code stands in it, so doctor does not. GGUF and the like are finished products, not
sources.

Seen as:
- transformers: `Due to a serious vulnerability issue in `torch.load`, even with `weights_only=True``
- transformers: `no file named model.safetensors`

Do: convert on a machine where that risk is yours: load with transformers and `save_pretrained(...,
safe_serialization=True)`.

False alarms: none known; a directory with safetensors beside the pickles is not counted.

Fix safety: manual; nothing is unpickled here.

Sources: Python docs of `pickle`; CVE-2025-32434 (torch.load with weights_only=True).
"""

from doctor.lint.rule import Fix, Place, finding, rule
from doctor.lint.testing import tiny

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
OTHERS = (".gguf", ".h5", ".msgpack", ".npz")


@rule("F023", "error")
def pickle_only(checkpoint, files):
    if any(n.endswith(".safetensors") for n in files):
        return
    found = sorted(n for n in files if n.endswith(PICKLES + OTHERS) and n != "training_args.bin")
    if found:
        kind = "pickle" if found[0].endswith(PICKLES) else found[0].rpartition(".")[2]
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        yield finding(
            f"the weights are there only as {kind}: {found[0]}{more}",
            at=Place(found[0]),
            evidence={"files": len(found)},
            fix=Fix("save the model as safetensors, on a machine where its code may run", (), "manual"),
        )


def bad():
    case = tiny()
    case.damage.append(lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"))
    return case, "the weights are there only as pickle: pytorch_model.bin"


def good():
    return tiny()
