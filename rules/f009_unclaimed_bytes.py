"""F009 unclaimed-bytes: a weight file holds bytes that belong to no tensor.

Why: the format allows no gap, so that nothing can hide in a file; readers refuse it. Two downloads written into one
file, or a header edited by hand, look like this.

Seen as:
- safetensors: `Error while deserializing header: incomplete metadata, file not fully covered`
- safetensors: `Error while deserializing header: invalid offset for tensor`
- safetensors: `Error while deserializing header: InvalidOffset`

Do: fetch the file again and compare its size with the source's.

False alarms: none known.

Fix safety: safe with `--from`, where something shows that the base's file is the lost one: the hash in a git-lfs
pointer, another shard with the same hash, or the part that is left. Unsafe where nothing does. Without `--from` manual;
the bytes may be a tensor whose entry was lost.

Sources: safetensors safetensors/src/tensor.rs (0.8), `Metadata::validate`.
"""

from doctor.lint.rule import Place, finding, from_base, rule
from doctor.lint.testing import shard_bytes, tiny


@rule("F009", "error", implied_by=("F025",))
def unclaimed_bytes(shard, base):
    for defect in shard.defects:
        if defect.kind in ("hole", "trailing"):
            what = f"{defect.tensor}: {defect.detail}" if defect.tensor else f"{shard.name}: {defect.detail}"
            yield finding(
                what,
                at=Place(shard.name, tensor=defect.tensor, byte=defect.offset),
                fix=from_base(base, shard.name, f"download or copy {shard.name} again"),
            )


def bad():
    case = tiny()
    raw = shard_bytes({n: case.tensors[n] for n in sorted(case.tensors)}, case.dtypes)
    case.files["model.safetensors"] = raw + bytes(37)
    return case, "model.safetensors: 37 bytes after the last tensor belong to none"


def good():
    return tiny()
