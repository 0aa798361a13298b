"""F016 tensor-in-two-shards: two weight files hold a tensor of the same name.

Why: which one a model gets depends on the reader: the one the index names, the first file, or the last. Where the two
differ, two programs run two models.

Do: find out which file is right. If all names of one file stand twice, that file is a leftover; delete it.

False alarms: none known; files that the index does not list are not counted here (F017).

Fix safety: safe where the copies are equal, bit by bit: one is dropped, and the one that the index names stays. Where
they differ, only by name: the one that the index names is kept. Without an index that names one, manual.

Sources: transformers src/transformers/modeling_utils.py loads file after file, so that the last wins; vllm-project/vllm
vllm/model_executor/model_loader/weight_utils.py goes by the index.

标题: 两个权重文件里有同名张量

原因: 用哪一个取决于读取程序：索引指的、第一个文件的或最后一个的。若两者不同，两个程序运行的就是两个模型。

处理: 弄清哪个文件是对的。若某个文件里的名字全部重复出现，它就是旧文件，删掉即可。

误报: 暂无已知；索引没有列出的文件不在此计（F017）。

修复: 各份逐位相同时安全：只留一份，即索引指的那份。不同时只能点名执行：保留索引指的那份。没有索引指明时需手动。
"""

from doctor.lint.rule import DropTensor, Fix, Place, finding, rule
from doctor.lint.testing import shard_bytes, tiny


@rule("F016", "error")
def tensor_in_two_shards(checkpoint, copies, weight_map, every_digests=None):
    for name, infos in copies.items():
        files = [info.shard for info in infos]
        equal = _equal(infos, (every_digests or {}).get(name, {}))
        rest = f" and {len(files) - 2} more files" if len(files) > 2 else ""
        yield finding(
            f"{name} is in {files[0]} and in {files[1]}{rest}",
            at=Place(files[0], tensor=name),
            evidence={"files": ", ".join(files)},
            fix=_fix(name, files, equal, (weight_map or {}).get(name)),
        )


def _equal(infos, digests):
    """Whether all copies are the same, None where their bytes were not read."""
    if len({(info.dtype.name, info.shape) for info in infos}) > 1:
        return False
    found = [digests.get(info.shard) for info in infos]
    return None if None in found else len(set(found)) == 1


def _fix(name, files, equal, named):
    """Drop all copies but one: the one that the index names, or the first of equal ones."""
    kept = named if named in files else files[0] if equal else None
    if equal is None or kept is None:
        return Fix("keep one of the files; nothing here says which is right", (), "manual")
    drops = tuple(DropTensor(name, file) for file in files if file != kept)
    if equal:
        return Fix("drop all copies but one: they are equal", drops)
    return Fix(f"keep the copy in {kept}, which the index names", drops, "unsafe", by_name=True)


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


def more():
    """Cases whose cures the example above does not show."""
    case, _ = bad()
    names = sorted(case.tensors)
    twice = {n: case.tensors[n].copy() for n in [*names[1::2], names[0]]}
    twice[names[0]].reshape(-1)[3] ^= 1
    case.files["model-00002-of-00002.safetensors"] = shard_bytes(twice, case.dtypes)
    yield case
