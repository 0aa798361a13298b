"""F010 missing-shard: shard named in the index is missing.

Why: all its tensors are missing, so no reader can build the model.

Seen as:
- transformers: `FileNotFoundError: No such file or directory: "model-00001-of-00002.safetensors"`
- transformers: `does not appear to have a file named`
- safetensors: `FileNotFoundError: No such file or directory: "model-`

Do: download the named file. If only the index is outdated, delete it and let doctor rebuild it from the shards that
exist.

False alarms: a directory that holds one part of a model on purpose.

Fix safety: safe with `--from` where evidence shows that the donor's file is the lost one: the hash in a Git LFS
pointer, another shard with the same hash, or the remaining part of this file. Unsafe without such evidence. Manual
without `--from`: an index without these tensors would only hide the loss.

Sources: transformers src/transformers/modeling_utils.py, `load_state_dict`.
"""

from doctor.lint.rule import Place, _, finding, from_base, plural, rule
from doctor.lint.testing import tiny

INDEX = "model.safetensors.index.json"


@rule("F010", "error", implied_by=("F015", "F019", "F024", "F028"))
def missing_shard(checkpoint, missing_shards, base):
    tensors: dict[str, list[str]] = {name: [] for name in missing_shards}
    for tensor, file in checkpoint.weight_map.items():
        if file in tensors:
            tensors[file].append(tensor)
    for name, lost in tensors.items():
        pointer = f"/weight_map/{lost[0].replace('~', '~0').replace('/', '~1')}" if lost else None
        yield finding(
            plural(
                "{file} is missing; the index places {n:,} tensor in it",
                "{file} is missing; the index places {n:,} tensors in it",
                len(lost),
                file=name,
            ),
            at=Place(INDEX, pointer=pointer),
            evidence={"file": name, "tensors": len(lost)},
            fix=from_base(base, name, _("fetch {file}", file=name)),
        )


def bad():
    case = tiny()
    case.shards = 3
    case.damage.append(lambda folder: (folder / "model-00002-of-00003.safetensors").unlink())
    count = len(sorted(case.tensors)[1::3])
    return case, f"model-00002-of-00003.safetensors is missing; the index places {count} tensors in it"


def good():
    case = tiny()
    case.shards = 3
    return case
