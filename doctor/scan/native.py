"""The optional native library: where it is, which instruction level runs here, and its functions through ctypes.

ctypes drops the GIL during a call. A missing library is normal (setup.py found no compiler) and every caller has a
NumPy path; `native_path()` lets reports say which one ran. DOCTOR_NATIVE=0 turns the library off, DOCTOR_NATIVE=base
or avx2 lowers the level.
"""

import ctypes
import os
from functools import cache, lru_cache
from pathlib import Path

from doctor.core.errors import MachineError

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
            f"{LIBRARY}: the native library does not load: {error}.",
            "Reinstall the package here, or set DOCTOR_NATIVE=0 to work without it.",
        ) from error


def level() -> str | None:
    """The instruction level in use: "base", "avx2" or "avx512"; None if the library is absent or turned off."""
    wanted = os.environ.get("DOCTOR_NATIVE", "1")
    if wanted not in ("", "0", "1", *LEVELS):
        raise MachineError(f"DOCTOR_NATIVE={wanted}: must be 0, 1 or one of {', '.join(LEVELS)}.", "Unset it.")
    loaded = _library() if wanted != "0" else None
    if loaded is None:
        return None
    highest = loaded[1]
    return LEVELS[min(LEVELS.index(wanted), highest) if wanted in LEVELS else highest]


def native_path() -> str | None:
    """Path of the native library in use, None where NumPy does the work."""
    return str(LIBRARY) if level() else None


@cache
def _symbol(name: str, result):
    try:
        function = getattr(_library()[0], name)
    except AttributeError as error:
        raise MachineError(
            f"{LIBRARY}: has no function {name}: it was built from older sources.",
            "Reinstall the package: pip install -e . or pip install .",
        ) from error
    function.restype = result
    return function


def function(name: str, result=None):
    """The C function `name` at the level in use, or None without library.

    result: the ctypes type that it returns, the same in every call: ctypes has one object a function, which threads
    share. Arguments must be ctypes values: c_int64 for sizes, c_void_p for addresses.
    """
    chosen = level()
    return _symbol(f"{name}_{chosen}", result) if chosen else None
