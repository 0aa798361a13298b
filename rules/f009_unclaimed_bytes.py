"""F009 unclaimed-bytes: weight file has bytes that belong to no tensor.

Why: the format allows no gaps, so that nothing can be hidden in a file; readers refuse it. Two downloads written into
one file, or a header edited by hand, cause this.

Seen as:
- safetensors: `Error while deserializing header: incomplete metadata, file not fully covered`
- safetensors: `Error while deserializing header: invalid offset for tensor`
- safetensors: `Error while deserializing header: InvalidOffset`

Do: download the file again and compare its size with the source.

False alarms: none known.

Fix safety: safe with `--from` where evidence shows that the donor's file is the lost one: the hash in a Git LFS
pointer, another shard with the same hash, or the remaining part of this file. Unsafe without such evidence. Manual
without `--from`: the bytes may be a tensor whose header entry was lost.

Sources: safetensors safetensors/src/tensor.rs (0.8), `Metadata::validate`.
"""

from doctor.lint.rule import Place, _, finding, from_base, rule
from doctor.lint.testing import shard_bytes, tiny


@rule("F009", "error", implied_by=("F025",))
def unclaimed_bytes(shard, base):
    for defect in shard.defects:
        if defect.kind in ("hole", "trailing"):
            yield finding(
                _("{place}: {detail}", place=defect.tensor or shard.name, detail=defect.detail),
                at=Place(shard.name, tensor=defect.tensor, byte=defect.offset),
                fix=from_base(base, shard.name, _("download or copy {file} again", file=shard.name)),
            )


def bad():
    case = tiny()
    raw = shard_bytes({n: case.tensors[n] for n in sorted(case.tensors)}, case.dtypes)
    case.files["model.safetensors"] = raw + bytes(37)
    return case, "model.safetensors: 37 bytes after the last tensor belong to none"


def good():
    return tiny()
