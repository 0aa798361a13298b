"""F005 foreign-format: a file called .safetensors holds another format.

Why: somebody renamed a PyTorch or GGUF file. Readers take the first eight bytes for a length and refuse; a reader that
falls back to unpickling would run code from the file.

Seen as:
- safetensors: `Error while deserializing header: HeaderTooLarge`
- safetensors: `Error while deserializing header: header too large`

Do: convert the file on a machine where you may run its code, or fetch the safetensors version.

False alarms: none known: the first bytes name the format.

Fix safety: safe with `--from`, where something shows that the base's file is the lost one: the hash in a git-lfs
pointer, another shard with the same hash, or the part that is left. Unsafe where nothing does. Without `--from` manual;
a pickle is never opened here.

Sources: safetensors safetensors/src/tensor.rs (0.8); Python docs of `pickle`, warning on untrusted data.
"""

from doctor.lint.rule import Place, finding, from_base, rule
from doctor.lint.testing import tiny


@rule("F005", "error")
def foreign_format(shard, base):
    for defect in shard.defects:
        if defect.kind in ("pickle", "gguf"):
            yield finding(
                f"{shard.name} is {defect.detail}",
                at=Place(shard.name, byte=0),
                evidence={"kind": defect.kind},
                fix=from_base(
                    base, shard.name, "take the safetensors file from the model's page; doctor never unpickles"
                ),
            )


def bad():
    case = tiny()
    case.files["model.safetensors"] = b"PK\x03\x04" + b"archive/data.pkl" * 8
    return case, "model.safetensors is a zip archive (a torch pickle?), not a shard"


def good():
    return tiny()
