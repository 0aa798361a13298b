"""The optional native library: its path, the instruction level in use, and its functions through ctypes.

ctypes releases the GIL during a call. A missing library is normal (setup.py found no compiler) and every caller has a
NumPy path; `native_path()` tells reports which one ran. DOCTOR_NATIVE=0 turns the library off, DOCTOR_NATIVE=base or
avx2 lowers the level.
"""

import ctypes
import os
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from doctor.core.errors import MachineError
from doctor.core.messages import _

LIBRARY = Path(__file__).with_name("libdoctor_cpu.so")
LEVELS = ("base", "avx2", "avx512")  # the order of cpu/cpu.c


@lru_cache(maxsize=1)
def _library() -> tuple[ctypes.CDLL, int] | None:
    if not LIBRARY.exists():
        return None
    try:
        library = ctypes.CDLL(str(LIBRARY))
        return library, library.doctor_cpu_level()
    except (OSError, AttributeError) as error:
        raise MachineError(
            _("{library}: the native library does not load: {error}.", library=LIBRARY, error=error),
            _("Reinstall the package here, or set DOCTOR_NATIVE=0 to work without it."),
        ) from error


def level() -> str | None:
    """The instruction level in use: "base", "avx2" or "avx512"; None if the library is absent or turned off."""
    wanted = os.environ.get("DOCTOR_NATIVE", "1")
    if wanted not in ("", "0", "1", *LEVELS):
        raise MachineError(
            _("DOCTOR_NATIVE={value}: must be 0, 1 or one of {levels}.", value=wanted, levels=", ".join(LEVELS)),
            _("Unset it."),
        )
    loaded = _library() if wanted != "0" else None
    if loaded is None:
        return None
    highest = loaded[1]
    return LEVELS[min(LEVELS.index(wanted), highest) if wanted in LEVELS else highest]


def native_path() -> str | None:
    """Path of the native library in use, None if NumPy counts."""
    return str(LIBRARY) if level() else None


@cache
def _symbol(name: str, result: Any) -> Any:
    loaded = _library()
    assert loaded is not None  # level() found it
    try:
        function = getattr(loaded[0], name)
    except AttributeError as error:
        raise MachineError(
            _("{library}: has no function {name}: it was built from older sources.", library=LIBRARY, name=name),
            _("Reinstall the package: pip install -e . or pip install ."),
        ) from error
    function.restype = result
    return function


def function(name: str, result: Any = None) -> Any:
    """The C function `name` at the level in use, or None without library.

    result: the ctypes type that it returns, the same in every call: ctypes has one object a function, which threads
    share. Arguments must be ctypes values: c_int64 for sizes, c_void_p for addresses.
    """
    chosen = level()
    return _symbol(f"{name}_{chosen}", result) if chosen else None
