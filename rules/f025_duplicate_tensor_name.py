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

标题: 文件头里同一张量名出现了两次

原因: JSON 读取程序对相同的键取最后一个，前一个的字节就悄悄丢了；若两个范围不同，格式自己的读取程序会因空隙而
拒绝该文件。

处理: 用 safetensors 自带的写入函数重新保存，或重新下载。

误报: 暂无已知。

修复: 用 `--from` 时取基座的同名文件：若能证实它就是丢失的那份（git-lfs 指针里的哈希、另一个哈希相同的分片、或剩余
的部分），安全；否则不安全。没有 `--from` 时需手动：不知道本意是哪一个。
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
