"""F005 foreign-format: a file called .safetensors holds another format.

Why: somebody renamed a PyTorch or GGUF file. Readers take the first eight bytes for a length and refuse; a reader that
falls back to unpickling would run code from the file.

Seen as:
- safetensors: `Error while deserializing header: HeaderTooLarge`
- safetensors: `Error while deserializing header: header too large`

Do: convert the file on a machine where you may run its code, or fetch the safetensors version.

False alarms: none known: the first bytes name the format.

Fix safety: safe with `--from`, where something shows that the base's file is the lost one: the hash in a git-lfs
pointer, another shard with the same hash, or the part that is left. Unsafe where nothing does. Without `--from` manual;
a pickle is never opened here.

Sources: safetensors safetensors/src/tensor.rs (0.8); Python docs of `pickle`, warning on untrusted data.

标题: 名为 .safetensors 的文件其实是别的格式

原因: 有人把 PyTorch 或 GGUF 文件改了名。读取程序把前八个字节当长度，于是拒绝；若退回去做反序列化
（unpickle），就会执行文件里的代码。

处理: 在可以运行其代码的机器上转换，或下载 safetensors 版本。

误报: 暂无已知：开头的字节表明了格式。

修复: 用 `--from` 时取基座的同名文件：若能证实它就是丢失的那份（git-lfs 指针里的哈希、另一个哈希相同的分片、或剩余
的部分），安全；否则不安全。没有 `--from` 时需手动：这里绝不打开 pickle。
"""

from doctor.lint.rule import Place, finding, from_base, rule
from doctor.lint.testing import tiny


@rule("F005", "error")
def foreign_format(shard, base):
    for defect in shard.defects:
        if defect.kind in ("pickle", "gguf"):
            yield finding(
                f"{shard.name} is {defect.detail}",
                at=Place(shard.name, byte=0),
                evidence={"kind": defect.kind},
                fix=from_base(
                    base, shard.name, "take the safetensors file from the model's page; doctor never unpickles"
                ),
            )


def bad():
    case = tiny()
    case.files["model.safetensors"] = b"PK\x03\x04" + b"archive/data.pkl" * 8
    return case, "model.safetensors is a zip archive (a torch pickle?), not a shard"


def good():
    return tiny()
