"""F023 pickle-only: weights exist only as pickle or in another program's format.

Why: opening a pickle runs any code that it contains, so doctor does not open it. GGUF and similar files are finished
products, not sources.

Seen as:
- transformers: `Due to a serious vulnerability issue in `torch.load`, even with `weights_only=True``
- transformers: `no file named model.safetensors`

Do: convert on a machine where you accept that risk: load with transformers and `save_pretrained(...,
safe_serialization=True)`.

False alarms: none known; a directory that also holds safetensors files is not counted.

Fix safety: manual: doctor never unpickles.

Sources: Python docs of `pickle`; CVE-2025-32434 (torch.load with weights_only=True).
"""

from doctor.lint.rule import Fix, Place, _, finding, rule
from doctor.lint.testing import tiny

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
OTHERS = (".gguf", ".h5", ".msgpack", ".npz")


@rule("F023", "error")
def pickle_only(checkpoint, files, goal=None):
    if any(n.endswith(".safetensors") for n in files) or (checkpoint.gguf and goal != "quantize"):
        return
    found = sorted(n for n in files if n.endswith(PICKLES + OTHERS) and n != "training_args.bin")
    if found:
        kind = "pickle" if found[0].endswith(PICKLES) else found[0].rpartition(".")[2]
        yield finding(
            _("the weights exist only as {kind}: {file} and {more} more", kind=kind, file=found[0], more=len(found) - 1)
            if len(found) > 1
            else _("the weights exist only as {kind}: {file}", kind=kind, file=found[0]),
            at=Place(found[0]),
            evidence={"files": len(found)},
            fix=Fix(_("save the model as safetensors, on a machine where its code may run"), (), "manual"),
        )


def bad():
    case = tiny()
    case.damage.append(lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"))
    return case, "the weights exist only as pickle: pytorch_model.bin"


def good():
    return tiny()
