"""NumPy, imported when it is first used: `doctor check` of headers, `explain` and `rules` need none of it, and its
import takes 0.1 s, a third of such a command. A module that uses it writes `from doctor.core.lazy_numpy import np`, and
`from __future__ import annotations` where it names np.ndarray in a signature.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any


class _LazyModule:
    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(import_module(self._name), attribute)
        setattr(self, attribute, value)  # found without this function from now on
        return value


if TYPE_CHECKING:
    import numpy as np
else:
    np = _LazyModule("numpy")
