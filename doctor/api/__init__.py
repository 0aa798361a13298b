"""All that a user imports, a function a job: check, fix, quantize, convert, tune, verify, compare, kvcache and others.

Modules that only some of them need are imported where they are needed, because a check of headers alone must be fast.
"""

from doctor.api.checking import check
from doctor.api.fixing import fix, recover, undo
from doctor.api.measuring import advise, compare, explain, kvcache, verify
from doctor.api.quantizing import convert, plan_quantize, quantize, try_recipes, tune

__all__ = [
    "advise",
    "check",
    "compare",
    "convert",
    "explain",
    "fix",
    "kvcache",
    "plan_quantize",
    "quantize",
    "recover",
    "try_recipes",
    "tune",
    "undo",
    "verify",
]
