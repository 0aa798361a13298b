"""F007 lying-entry: dtype, shape and data_offsets of a tensor contradict each other.

Why: none of the three can be trusted, and readers refuse the whole file because of it.

Seen as:
- safetensors: `Error while deserializing header: invalid shape, data type, or offset for tensor`
- safetensors: `Error while deserializing header: invalid JSON in header`
- ExLlamaV3: `data_offsets span`
- safetensors: `Error while deserializing header: TensorInvalidInfo`

Do: download the file again, or save the model again with the tool that wrote it. An unknown dtype needs a newer
safetensors.

False alarms: a dtype that was added to the format after this version of doctor.

Fix safety: safe with `--from` where evidence shows that the donor's file is the lost one: the hash in a Git LFS
pointer, another shard with the same hash, or the remaining part of this file. Unsafe without such evidence. Manual
without `--from`: nothing shows which of the three is wrong.

Sources: safetensors safetensors/src/tensor.rs (0.8), `Metadata::validate`.
"""

from doctor.lint.rule import Place, _, finding, from_base, rule
from doctor.lint.testing import shard_bytes, tiny

KINDS = ("entry", "dtype", "shape", "offsets", "size")


@rule("F007", "error")
def lying_entry(shard, base):
    for defect in shard.defects:
        if defect.kind in KINDS:
            yield finding(
                _("{tensor}: {detail}", tensor=defect.tensor, detail=defect.detail),
                at=Place(shard.name, tensor=defect.tensor),
                evidence={"kind": defect.kind},
                fix=from_base(base, shard.name, _("download {file} again, or save the model again", file=shard.name)),
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
