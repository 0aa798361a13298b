"""F001 truncated-shard: weight file is truncated: shorter than its header says.

Why: a download or copy stopped early. The format has no checksum, but the header states where each tensor ends, so the
loss is certain. Every reader refuses the whole file.

Seen as:
- huggingface_hub: `Consistency check failed: file should be of size`
- safetensors: `Error while deserializing header: incomplete metadata, file not fully covered`
- safetensors: `SafetensorError: Error while deserializing header: MetadataIncompleteBuffer`
- safetensors: `Error while deserializing header: invalid header length`
- safetensors: `Error while deserializing header: header too small`
- safetensors: `Error while deserializing header: HeaderTooSmall`
- safetensors: `Error while deserializing header: InvalidHeaderLength`

Do: download this one file again and compare its size with the source.

False alarms: none known.

Fix safety: safe with `--from` where evidence shows that the donor's file is the lost one: the hash in a Git LFS
pointer, another shard with the same hash, or the remaining part of this file. Unsafe without such evidence. Manual
without `--from`: the missing bytes are not on this disk.

Sources: safetensors safetensors/src/tensor.rs (0.8), `read_metadata`.
"""

from doctor.lint.rule import Place, _, finding, from_base, rule
from doctor.lint.testing import shard_bytes, tiny


@rule("F001", "error")
def truncated_shard(shard, base):
    short = [d for d in shard.defects if d.kind in ("truncated", "too-small")]
    if not short:
        return
    cut = shard.counts["truncated"]
    if cut:
        need = shard.cut_at
        what = _(
            "{file} has {size:,} of {need:,} bytes: {cut:,} of {total:,} tensors are cut off",
            file=shard.name,
            size=shard.size,
            need=need,
            cut=cut,
            total=cut + len(shard.tensors),
        )
        evidence = {"bytes": shard.size, "needed": need, "tensors": cut}
    else:
        what = _("{file} ends inside its header: {detail}", file=shard.name, detail=short[0].detail)
        evidence = {"bytes": shard.size}
    yield finding(
        what,
        at=Place(shard.name, byte=shard.size),
        evidence=evidence,
        fix=from_base(base, shard.name, _("download or copy {file} again", file=shard.name)),
    )


def bad():
    case = tiny()
    size = len(shard_bytes({n: case.tensors[n] for n in sorted(case.tensors)}, case.dtypes))

    def cut(folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-20])

    case.damage.append(cut)
    n = len(case.tensors)
    return case, f"model.safetensors has {size - 20:,} of {size:,} bytes: 1 of {n} tensors are cut off"


def good():
    return tiny()
