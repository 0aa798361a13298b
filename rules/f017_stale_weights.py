"""F017 stale-weights: beside the shards of the index lies another set of weights under a name that readers look for
first.

Why: transformers prefers a single model.safetensors to an index, others read every *.safetensors. So one directory is
two models, and an old file quietly wins.

Do: move the file that does not belong away. The index lists those that do.

False alarms: Mistral's consolidated.safetensors and other names that no reader looks for by itself are not counted.

Fix safety: unsafe: the copy does not get the file; the source keeps it. It may be the newer one of the two.

Sources: transformers src/transformers/modeling_utils.py, `_get_resolved_checkpoint_files`: model.safetensors before its
index; AutoGPTQ issue 306 (a stale file mixed with a new index gave NaN).
"""

import re

from doctor.lint.rule import DropFile, Fix, Place, finding, rule
from doctor.lint.testing import shard_bytes, tiny

LOOKED_FOR = re.compile(r"^model(-\d{5}-of-\d{5})?\.safetensors$")


@rule("F017", "warning")
def stale_weights(checkpoint, files, weight_map):
    if not weight_map:
        return
    listed = set(weight_map.values())
    for name in sorted(files):
        if LOOKED_FOR.match(name) and name not in listed:
            first = " and transformers reads it first" if name == "model.safetensors" else ""
            yield finding(
                f"{name} ({files[name].size:,} bytes) is not in the index{first}",
                at=Place(name),
                evidence={"bytes": files[name].size},
                fix=Fix(f"leave {name} out", (DropFile(name),), "unsafe"),
                advice=f"move {name} away if it belongs to an older save",
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
