"""Finds, explains and fixes what makes quantizing a language model fail, then quantizes it.

Importing this package imports no torch: the names below are loaded when they are first used.
"""

import sys

# `python -m doctor` puts the working directory first in the search path, which may hold a download with a torch.py or a
# json.py. Python names the program "-m" while it looks for a module to run; -P would have left the directory out.
if (
    sys.argv[:1] == ["-m"]
    and "doctor" in sys.orig_argv[1:]
    and not sys.flags.safe_path
    and not __file__.startswith(sys.path[0].rstrip("/") + "/doctor/")
):
    del sys.path[0]

from importlib import import_module
from typing import TYPE_CHECKING

from doctor.core.version import __version__

_HOME = {
    "check": "doctor.api",
    "fix": "doctor.api",
    "quantize": "doctor.api",
    "verify": "doctor.api",
    "compare": "doctor.api",
    "kvcache": "doctor.api",
    "advise": "doctor.api",
    "explain": "doctor.api",
    "convert": "doctor.api",
    "tune": "doctor.api",
    "StopAtNonfinite": "doctor.evaluate.training",
    "Recipe": "doctor.core.recipe",
    "Finding": "doctor.core.finding",
    "Report": "doctor.lint.engine",
    "DoctorError": "doctor.core.errors",
    "CheckpointNotReady": "doctor.core.errors",
}
__all__ = [
    "CheckpointNotReady",
    "DoctorError",
    "Finding",
    "Recipe",
    "Report",
    "StopAtNonfinite",
    "__version__",
    "advise",
    "check",
    "compare",
    "convert",
    "explain",
    "fix",
    "kvcache",
    "quantize",
    "tune",
    "verify",
]


if TYPE_CHECKING:  # for mypy and editors: the names above, with their types
    from doctor.api import advise, check, compare, convert, explain, fix, kvcache, quantize, tune, verify
    from doctor.core.errors import CheckpointNotReady, DoctorError
    from doctor.core.finding import Finding
    from doctor.core.recipe import Recipe
    from doctor.evaluate.training import StopAtNonfinite
    from doctor.lint.engine import Report
else:

    def __getattr__(name):
        if name in _HOME:
            return getattr(import_module(_HOME[name]), name)
        raise AttributeError(f"module 'doctor' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_HOME])
