"""F004 zero-filled-file: a weight file begins with zeros where its header must stand.

Why: downloaders reserve the whole size first and fill it later; when they stop, size and name look right.

Seen as:
- safetensors: `Error while deserializing header: invalid JSON in header`
- PyTorch: `UnpicklingError: invalid load key, '\\x00'`

Do: fetch the file again.

False alarms: none known: eight zero bytes say that the header is empty, which no writer produces.

Fix safety: safe with `--from`, where something shows that the base's file is the lost one: the hash in a git-lfs
pointer, another shard with the same hash, or the part that is left. Unsafe where nothing does. Without `--from` manual;
the data are elsewhere.

Sources: safetensors safetensors/src/tensor.rs (0.8): N = 0 is invalid JSON.
"""

from doctor.lint.rule import Place, finding, from_base, rule
from doctor.lint.testing import tiny


@rule("F004", "error")
def zero_filled_file(shard, base):
    for defect in shard.defects:
        if defect.kind == "zero-filled":
            yield finding(
                f"{shard.name}: {defect.detail}",
                at=Place(shard.name, byte=0),
                evidence={"bytes": shard.size},
                fix=from_base(base, shard.name, f"download or copy {shard.name} again"),
            )


def bad():
    case = tiny()
    case.files["model.safetensors"] = bytes(4096)
    return case, "model.safetensors: the first 512 bytes are zero: a preallocated file that was never filled"


def good():
    return tiny()
