"""F020 unreadable-file: file cannot be read, or is not a regular file.

Why: whatever it holds is missing for every reader. Since version 0.8 safetensors writes files that only their owner may
read; another user or a container cannot open them.

Seen as:
- Python: `PermissionError: [Errno 13] Permission denied`
- Python: `OSError: [Errno 5] Input/output error`

Do: `chmod a+r` the file, or copy it from a disk that still reads it.

False alarms: none known.

Fix safety: with `--from` the donor's file of this name is used: unsafe unless another shard shows that the two are one
model. Else manual: permissions and disks are outside the checkpoint.

Sources: safetensors 0.8: a file saved under any umask has mode 0600 (tried).
"""

import os

from doctor.lint.rule import Place, _, finding, from_base, rule
from doctor.lint.testing import tiny


@rule("F020", "error")
def unreadable_file(checkpoint, listing_problems, shards, base):
    for defect in listing_problems:
        if defect.kind in ("unreadable", "special-file"):
            yield finding(
                _("{file}: {detail}", file=defect.tensor, detail=defect.detail),
                at=Place(defect.tensor),
                evidence={"kind": defect.kind},
                fix=from_base(base, defect.tensor, _("make the file readable, or copy it again")),
            )


def bad():
    case = tiny()
    case.damage.append(lambda folder: os.mkfifo(folder / "pipe.json"))
    return case, "pipe.json: neither a file nor a directory"


def good():
    return tiny()


def donor():
    """The checkpoint of --from that has the file."""
    case = tiny()
    case.files["pipe.json"] = b"{}"
    return case
