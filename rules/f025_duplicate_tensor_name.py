"""F025 duplicate-tensor-name: tensor name appears twice in one header.

Why: JSON readers keep the last of two equal keys, so the bytes of the first are lost without a warning. Where the two
ranges differ, the format's reader refuses the file because of the gap.

Seen as:
- safetensors: `Error while deserializing header: invalid offset for tensor`

Do: save the model again with safetensors' own writer, or download the file again.

False alarms: none known.

Fix safety: safe with `--from` where evidence shows that the donor's file is the lost one: the hash in a Git LFS
pointer, another shard with the same hash, or the remaining part of this file. Unsafe without such evidence. Manual
without `--from`: nothing shows which of the two is right.

Sources: safetensors safetensors/src/tensor.rs (0.8); tried: a name that appears twice with the same range is accepted.
"""

from doctor.lint.rule import Place, _, finding, from_base, rule
from doctor.lint.testing import shard_bytes, tiny


@rule("F025", "warning")
def duplicate_tensor_name(shard, base):
    for defect in shard.defects:
        if defect.kind == "duplicate-name":
            yield finding(
                _(
                    "{tensor} appears twice in the header of {file}; readers keep the last",
                    tensor=defect.tensor,
                    file=shard.name,
                ),
                at=Place(shard.name, tensor=defect.tensor),
                fix=from_base(base, shard.name, _("download {file} again, or save the model again", file=shard.name)),
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
    return case, f"{name} appears twice in the header of model.safetensors; readers keep the last"


def good():
    return tiny()
