"""F004 zero-filled-file: a weight file begins with zeros where its header must stand.

Why: downloaders reserve the whole size first and fill it later; when they stop, size and name look right.

Seen as:
- safetensors: `Error while deserializing header: invalid JSON in header`
- PyTorch: `UnpicklingError: invalid load key, '\\x00'`

Do: fetch the file again.

False alarms: none known: eight zero bytes say that the header is empty, which no writer produces.

Fix safety: safe with `--from`, where something shows that the base's file is the lost one: the hash in a git-lfs
pointer, another shard with the same hash, or the part that is left. Unsafe where nothing does. Without `--from` manual;
the data are elsewhere.

Sources: safetensors safetensors/src/tensor.rs (0.8): N = 0 is invalid JSON.

标题: 权重文件开头该是文件头的地方全是零

原因: 下载工具先占好全部空间再填内容；中途停下时，大小和文件名看上去都对。

处理: 重新下载该文件。

误报: 暂无已知：开头八个零字节意味着文件头为空，没有哪个程序会这样写。

修复: 用 `--from` 时取基座的同名文件：若能证实它就是丢失的那份（git-lfs 指针里的哈希、另一个哈希相同的分片、或剩余
的部分），安全；否则不安全。没有 `--from` 时需手动：数据在别处。
"""

from doctor.lint.rule import Place, finding, from_base, rule
from doctor.lint.testing import tiny


@rule("F004", "error")
def zero_filled_file(shard, base):
    for defect in shard.defects:
        if defect.kind == "zero-filled":
            yield finding(
                f"{shard.name}: {defect.detail}",
                at=Place(shard.name, byte=0),
                evidence={"bytes": shard.size},
                fix=from_base(base, shard.name, f"download or copy {shard.name} again"),
            )


def bad():
    case = tiny()
    case.files["model.safetensors"] = bytes(4096)
    return case, "model.safetensors: the first 512 bytes are zero: a preallocated file that was never filled"


def good():
    return tiny()
