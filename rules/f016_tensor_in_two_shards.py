"""F016 tensor-in-two-shards: tensor is stored in two shards.

Why: which copy a model gets depends on the reader: the one that the index names, the first file, or the last. Where the
copies differ, two programs run two different models.

Do: find out which file is right; an index that names an overlay's file says so. If every tensor of one file also exists in another, that file is a leftover; delete
it.

False alarms: none known; files that the index does not list are not counted here (F017).

Fix safety: safe where the copies are bit-identical: all but one are dropped, and the one that the index names stays.
Unsafe where they differ: the copy that the index names is kept, and the stale bytes of the others are dropped. Manual
if no index names one.

Sources: transformers src/transformers/modeling_utils.py loads file after file, so that the last wins; vllm-project/vllm
vllm/model_executor/model_loader/weight_utils.py goes by the index.
"""

from doctor.lint.rule import DropTensor, Fix, Place, _, finding, plural, rule
from doctor.lint.testing import shard_bytes, tiny


@rule("F016", "error")
def tensor_in_two_shards(checkpoint, copies, weight_map, every_digests=None):
    for name, infos in copies.items():
        files = [info.shard for info in infos]
        equal = _equal(infos, (every_digests or {}).get(name, {}))
        first, second, *rest = files
        named = (weight_map or {}).get(name)
        yield finding(
            _text(name, first, second, len(rest), named if named in files else ""),
            at=Place(files[0], tensor=name),
            evidence={"files": ", ".join(files)},
            fix=_fix(name, files, equal, named),
        )


def _text(name, first, second, more, named):
    if more:
        return plural(
            "{tensor} is in {first}, in {second} and in {n} more shard",
            "{tensor} is in {first}, in {second} and in {n} more shards",
            more,
            tensor=name,
            first=first,
            second=second,
        )
    if named:
        return _(
            "{tensor} is in {first} and in {second}; the index names {named}",
            tensor=name,
            first=first,
            second=second,
            named=named,
        )
    return _("{tensor} is in {first} and in {second}", tensor=name, first=first, second=second)


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
        return Fix(_("keep one of the files; nothing here shows which is right"), (), "manual")
    drops = tuple(DropTensor(name, file) for file in files if file != kept)
    if equal:
        return Fix(_("drop all copies but one: they are equal"), drops)
    return Fix(_("keep the copy in {file}, which the index names; drop the others", file=kept), drops, "unsafe")


def bad():
    case = tiny()
    case.shards = 2
    names = sorted(case.tensors)
    twice = [*names[1::2], names[0]]
    case.files["model-00002-of-00002.safetensors"] = shard_bytes({n: case.tensors[n] for n in twice}, case.dtypes)
    first, second = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    return case, f"{names[0]} is in {first} and in {second}; the index names {first}"


def good():
    case = tiny()
    case.shards = 2
    return case


def more():
    """Cases whose fixes the example above does not show."""
    case, _message = bad()
    names = sorted(case.tensors)
    twice = {n: case.tensors[n].copy() for n in [*names[1::2], names[0]]}
    twice[names[0]].reshape(-1)[3] ^= 1
    case.files["model-00002-of-00002.safetensors"] = shard_bytes(twice, case.dtypes)
    yield case
