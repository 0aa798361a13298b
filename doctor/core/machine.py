"""What this machine has against what quantizing needs, in bytes that were measured elsewhere, so that rules stay pure.

Nothing here asks the machine. doctor.quant.capacity measures disk and memory where it knows the output directory, and
gives a Machine; without one the rules on capacity are skipped and say so.
"""

from dataclasses import dataclass

from doctor.core.facts import FactKey, Unavailable, fact, provide
from doctor.core.messages import _


@dataclass(frozen=True)
class Machine:
    """Bytes free and needed. memory_need holds for any number of calibration rows; disk_need is the peak at `place`."""

    place: str
    memory_free: int
    memory_need: int
    disk_free: int
    disk_need: int


GIVEN_MACHINE: FactKey[Machine | None] = provide(
    "given_machine", "checkpoint", "header", "What was measured of this machine (machine.Machine); None if nothing was."
)


@fact("checkpoint")
def machine(checkpoint, given_machine) -> Machine:
    """The machine that will quantize (machine.Machine)."""
    if given_machine is None:
        raise Unavailable(_("no place for the output was named: --capacity DIR measures disk and memory"))
    return given_machine
