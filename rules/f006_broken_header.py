"""F006 broken-header: a weight file's header cannot be read.

Why: without the header no tensor has a name, a type or a place. A damaged disk, a text-mode transfer or a wrong tool
wrote it.

Seen as:
- safetensors: `Error while deserializing header: invalid JSON in header`
- safetensors: `Error while deserializing header: invalid UTF-8 in header`
- safetensors: `Error while deserializing header: header too large`
- safetensors: `Error while deserializing header: InvalidHeader`
- safetensors: `Error while deserializing header: InvalidHeaderDeserialization`
- safetensors: `Error while deserializing header: InvalidHeaderStart`

Do: fetch the file again; if the source is broken too, write it again with safetensors' own `save_file`.

False alarms: none known: the format's own reader refuses the same files.

Fix safety: safe with `--from`, where something shows that the base's file is the lost one: the hash in a git-lfs
pointer, another shard with the same hash, or the part that is left. Unsafe where nothing does. Without `--from` manual;
names and places of tensors are not invented.

Sources: safetensors safetensors/src/tensor.rs (0.8).
"""

import struct

from doctor.lint.rule import Place, finding, from_base, rule
from doctor.lint.testing import tiny

KINDS = ("header-length", "header-json", "metadata", "unreadable")


@rule("F006", "error")
def broken_header(shard, base):
    for defect in shard.defects:
        if defect.kind in KINDS:
            yield finding(
                f"{shard.name}: {defect.detail}",
                at=Place(shard.name, byte=0),
                evidence={"kind": defect.kind},
                fix=from_base(base, shard.name, f"download or copy {shard.name} again"),
            )


def bad():
    case = tiny()
    case.files["model.safetensors"] = struct.pack("<Q", 16) + b'["no object"]'.ljust(16)
    return case, "model.safetensors: header is a JSON list; it must be an object"


def good():
    return tiny()
