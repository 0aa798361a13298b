"""What the machine has against what quantizing takes: bytes that somebody measured, so that rules stay pure.

Nothing here asks the machine. Who knows where the output will lie measures (doctor.quant.capacity) and gives a Machine;
without one the rules on it are skipped and say so.
"""

from dataclasses import dataclass

from doctor.core.facts import Unavailable, fact, provide

provide(
    "given_machine",
    "checkpoint",
    "header",
    "What was measured of this machine (machine.Machine), None where nobody asked.",
)


@dataclass(frozen=True)
class Machine:
    """Bytes. memory_need holds whatever the number of calibration rows; disk_need is the most that lies at `place` at
    one time.
    """

    place: str
    memory_free: int
    memory_need: int
    disk_free: int
    disk_need: int


@fact("checkpoint")
def machine(checkpoint, given_machine):
    """The machine that will quantize (machine.Machine)."""
    if given_machine is None:
        raise Unavailable("no place for the output was named: --capacity DIR measures disk and memory")
    return given_machine
