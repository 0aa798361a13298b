"""F019 link-leads-out: a file is a symbolic link to a place outside the checkpoint.

Why: what it shows depends on the machine, and a checkpoint from elsewhere could so point at private files. It is not
followed here, and the file counts as absent.

Do: replace the link by a copy or a hard link of what it points to.

False alarms: layouts of your own that link shards from another disk. A Hub cache's links into its blobs are followed.

Fix safety: with `--from` the base's file of this name is taken, unsafe unless another shard shows that it is the same
model. Else manual; doctor does not follow paths out of the checkpoint.

Sources: huggingface/huggingface_hub docs, "Manage your cache": snapshots hold links into ../../blobs.

标题: 文件是指向检查点之外的符号链接

原因: 它显示什么取决于机器；外来的检查点还可借此指向私人文件。这里不跟随链接，该文件按不存在处理。

处理: 用所指文件的副本或硬链接替换。

误报: 你自己把分片链接到另一块磁盘的布局。Hub 缓存指向自身 blobs 的链接会跟随。

修复: 用 `--from` 时取基座的同名文件，除非另一个分片证实是同一个模型，否则不安全。没有 `--from` 时需手动；doctor 不跟
随通向检查点之外的路径。
"""

import os

from doctor.lint.rule import Place, finding, from_base, rule
from doctor.lint.testing import tiny

READ = (".safetensors", ".json", ".jinja", ".model")


@rule("F019", "error")
def link_leads_out(checkpoint, listing_problems, base):
    for defect in listing_problems:
        if defect.kind == "link-leads-out" and defect.tensor.endswith(READ):
            yield finding(
                f"{defect.tensor} is {defect.detail}, outside the checkpoint",
                at=Place(defect.tensor),
                fix=from_base(base, defect.tensor, "put a copy or a hard link of the file in its place"),
            )


def bad():
    case = tiny()

    def link(folder):
        os.symlink("/dev/null", folder / "notes.json")

    case.damage.append(link)
    return case, "notes.json is a symbolic link to /dev/null, outside the checkpoint"


def good():
    return tiny()


def donor():
    """What the missing is taken from."""
    case = tiny()
    case.files["notes.json"] = b"{}"
    return case
