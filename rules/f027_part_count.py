"""F027 part-count: the names of the shards say another number of parts than the index uses.

Why: in `model-00002-of-00007.safetensors` the 7 is the number of parts that were saved. An index that names fewer has lost some, and one
that mixes two numbers joins parts of two saves: the blocks are then of two models.

Do: fetch the index and the shards from one save; where shards were merged or split by hand, name them anew.

False alarms: a tool that drops a shard which no tensor is left in, and keeps the others' names. The weights are then whole.

Fix safety: manual; which save is meant is yours to say.

Sources: huggingface/huggingface_hub src/huggingface_hub/serialization/_base.py.

标题: 分片文件名写的份数与索引所用的不同

原因: `model-00002-of-00007.safetensors` 里的 7 是保存时的份数。索引列出的份数少，说明丢了；混有两种份数，则是两次
保存的分片拼在一起，各层来自两个模型。

处理: 从同一次保存取索引和分片；手工合并或拆分过的，重新命名。

误报: 有的工具丢弃不再含张量的分片，却保留其余的名字。这时权重是完整的。

修复: 需手动；以哪次保存为准由你决定。
"""

import re

from doctor.rule import Fix, Place, finding, rule
from doctor.testing import tiny

PART = re.compile(r"^(.+)-(\d{5})-of-(\d{5})\.safetensors$")
INDEX = "model.safetensors.index.json"


@rule("F027", "warning", certainty="likely", implied_by=("F010", "F015"))
def part_count(checkpoint, weight_map):
    sets: dict[str, dict[int, set[int]]] = {}
    for match in filter(None, map(PART.match, set((weight_map or {}).values()))):
        sets.setdefault(match[1], {}).setdefault(int(match[3]), set()).add(int(match[2]))
    for stem, totals in sets.items():
        have = {number for numbers in totals.values() for number in numbers}
        total = max(totals)
        said = " and ".join(f"of {n}" for n in sorted(totals))
        if len(totals) > 1 or have != set(range(1, total + 1)):
            yield finding(f"the index uses {sum(map(len, totals.values()))} parts of {stem}, whose names say {said}",
                          at=Place(INDEX, pointer="/weight_map"), evidence={"used": len(have), "said": sorted(totals)},
                          fix=Fix("fetch the index and the shards from one save", (), "manual"))


def bad():
    case = tiny()
    case.shards = 2

    def rename(folder):
        old, new = "model-00002-of-00002.safetensors", "model-00002-of-00003.safetensors"
        (folder / old).rename(folder / new)
        (folder / INDEX).write_text((folder / INDEX).read_text().replace(old, new))

    case.damage.append(rename)
    return case, "the index uses 2 parts of model, whose names say of 2 and of 3"


def good():
    case = tiny()
    case.shards = 2
    return case
