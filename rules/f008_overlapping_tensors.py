"""F008 overlapping-tensors: two tensors of one file overlap.

Why: at most one of them can be right. Readers refuse the file so that one byte range is not read as two weights.

Seen as:
- safetensors: `Error while deserializing header: invalid offset for tensor`
- safetensors: `Error while deserializing header: InvalidOffset`

Do: download the file again, or save the model again with safetensors' own writer.

False alarms: none known. Tied weights are stored once under one name, never as two names on one range.

Fix safety: safe with `--from` where evidence shows that the donor's file is the lost one: the hash in a Git LFS
pointer, another shard with the same hash, or the remaining part of this file. Unsafe without such evidence. Manual
without `--from`: nothing shows which tensor owns the bytes.

Sources: safetensors safetensors/src/tensor.rs (0.8), `Metadata::validate`.
"""

from doctor.lint.rule import Place, _, finding, from_base, rule
from doctor.lint.testing import shard_bytes, tiny


@rule("F008", "error")
def overlapping_tensors(shard, base):
    for defect in shard.defects:
        if defect.kind == "overlap":
            yield finding(
                _("{tensor} {detail}", tensor=defect.tensor, detail=defect.detail),
                at=Place(shard.name, tensor=defect.tensor, byte=defect.offset),
                fix=from_base(base, shard.name, _("download {file} again, or save the model again", file=shard.name)),
            )


def _last_range_moved_onto_the_first(case):
    """A file whose header places the last tensor 64 bytes inside the tensor before it."""
    import json
    import struct

    raw = shard_bytes({n: case.tensors[n] for n in sorted(case.tensors)}, case.dtypes)
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    names = sorted(case.tensors)
    before, last = names[-2], names[-1]
    begin, end = header[last]["data_offsets"]
    header[last]["data_offsets"] = [begin - 64, end - 64]
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    return raw[:8] + text + raw[8 + length : -64], last, before, 8 + length + begin


def bad():
    case = tiny()
    case.files["model.safetensors"], last, before, at = _last_range_moved_onto_the_first(case)
    return case, f"{last} begins at byte {at - 64:,}, inside {before}, which ends at {at:,}"


def good():
    return tiny()
