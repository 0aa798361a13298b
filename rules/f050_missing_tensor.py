"""F050 missing-tensor: a tensor that the model needs is in no weight file.

Why: transformers fills the gap with random numbers and prints one line; other tools stop. A block with random weights wrecks every
block after it, and calibration with it.

Seen as:
- transformers: `Some weights of`
- transformers: `were not initialized from the model checkpoint`
- vLLM: `Following weights were not initialized from checkpoint`
- llama.cpp: `error loading model: missing tensor`

Do: fetch the shard that holds it, or take the tensor from the base model.

False alarms: a family whose blocks differ in a way this version does not know. A block is compared only with blocks that hold
everything that it holds.

Fix safety: manual; weights are not invented.

Sources: transformers src/transformers/modeling_utils.py; the table of families was taken from models saved by transformers 5.23.
"""

from doctor.rule import Fix, Place, finding, rule
from doctor.testing import tiny

FILES = ("F001", "F002", "F003", "F004", "F005", "F006", "F007", "F010", "F011", "F018", "F019", "F020", "F057", "F058", "C142", "C147")


@rule("F050", "error", implied_by=FILES)
def missing_tensor(checkpoint, placement):
    for name, reason in sorted(placement.missing().items()):
        known = placement.spec.family is not None
        yield finding(f"{name} is in no weight file; {reason}", at=Place("", tensor=name), severity="" if known else "warning",
                      fix=Fix("fetch the shard that holds it, or take it from the base model", (), "manual"))


def bad():
    case = tiny()
    name = case.name("down", 1)
    del case.tensors[name]
    return case, f"{name} is in no weight file; 1 of 2 blocks have it"


def good():
    return tiny()
