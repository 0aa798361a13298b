"""F001 truncated-shard: a weight file is shorter than its own header says.

Why: a download or copy stopped early. The format has no checksum, but it states every tensor's place, so the loss is
certain; every reader refuses the whole file.

Seen as:
- huggingface_hub: `Consistency check failed: file should be of size`
- safetensors: `Error while deserializing header: incomplete metadata, file not fully covered`
- safetensors: `SafetensorError: Error while deserializing header: MetadataIncompleteBuffer`
- safetensors: `Error while deserializing header: invalid header length`
- safetensors: `Error while deserializing header: header too small`
- safetensors: `Error while deserializing header: HeaderTooSmall`
- safetensors: `Error while deserializing header: InvalidHeaderLength`

Do: fetch this one file again and compare its size with the source's.

False alarms: none known.

Fix safety: safe with `--from`, where something shows that the base's file is the lost one: the hash in a git-lfs
pointer, another shard with the same hash, or the part that is left. Unsafe where nothing does. Without `--from` manual;
the missing bytes are not on this disk.

Sources: safetensors safetensors/src/tensor.rs (0.8), `read_metadata`.
"""

from doctor.lint.rule import Place, finding, from_base, rule
from doctor.lint.testing import shard_bytes, tiny


@rule("F001", "error")
def truncated_shard(shard, base):
    short = [d for d in shard.defects if d.kind in ("truncated", "too-small")]
    if not short:
        return
    cut = [d for d in short if d.tensor is not None]
    if cut:
        need = max(d.offset for d in cut)
        what = f"{shard.name} has {shard.size:,} of {need:,} bytes: {len(cut):,} of {len(cut) + len(shard.tensors):,} tensors are cut off"
        evidence = {"bytes": shard.size, "needed": need, "tensors": len(cut)}
    else:
        what, evidence = f"{shard.name} ends inside its header: {short[0].detail}", {"bytes": shard.size}
    yield finding(
        what,
        at=Place(shard.name, byte=shard.size),
        evidence=evidence,
        fix=from_base(base, shard.name, f"download or copy {shard.name} again"),
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
