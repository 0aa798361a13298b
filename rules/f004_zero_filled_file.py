"""F004 zero-filled-file: weight file starts with zeros instead of a header.

Why: download tools reserve the full size first and fill the file later. When they stop, size and name look right.

Seen as:
- safetensors: `Error while deserializing header: invalid JSON in header`
- PyTorch: `UnpicklingError: invalid load key, '\\x00'`

Do: download the file again.

False alarms: none known: eight zero bytes mean a header of length 0, which no writer produces.

Fix safety: safe with `--from` where evidence shows that the donor's file is the lost one: the hash in a Git LFS
pointer, another shard with the same hash, or the remaining part of this file. Unsafe without such evidence. Manual
without `--from`: the data is elsewhere.

Sources: safetensors safetensors/src/tensor.rs (0.8): N = 0 is invalid JSON.
"""

from doctor.lint.rule import Place, _, finding, from_base, rule
from doctor.lint.testing import tiny


@rule("F004", "error")
def zero_filled_file(shard, base):
    for defect in shard.defects:
        if defect.kind == "zero-filled":
            yield finding(
                _("{file}: {detail}", file=shard.name, detail=defect.detail),
                at=Place(shard.name, byte=0),
                evidence={"bytes": shard.size},
                fix=from_base(base, shard.name, _("download or copy {file} again", file=shard.name)),
            )


def bad():
    case = tiny()
    case.files["model.safetensors"] = bytes(4096)
    return case, "model.safetensors: the first 512 bytes are zero: a preallocated file that was never filled"


def good():
    return tiny()
