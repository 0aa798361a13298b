"""F017 stale-weights: weight file that is not in the index shadows the shards.

Why: transformers prefers a single model.safetensors to an index; other readers open every *.safetensors. So one
directory holds two models, and the old file wins without a warning.

Do: move the file that does not belong away. The index lists the files that do.

False alarms: Mistral's consolidated.safetensors and other names that no reader opens by default are not counted.

Fix safety: unsafe: the output does not get the file; the source keeps it. It may be the newer of the two.

Sources: transformers src/transformers/modeling_utils.py, `_get_resolved_checkpoint_files`: model.safetensors before its
index; AutoGPTQ issue 306 (a stale file mixed with a new index gave NaN).
"""

import re

from doctor.lint.rule import DropFile, Fix, Place, _, finding, rule
from doctor.lint.testing import shard_bytes, tiny

LOOKED_FOR = re.compile(r"^model(-\d{5}-of-\d{5})?\.safetensors$")


@rule("F017", "warning", implied_by=("F028",))
def stale_weights(checkpoint, files, weight_map):
    if not weight_map:
        return
    listed = set(weight_map.values())
    for name in sorted(files):
        if LOOKED_FOR.match(name) and name not in listed:
            size = files[name].size
            yield finding(
                _("{file} ({size:,} bytes) is not in the index and transformers reads it first", file=name, size=size)
                if name == "model.safetensors"
                else _("{file} ({size:,} bytes) is not in the index", file=name, size=size),
                at=Place(name),
                evidence={"bytes": size},
                fix=Fix(_("leave {file} out", file=name), (DropFile(name),), "unsafe"),
                advice=_("move {file} away if it belongs to an older save", file=name),
            )


def bad():
    case = tiny()
    case.shards = 2
    old = shard_bytes({n: case.tensors[n] for n in sorted(case.tensors)}, case.dtypes)
    case.files["model.safetensors"] = old
    return case, f"model.safetensors ({len(old):,} bytes) is not in the index and transformers reads it first"


def good():
    case = tiny()
    case.shards = 2
    return case
