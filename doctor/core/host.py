"""Where a run took place, for its report: versions, processor, memory. Nothing is imported to find out, least of all
torch.
"""

import os
import platform
import sys
import time
from importlib import metadata

from doctor.core.version import __version__

PACKAGES = ("torch", "transformers", "numpy")


def describe() -> dict[str, str]:
    """What -> text: the time, versions of doctor, Python and the packages that are installed, system, processor, cores,
    memory, GPUs.
    """
    found = {
        "when": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "doctor": __version__,
        "Python": platform.python_version(),
    }
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found["system"] = f"{platform.system()} {platform.release()} {platform.machine()}"
    found["processor"] = _processor()
    found["cores"] = str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    found["memory"] = (
        f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB" if hasattr(os, "sysconf") else ""
    )
    found["GPU"] = _gpus()
    return {name: text for name, text in found.items() if text}


def _processor() -> str:
    """The model's name; Linux tells it in /proc/cpuinfo alone."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            named = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "")
    except OSError:
        named = ""
    return named or platform.processor()


def _gpus() -> str:
    """Those that a torch in use sees; "" where this run had no torch, and none were asked for."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return ""
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
