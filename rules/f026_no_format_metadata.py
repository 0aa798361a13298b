"""F026 no-format-metadata: weight file has no format metadata.

Why: transformers before version 5 requires `"format": "pt"` in the header and stops without it. Newer versions and all
other readers ignore it.

Seen as:
- transformers: `does not contain the valid metadata. Make sure you save your model with the `save_pretrained` method`

Do: nothing for current tools. For transformers 4, save again with `save_file(tensors, path, metadata={"format":
"pt"})`. Every file that doctor writes has it.

False alarms: files that only your own programs read.

Fix safety: only the header changes, but only by name: writing a header means writing its whole file, however large.

Sources: transformers 4.57 src/transformers/modeling_utils.py, `load_state_dict`; tried with 5.23: loads.
"""

import json
import struct

from doctor.lint.rule import Fix, NameFormat, Place, _, finding, rule
from doctor.lint.testing import shard_bytes, tiny


@rule("F026", "info")
def no_format_metadata(checkpoint, shards):
    sound = {n: s.metadata or {} for n, s in shards.items() if s.tensors and not s.defects}
    without = [n for n, metadata in sound.items() if "format" not in metadata]
    for name, metadata in sound.items():
        if (stated := metadata.get("format")) not in (None, "pt", "mlx"):
            yield finding(
                _("{file} states the format {stated!r} in its metadata; must be 'pt'", file=name, stated=stated[:40]),
                at=Place(name, byte=8),
                evidence={"format": stated[:40]},
                fix=Fix(_("write the format into the header"), (NameFormat(name),), "unsafe", by_name=True),
                advice=_("transformers 4 takes tf and flax for weights of another framework, and refuses other words"),
            )
    if without:
        yield finding(
            _("{file} has no format in its metadata; transformers 4 refuses it", file=without[0])
            if len(without) == 1
            else _(
                "{count} of {total} weight files have no format in their metadata; transformers 4 refuses them",
                count=len(without),
                total=len(shards),
            ),
            at=Place(without[0], byte=8),
            evidence={"files": len(without)},
            fix=Fix(
                _("write the format into the header"), tuple(NameFormat(n) for n in without), "unsafe", by_name=True
            ),
            advice=_("save again with metadata={'format': 'pt'} if transformers 4 must read it"),
        )


def bad():
    case = tiny()
    raw = shard_bytes({n: case.tensors[n] for n in sorted(case.tensors)}, case.dtypes)
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    del header["__metadata__"]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    case.files["model.safetensors"] = struct.pack("<Q", len(text)) + text + raw[8 + length :]
    return case, "model.safetensors has no format in its metadata; transformers 4 refuses it"


def good():
    return tiny()
