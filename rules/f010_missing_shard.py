"""F010 missing-shard: the index names a weight file that is not there.

Why: every tensor in it is absent, so no reader can build the model.

Seen as:
- transformers: `FileNotFoundError: No such file or directory`
- transformers: `does not appear to have a file named`
- safetensors: `FileNotFoundError: No such file or directory: "model-`

Do: fetch the named file. Where only the index is old, delete it and let doctor write it anew from the files that are
there.

False alarms: a directory that holds one part of a model on purpose.

Fix safety: safe with `--from`, where something shows that the base's file is the lost one: the hash in a git-lfs
pointer, another shard with the same hash, or the part that is left. Unsafe where nothing does. Without `--from` manual;
an index without these tensors would only hide the loss.

Sources: transformers src/transformers/modeling_utils.py, `load_state_dict`.
"""

from doctor.lint.rule import Place, finding, from_base, rule
from doctor.lint.testing import tiny

INDEX = "model.safetensors.index.json"


@rule("F010", "error", implied_by=("F015", "F019", "F024"))
def missing_shard(checkpoint, missing_shards, base):
    for name in missing_shards:
        lost = [t for t, file in checkpoint.weight_map.items() if file == name]
        noun = "tensor" if len(lost) == 1 else "tensors"
        pointer = f"/weight_map/{lost[0].replace('~', '~0').replace('/', '~1')}" if lost else None
        yield finding(
            f"{name} is not there; the index places {len(lost):,} {noun} in it",
            at=Place(INDEX, pointer=pointer),
            evidence={"file": name, "tensors": len(lost)},
            fix=from_base(base, name, f"fetch {name}"),
        )


def bad():
    case = tiny()
    case.shards = 3
    case.damage.append(lambda folder: (folder / "model-00002-of-00003.safetensors").unlink())
    count = len(sorted(case.tensors)[1::3])
    return case, f"model-00002-of-00003.safetensors is not there; the index places {count} tensors in it"


def good():
    case = tiny()
    case.shards = 3
    return case
