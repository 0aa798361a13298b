"""F006 broken-header: weight file header cannot be read.

Why: without the header no tensor has a name, a dtype or an offset. A damaged disk, a text-mode transfer or a faulty
tool causes this.

Seen as:
- safetensors: `Error while deserializing header: invalid JSON in header`
- safetensors: `Error while deserializing header: invalid UTF-8 in header`
- safetensors: `Error while deserializing header: header too large`
- safetensors: `Error while deserializing header: InvalidHeader`
- safetensors: `Error while deserializing header: InvalidHeaderDeserialization`
- safetensors: `Error while deserializing header: InvalidHeaderStart`

Do: download the file again. If the source is broken too, write it again with safetensors' own `save_file`.

False alarms: none known: the format's own reader refuses the same files, but for one with more than 65,536 tensors of
under 64 bytes each on average, which no model holds.

Fix safety: safe with `--from` where evidence shows that the donor's file is the lost one: the hash in a Git LFS
pointer, another shard with the same hash, or the remaining part of this file. Unsafe without such evidence. Manual
without `--from`: names and offsets of tensors are not invented.

Sources: safetensors safetensors/src/tensor.rs (0.8).
"""

import struct

from doctor.lint.rule import Place, _, finding, from_base, rule
from doctor.lint.testing import tiny

KINDS = ("header-length", "header-json", "metadata", "unreadable", "crowd")


@rule("F006", "error")
def broken_header(shard, base):
    for defect in shard.defects:
        if defect.kind in KINDS:
            yield finding(
                _("{file}: {detail}", file=shard.name, detail=defect.detail),
                at=Place(shard.name, byte=0),
                evidence={"kind": defect.kind},
                fix=from_base(base, shard.name, _("download or copy {file} again", file=shard.name)),
            )


def bad():
    case = tiny()
    case.files["model.safetensors"] = struct.pack("<Q", 16) + b'["no object"]'.ljust(16)
    return case, "model.safetensors: the header is a JSON list; it must be an object"


def good():
    return tiny()
