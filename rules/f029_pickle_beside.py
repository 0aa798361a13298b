"""F029 pickle-beside: pickle files lie beside the safetensors files.

Why: opening a pickle runs any code that it contains. doctor does not open them, so what they hold is not judged. A
program that is told to prefer *.bin, or an older one, loads them in place of the safetensors files.

Seen as:
- transformers: `Due to a serious vulnerability issue in `torch.load`, even with `weights_only=True``

Do: leave them out of what you publish. Weights, optimizer states and training arguments are not needed to run the
model.

False alarms: none known; this is a note.

Fix safety: unsafe: the output does not get the files; the source keeps them.

Sources: Python docs of `pickle`; CVE-2025-32434 (torch.load with weights_only=True).
"""

from doctor.lint.rule import DropFile, Fix, Place, _, finding, listed, plural, rule
from doctor.lint.testing import tiny

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@rule("F029", "info")
def pickle_beside(checkpoint, files):
    found = sorted(n for n in files if n.endswith(PICKLES))
    if found and any(n.endswith(".safetensors") for n in files):
        yield finding(
            plural(
                "{n:,} pickle file beside the safetensors files, not opened: {names}",
                "{n:,} pickle files beside the safetensors files, not opened: {names}",
                len(found),
                names=listed([*found[:4], *(["…"] if len(found) > 4 else [])]),
            ),
            at=Place(found[0]),
            evidence={"files": len(found)},
            fix=Fix(_("leave the pickle files out"), tuple(DropFile(name) for name in found), "unsafe"),
        )


def bad():
    case = tiny()
    case.files["training_args.bin"] = b"PK\x03\x04"
    return case, "1 pickle file beside the safetensors files, not opened: training_args.bin"


def good():
    return tiny()
