"""G314 disk-too-small: the disk has less room than the output takes while it is written.

Why: a run of hours ends at the save. For a moment the parts of each block and the shards they are joined into exist
together, so the disk must hold the output twice.

Seen as:
- Python: `OSError: [Errno 28] No space left on device`
- safetensors: `No space left on device (os error 28)`
- PyTorch: `basic_ios::clear: iostream error`

Do: free the bytes named, or write to another disk.

False alarms: another program may free room before the end. The size of the output is worked out from the headers, and
is an upper edge.

Fix safety: no fix is needed in the files.

Sources: unslothai/unsloth issue 847; ModelCloud/GPTQModel issue 2196.
"""

from doctor.lint.rule import finding, rule
from doctor.lint.testing import change, roomy

GIB = 2**30


@rule("G314", "warning", certainty="likely")
def disk_too_small(checkpoint, machine, layout):
    if layout.quantized or machine.disk_need <= machine.disk_free:
        return
    yield finding(
        f"{machine.place} has {machine.disk_free / GIB:.1f} GiB free; writing takes {machine.disk_need / GIB:.1f} GiB",
        evidence={"disk_free": machine.disk_free, "disk_need": machine.disk_need},
        advice=f"free {(machine.disk_need - machine.disk_free) / GIB:.1f} GiB, or write to another disk",
    )


def bad():
    case = roomy()
    change(case, "checkpoint:", "given_machine", disk_free=3 * GIB, disk_need=5 * GIB)
    return case, "OUT has 3.0 GiB free; writing takes 5.0 GiB"


def good():
    case = roomy()
    change(case, "checkpoint:", "given_machine", disk_free=5 * GIB, disk_need=5 * GIB)
    return case
