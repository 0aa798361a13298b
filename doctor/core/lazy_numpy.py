"""NumPy, imported when it is first used: `doctor check --stage header`, `explain` and `rules` need none of it, and it
takes 0.1 s to import, a third of such a command. A module that uses it writes `from doctor.core.lazy_numpy import np`,
and `from __future__ import annotations` where it names np.ndarray in a signature.
"""

from importlib import import_module


class _Lazy:
    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str):
        value = getattr(import_module(self._name), attribute)
        setattr(self, attribute, value)  # found without this function from now on
        return value


np = _Lazy("numpy")
