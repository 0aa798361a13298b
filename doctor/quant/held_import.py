"""Ctrl-C while torch is imported waits until it is there.

torch's initialization calls Python from C++ that lets no exception through: a KeyboardInterrupt there ends the process
by SIGABRT ("terminate called after throwing an instance of 'pybind11::error_already_set'", torch 2.13), without a word
to the user and without cleaning up. So in a process that is doctor's own the signal is noted, and raised behind the
import.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType

_HELD = "torch"


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        with held():
            super().exec_module(module)


class _Finder:
    """Finds torch where Python would, and has it loaded without interruption."""

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if name != _HELD:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def install() -> None:
    """From now on, when torch is imported for the first time in this process."""
    if _HELD not in sys.modules:
        sys.meta_path.insert(0, _Finder())


@contextmanager
def held() -> Iterator[None]:
    """Inside it SIGINT waits; behind it KeyboardInterrupt is raised if it came. Where another handler than Python's own
    is set, or another thread asks, nothing changes.
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return
    came: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if came:
        raise KeyboardInterrupt
