"""F002 lfs-pointer: is a Git LFS pointer, not the data.

Why: `git clone` without Git LFS installed leaves a text file of about 130 bytes in place of each large file.

Seen as:
- safetensors: `Error while deserializing header: HeaderTooLarge`
- safetensors: `Error while deserializing header: header too large`
- PyTorch: `UnpicklingError: invalid load key, 'v'.`
- transformers: `OSError: Unable to load weights from pytorch checkpoint file`

Do: run `git lfs install` and `git lfs pull` in the clone, or fetch the model with `hf download`.

False alarms: none known: the text begins with `version https://git-lfs`.

Fix safety: safe with `--from` where evidence shows that the donor's file is the lost one: the hash in a Git LFS
pointer, another shard with the same hash, or the remaining part of this file. Unsafe without such evidence. Manual
without `--from`: the data is elsewhere.

Sources: git-lfs docs/spec.md; safetensors safetensors/src/tensor.rs (0.8).
"""

from doctor.lint.rule import Place, _, finding, from_base, rule
from doctor.lint.testing import tiny

POINTER = b"version https://git-lfs"


@rule("F002", "error")
def lfs_pointer(checkpoint, shards, json_files, base):
    found = {name for name, shard in shards.items() if any(d.kind == "lfs-pointer" for d in shard.defects)}
    found |= {name for name, file in json_files.items() if file.raw.startswith(POINTER)}
    for name in sorted(found):
        size = checkpoint.entries[name].size
        yield finding(
            _("{file} is a Git LFS pointer of {size:,} bytes, not the file it points to", file=name, size=size),
            at=Place(name),
            evidence={"bytes": size},
            fix=from_base(base, name, _("run `git lfs pull`, or download the file again")),
        )


def bad():
    case = tiny()
    text = POINTER + b"/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 269060552\n"
    case.files["model.safetensors"] = text
    return case, f"model.safetensors is a Git LFS pointer of {len(text)} bytes, not the file it points to"


def good():
    return tiny()
