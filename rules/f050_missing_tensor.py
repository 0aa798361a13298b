"""F050 missing-tensor: tensor that the model needs is in no weight file.

Why: transformers fills the gap with random numbers and prints one line; other tools stop. A decoder layer with random
weights ruins every layer after it, and calibration with it. A lost routing bias becomes zeros: other experts answer.

Seen as:
- transformers: `Some weights of`
- transformers: `were not initialized from the model checkpoint`
- vLLM: `Following weights were not initialized from checkpoint`
- llama.cpp: `error loading model: missing tensor`

Do: fetch the shard that holds it, or take the tensor from the base model.

False alarms: a mixture that was trained without a routing bias and does not say so in config.json. A family whose decoder layers differ in a way that this version does not know. A layer is compared only
with layers that hold everything that it holds.

Fix safety: unsafe, and only with `--from`: the tensor is taken from the donor, in the dtype that the same tensors of
other layers have here. Else manual: weights are not invented.

Sources: transformers src/transformers/modeling_utils.py; the table of families was taken from models saved by
transformers 5.23.
"""

import re
from collections import Counter

from doctor.lint.rule import LOST_DATA, Fix, Place, _, finding, routing_biases_missing, rule
from doctor.lint.testing import tiny

NUMBER = re.compile(r"\.\d+\.")


@rule(
    "F050",
    "error",
    implied_by=(*LOST_DATA, "F057", "F058", "F061", "F062", "C142", "C147", "O620", "O619", "O611", "O625"),
)
def missing_tensor(checkpoint, placement, tensors, base):
    for name, reason in sorted((placement.missing() | routing_biases_missing(placement)).items()):
        known, stored = placement.spec.family is not None, placement.stored(name)
        yield finding(
            _("{tensor} is in no weight file; {reason}", tensor=stored, reason=reason),
            at=Place("", tensor=stored),
            severity="" if known else "warning",
            fix=(_from_base(base, tensors, name) if stored == name else None)
            or Fix(_("fetch the shard that holds it, or take it from the base model"), (), "manual"),
        )


def _from_base(base, tensors, name):
    """The donor's tensor if it has the shape and dtype of this tensor in other decoder layers here, or, where no layer
    has it, the most frequent dtype.
    """
    theirs = base.checkpoint.tensors.get(name) if base else None
    if theirs is None:
        return None
    tail = NUMBER.sub(".", name)
    alike = [(i.dtype.name, i.shape) for n, i in tensors.items() if NUMBER.sub(".", n) == tail]
    kinds = Counter(i.dtype.name for i in tensors.values())
    dtype, shape = Counter(alike).most_common(1)[0][0] if alike else (kinds.most_common(1)[0][0], theirs.shape)
    edit = base.offer(name, dtype, shape)
    return edit and Fix(_("take it from {base}", base=base.text), (edit,), "unsafe")


def bad():
    case = tiny()
    name = case.name("down", 1)
    del case.tensors[name]
    return case, f"{name} is in no weight file; 1 of 2 blocks have it"


def good():
    return tiny()
