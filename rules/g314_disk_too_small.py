"""G314 disk-too-small: not enough free disk space for the output.

Why: a run of hours fails at the save. For a moment the parts of each decoder layer and the shards that they are joined
into exist together, so the disk must hold the output twice.

Seen as:
- Python: `OSError: [Errno 28] No space left on device`
- safetensors: `No space left on device (os error 28)`
- PyTorch: `basic_ios::clear: iostream error`

Do: free the bytes named, or write to another disk.

False alarms: another program may free space before the end. The size of the output is computed from the headers and is
an upper bound.

Fix safety: no fix is needed in the files.

Sources: unslothai/unsloth issue 847; ModelCloud/GPTQModel issue 2196.
"""

from doctor.lint.rule import _, finding, rule
from doctor.lint.testing import change, with_capacity

GIB = 2**30


@rule("G314", "warning", certainty="likely")
def disk_too_small(checkpoint, machine, layout):
    if layout.quantized or machine.disk_need <= machine.disk_free:
        return
    yield finding(
        _(
            "{place} has {free:.1f} GiB free; writing takes {need:.1f} GiB",
            place=machine.place,
            free=machine.disk_free / GIB,
            need=machine.disk_need / GIB,
        ),
        evidence={"disk_free": machine.disk_free, "disk_need": machine.disk_need},
        advice=_("free {size:.1f} GiB, or write to another disk", size=(machine.disk_need - machine.disk_free) / GIB),
    )


def bad():
    case = with_capacity()
    change(case, "checkpoint:", "given_machine", disk_free=3 * GIB, disk_need=5 * GIB)
    return case, "OUT has 3.0 GiB free; writing takes 5.0 GiB"


def good():
    case = with_capacity()
    change(case, "checkpoint:", "given_machine", disk_free=5 * GIB, disk_need=5 * GIB)
    return case
