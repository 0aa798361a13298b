"""F016 tensor-in-two-shards: two weight files hold a tensor of the same name.

Why: which one a model gets depends on the reader: the one the index names, the first file, or the last. Where the two differ, two
programs run two models.

Do: find out which file is right. If all names of one file stand twice, that file is a leftover; delete it.

False alarms: none known; files that the index does not list are not counted here (F017).

Fix safety: manual; the right copy cannot be told from the names.

Sources: transformers src/transformers/modeling_utils.py loads file after file, so that the last wins; vllm-project/vllm
vllm/model_executor/model_loader/weight_utils.py goes by the index.

标题: 两个权重文件里有同名张量

原因: 用哪一个取决于读取程序：索引指的、第一个文件的或最后一个的。若两者不同，两个程序运行的就是两个模型。

处理: 弄清哪个文件是对的。若某个文件里的名字全部重复出现，它就是旧文件，删掉即可。

误报: 暂无已知；索引没有列出的文件不在此计（F017）。

修复: 需手动；从名字看不出哪份是对的。
"""

from doctor.rule import Fix, Place, finding, rule
from doctor.testing import shard_bytes, tiny


@rule("F016", "error")
def tensor_in_two_shards(checkpoint, shards):
    held: dict[str, list[str]] = {}
    for file, shard in shards.items():
        for info in shard.tensors:
            held.setdefault(info.name, []).append(file)
    for name, files in held.items():
        if len(files) > 1:
            rest = f" and {len(files) - 2} more files" if len(files) > 2 else ""
            yield finding(f"{name} is in {files[0]} and in {files[1]}{rest}", at=Place(files[0], tensor=name), evidence={"files": ", ".join(files)},
                          fix=Fix("keep one of the files; nothing here says which is right", (), "manual"))


def bad():
    case = tiny()
    case.shards = 2
    names = sorted(case.tensors)
    twice = [*names[1::2], names[0]]
    case.files["model-00002-of-00002.safetensors"] = shard_bytes({n: case.tensors[n] for n in twice}, case.dtypes)
    return case, f"{names[0]} is in model-00001-of-00002.safetensors and in model-00002-of-00002.safetensors"


def good():
    case = tiny()
    case.shards = 2
    return case
