"""F007 lying-entry: a tensor's dtype, shape and byte range contradict each other.

Why: the entry cannot be believed in any of the three, and readers refuse the whole file for it.

Seen as:
- safetensors: `Error while deserializing header: invalid shape, data type, or offset for tensor`
- safetensors: `Error while deserializing header: invalid JSON in header`
- ExLlamaV3: `data_offsets span`
- safetensors: `Error while deserializing header: TensorInvalidInfo`

Do: fetch the file again, or save the model again with the tool that wrote it. An unknown dtype needs a newer
safetensors.

False alarms: a dtype that was added to the format after this version of doctor.

Fix safety: safe with `--from`, where something shows that the base's file is the lost one: the hash in a git-lfs
pointer, another shard with the same hash, or the part that is left. Unsafe where nothing does. Without `--from` manual;
which of the three lies is not known.

Sources: safetensors safetensors/src/tensor.rs (0.8), `Metadata::validate`.
"""

from doctor.lint.rule import Place, finding, from_base, rule
from doctor.lint.testing import shard_bytes, tiny

KINDS = ("entry", "dtype", "shape", "offsets", "size")


@rule("F007", "error")
def lying_entry(shard, base):
    for defect in shard.defects:
        if defect.kind in KINDS:
            yield finding(
                f"{defect.tensor}: {defect.detail}",
                at=Place(shard.name, tensor=defect.tensor),
                evidence={"kind": defect.kind},
                fix=from_base(base, shard.name, f"download {shard.name} again, or save the model again"),
            )


def bad():
    case = tiny()
    name, (n, k) = case.name("down"), case.down().shape
    raw = shard_bytes({t: case.tensors[t] for t in sorted(case.tensors)}, case.dtypes)
    at = raw.index(f'"{name}"'.encode())
    case.files["model.safetensors"] = raw[:at] + raw[at:].replace(
        f"[{n},{k}]".encode(), f"[{n},{k + 1}]".encode().ljust(len(f"[{n},{k}]")), 1
    )
    return case, f"{name}: BF16 [{n}, {k + 1}] takes {2 * n * (k + 1):,} bytes, data_offsets span {2 * n * k:,}"


def good():
    return tiny()
