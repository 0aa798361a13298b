"""F062 misnamed-tensors: tensors are present under names the family does not use.

Why: a converter spelled the names differently. Nothing is lost, but readers miss the names that they know and ignore
the others: transformers initializes the weights with random numbers and prints one line, vLLM stops or leaves them out.

Seen as:
- transformers: `Some weights of the model checkpoint at`
- transformers: `were not initialized from the model checkpoint`
- vLLM: `KeyError: 'model.layers.`

Do: rename the tensors. Do not download them again, and do not drop them.

False alarms: none known. Both names have the same words, the same decoder layer and the same other numbers, and the
tensor has the shape that config.json gives the right name.

Fix safety: safe where words, numbers and shapes prove each pair. Unsafe for w1, w2, w3 in place of gate, down and up:
the shapes prove only the down projection. Unsafe and only by name where shapes alone make the pairs.

Sources: NVIDIA/Megatron-LM expert names (`weight7` for expert 7); transformers src/transformers/modeling_utils.py,
missing and unexpected keys.
"""

import re

from doctor.lint.rule import Fix, Place, RebuildIndex, RenameTensor, _, finding, plural, rule
from doctor.lint.testing import never_in, tiny

NUMBER = re.compile(r"\d+")


@rule("F062", "error", implied_by=("F057", "F058", "F061"))
def misnamed_tensors(checkpoint, misnamed, tensors, spec):
    # What a known family lacks is lost, whichever tensor it is; only the pairing is a guess.
    guessed = "" if spec.family else "warning"
    for names, fix, severity in (
        (misnamed.spelled, _renamed(misnamed.spelled, checkpoint.index, "safe"), ""),
        (misnamed.numbered, _renamed(misnamed.numbered, checkpoint.index, "unsafe"), ""),
        (misnamed.shaped, _renamed(misnamed.shaped, checkpoint.index, "unsafe", by_name=True), guessed),
    ):
        if names:
            first = min(names)
            yield finding(
                plural(
                    "{n:,} tensor is misnamed: {have} must be {want}",
                    "{n:,} tensors are misnamed, such as {have}, which must be {want}",
                    len(names),
                    have=first,
                    want=names[first],
                ),
                at=Place(tensors[first].shard, tensor=first),
                evidence={"tensors": len(names)},
                facts_table=_spellings(names) if len(names) > 1 else (),
                fix=fix,
                severity=severity,
            )


def _spellings(names):
    """One row for each kind of tensor: the first of all its layers and experts."""
    rows: dict[str, tuple[str, str]] = {}
    for old in sorted(names):
        rows.setdefault(NUMBER.sub("", old), (old, names[old]))
    return list(rows.values())[:8]


def _renamed(names, index, safety, by_name=False):
    edits = tuple(RenameTensor(old, new) for old, new in sorted(names.items()))
    title = _("rename the tensors to the family's names")
    return Fix(title, (*edits, RebuildIndex()) if index is not None else edits, safety, by_name=by_name)


def bad():
    never_in("phi3", "opt", why="the example swaps the parts of a query's name, which this family has not")
    case = tiny()
    for layer in (0, 1):
        old = case.name("q", layer)
        new = old.replace("self_attn.q_proj", "q_proj.self_attn")
        case.tensors[new], case.dtypes[new] = case.tensors.pop(old), case.dtypes.pop(old)
    first = "model.layers.0.self_attn.q_proj.weight"
    wrong = "model.layers.0.q_proj.self_attn.weight"
    return case, f"2 tensors are misnamed, such as {wrong}, which must be {first}"


def good():
    return tiny()


def more():
    """Cases whose fixes the example above does not show."""
    never_in("phi3", "opt", "qwen2_moe", why="the example renames the three linears of an MLP")
    for words in (
        {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"},
        {"down_proj": "contract"},
    ):
        case = tiny()
        for old in [n for n in case.tensors if ".mlp." in n]:
            new = old
            for ours, theirs in words.items():
                new = new.replace(ours, theirs)
            case.tensors[new], case.dtypes[new] = case.tensors.pop(old), case.dtypes.pop(old)
        yield case
