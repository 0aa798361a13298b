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

from doctor.lint.rule import DropTensor, Fix, Place, _, finding, listed, plural, rule
from doctor.lint.testing import shard_bytes, tiny

USUAL = "model.safetensors"
MANY = 4  # tensors in the same files, from which on they are said in one line


@rule("F016", "error")
def tensor_in_two_shards(checkpoint, copies, weight_map, every_digests=None):
    pairs: dict[tuple[str, ...], list] = {}
    for infos in copies.values():
        pairs.setdefault(tuple(info.shard for info in infos), []).append(infos)
    for shards, sets in pairs.items():
        if len(sets) >= MANY:
            yield _whole_files(shards, sets, weight_map or {}, every_digests or {})
    for name, infos in copies.items():
        if len(pairs[tuple(info.shard for info in infos)]) >= MANY:
            continue
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


def _whole_files(files, sets, weight_map, digests):
    """One finding for many tensors that stand in the same files: a second save of the whole model, most likely."""
    names = [infos[0].name for infos in sets]
    named = {weight_map.get(name) for name in names}
    fixes = [
        _fix(name, list(files), _equal(infos, digests.get(name, {})), weight_map.get(name))
        for name, infos in zip(names, sets, strict=True)
    ]
    safety = max((fix.safety for fix in fixes), key=["safe", "unsafe", "manual"].index)
    edits = tuple(edit for fix in fixes for edit in fix.edits) if safety != "manual" else ()
    return finding(
        plural(
            "{n:,} tensor is in {files} alike: {first}",
            "{n:,} tensors are in {files} alike; the first is {first}",
            len(names),
            files=listed(files),
            first=names[0],
        ),
        at=Place(files[0], tensor=names[0]),
        evidence={"files": ", ".join(files), "tensors": len(names)},
        fix=Fix(next(f.title for f in fixes if f.safety == safety), edits, safety),
        advice="" if len(named) == 1 and named <= set(files) else _("delete the file that is a leftover"),
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
    first = USUAL if USUAL in files else files[0]  # the file that transformers opens, if it is one of them
    kept = named if named in files else first if equal else None
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
