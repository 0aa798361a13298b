"""F005 foreign-format: file named .safetensors has another format.

Why: somebody renamed a PyTorch or GGUF file. Readers take its first eight bytes for a length and refuse it. A reader
that falls back to unpickling would run code from the file.

Seen as:
- safetensors: `Error while deserializing header: HeaderTooLarge`
- safetensors: `Error while deserializing header: header too large`

Do: convert the file on a machine where you may run its code, or download the safetensors version.

False alarms: none known: the first bytes identify the format.

Fix safety: safe with `--from` where evidence shows that the donor's file is the lost one: the hash in a Git LFS
pointer, another shard with the same hash, or the remaining part of this file. Unsafe without such evidence. Manual
without `--from`: doctor never opens a pickle.

Sources: safetensors safetensors/src/tensor.rs (0.8); Python docs of `pickle`, warning on untrusted data.
"""

from doctor.lint.rule import Place, _, finding, from_base, rule
from doctor.lint.testing import tiny


@rule("F005", "error")
def foreign_format(shard, base):
    for defect in shard.defects:
        if defect.kind in ("pickle", "gguf"):
            yield finding(
                _("{file} is {detail}", file=shard.name, detail=defect.detail),
                at=Place(shard.name, byte=0),
                evidence={"kind": defect.kind},
                fix=from_base(
                    base, shard.name, _("take the safetensors file from the model's page; doctor never unpickles")
                ),
            )


def bad():
    case = tiny()
    case.files["model.safetensors"] = b"PK\x03\x04" + b"archive/data.pkl" * 8
    return case, "model.safetensors is a zip archive (a torch pickle?), not a shard"


def good():
    return tiny()
