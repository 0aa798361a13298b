"""F025 duplicate-tensor-name: a header names a tensor twice.

Why: JSON readers keep the last of two equal keys, so the first one's bytes are lost without a word; where the two
ranges differ, the format's reader refuses the file for the hole.

Seen as:
- safetensors: `Error while deserializing header: invalid offset for tensor`

Do: save the model again with safetensors' own writer, or fetch the file again.

False alarms: none known.

Fix safety: safe with `--from`, where something shows that the base's file is the lost one: the hash in a git-lfs
pointer, another shard with the same hash, or the part that is left. Unsafe where nothing does. Without `--from` manual;
which of the two is meant is not known.

Sources: safetensors safetensors/src/tensor.rs (0.8); tried: the same name twice on one range is accepted.
"""

from doctor.lint.rule import Place, finding, from_base, rule
from doctor.lint.testing import shard_bytes, tiny


@rule("F025", "warning")
def duplicate_tensor_name(shard, base):
    for defect in shard.defects:
        if defect.kind == "duplicate-name":
            yield finding(
                f"{defect.tensor} stands twice in the header of {shard.name}; readers keep the last",
                at=Place(shard.name, tensor=defect.tensor),
                fix=from_base(base, shard.name, f"download {shard.name} again, or save the model again"),
            )


def bad():
    import struct

    case = tiny()
    raw = shard_bytes({n: case.tensors[n] for n in sorted(case.tensors)}, case.dtypes)
    length = struct.unpack("<Q", raw[:8])[0]
    text, name = raw[8 : 8 + length].rstrip(), sorted(case.tensors)[-1]
    entry = text[text.index(f'"{name}"'.encode()) : -1]
    text = text[:-1] + b"," + entry + b"}"
    text += b" " * (-len(text) % 8)
    case.files["model.safetensors"] = struct.pack("<Q", len(text)) + text + raw[8 + length :]
    return case, f"{name} stands twice in the header of model.safetensors; readers keep the last"


def good():
    return tiny()
