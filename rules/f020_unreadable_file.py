"""F020 unreadable-file: a file of the checkpoint cannot be opened, or is no file at all.

Why: whatever it holds is absent for every reader. Since version 0.8 safetensors writes files that only their owner may
read, which another user or a container then cannot open.

Seen as:
- Python: `PermissionError: [Errno 13] Permission denied`
- Python: `OSError: [Errno 5] Input/output error`

Do: `chmod a+r` the file, or copy it from a disk that still reads it.

False alarms: none known.

Fix safety: with `--from` the base's file of this name, unsafe unless another shard shows that the two are one model.
Else manual: permissions and disks are outside the checkpoint.

Sources: safetensors 0.8: a file saved under any umask has mode 0600 (tried).
"""

import os

from doctor.lint.rule import Place, finding, from_base, rule
from doctor.lint.testing import tiny


@rule("F020", "error")
def unreadable_file(checkpoint, listing_problems, shards, base):
    for defect in listing_problems:
        if defect.kind in ("unreadable", "special-file"):
            yield finding(
                f"{defect.tensor}: {defect.detail}",
                at=Place(defect.tensor),
                evidence={"kind": defect.kind},
                fix=from_base(base, defect.tensor, "make the file readable, or copy it again"),
            )


def bad():
    case = tiny()
    case.damage.append(lambda folder: os.mkfifo(folder / "pipe.json"))
    return case, "pipe.json: neither a file nor a directory"


def good():
    return tiny()


def donor():
    """What the unreadable is taken from."""
    case = tiny()
    case.files["pipe.json"] = b"{}"
    return case
