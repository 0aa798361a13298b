"""F058 wrapped-names: tensor names have a training wrapper's prefix.

Why: torch.compile, DistributedDataParallel, FSDP and trainers add a prefix to each name. Readers look for the plain
names, find none, and initialize the model with random numbers.

Seen as:
- transformers: `Some weights of the model checkpoint at`
- PyTorch: `Unexpected key(s) in state_dict: "_orig_mod`
- PyTorch: `Missing key(s) in state_dict`

Do: unwrap before saving (`model._orig_mod`, `accelerator.unwrap_model(model)`), or rename the tensors.

False alarms: none known; no model uses these prefixes itself.

Fix safety: safe: only names change, no value does. Manual where two tensors would get one name.

Sources: pytorch/pytorch torch/_dynamo/eval_frame.py (`_orig_mod`); torch/nn/parallel/distributed.py (`module`).
"""

import re

from doctor.lint.rule import Fix, Place, RebuildIndex, RenameTensor, _, finding, rule
from doctor.lint.testing import tiny

WRAPPER = re.compile(
    r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.|^module\.|^actor\.|^policy\."
)
# Every such name contains one of these, at the start of a line or anywhere: all names are searched at once, since a
# large model has 50,000.
MARKS = (
    "_orig_mod.",
    "_fsdp_wrapped_module.",
    "_checkpoint_wrapped_module.",
    "_forward_module.",
    "\nmodule.",
    "\nactor.",
    "\npolicy.",
)


@rule("F058", "error")
def wrapped_names(checkpoint, tensors):
    text = "\n" + "\n".join(tensors)
    found = sorted(n for n in tensors if WRAPPER.search(n)) if any(mark in text for mark in MARKS) else []
    if found:
        match = next(filter(None, map(WRAPPER.search, found)))
        yield finding(
            _(
                "{count:,} of {total:,} tensor names have the wrapper prefix {prefix!r}; the first is {first}",
                count=len(found),
                total=len(tensors),
                prefix=match[0].strip("."),
                first=found[0],
            ),
            at=Place(tensors[found[0]].shard, tensor=found[0]),
            evidence={"tensors": len(found)},
            fix=_unwrap(tensors, found, checkpoint.index),
        )


def _unwrap(tensors, found, index):
    """New names for all, unless two tensors would get the same one."""
    names = {n: _bare(n) for n in found}
    others = tensors.keys() - names.keys()
    if len(set(names.values())) < len(names) or not others.isdisjoint(names.values()):
        title = _("unwrap the model before saving it: without the wrapper two tensors would have one name")
        return Fix(title, (), "manual")
    edits = tuple(RenameTensor(old, new) for old, new in names.items())
    return Fix(_("remove the wrapper prefix from the names"), (*edits, RebuildIndex()) if index is not None else edits)


def _bare(name):
    while WRAPPER.search(name):
        name = WRAPPER.sub(lambda match: match[1] or "", name)
    return name


def bad():
    case = tiny()
    case.tensors = {f"_orig_mod.{n}": a for n, a in case.tensors.items()}
    case.dtypes = {f"_orig_mod.{n}": d for n, d in case.dtypes.items()}
    n = len(case.tensors)
    return case, f"{n} of {n} tensor names have the wrapper prefix '_orig_mod'; the first is {min(case.tensors)}"


def good():
    return tiny()
