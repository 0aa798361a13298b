"""Errors, told apart by who must act; whatever else escapes is a bug of ours.

A message reads `where: what is, with numbers; what must be. What to do.` The hint is the last part, kept apart so that
the terminal can put it on a line of its own.
"""


class DoctorError(Exception):
    """An error whose message is meant for the user. `hint` says what to do next, or is empty."""

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class BadCheckpoint(DoctorError):
    """The files cannot be worked on at all. What a scan can get past is a finding instead."""


class PlanRefused(DoctorError):
    """Edits conflict, or were made for another state of the files: the user chooses."""


class NotQuantizable(DoctorError):
    """Numbers forbid it. Inside the loop over linears this becomes a finding."""


class CudaError(DoctorError):
    """The device or its compiler refused; carries kernel, shapes and code in its message."""


class MachineError(DoctorError):
    """Disk, memory, permissions or network of this machine."""


class CheckpointNotReady(DoctorError):
    """Raised by Report.raise_for_findings: there are findings at or above the asked severity."""
