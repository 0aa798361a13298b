"""Python's search for reference cycles, switched off where a million small objects are made and none is in a cycle."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """No search for cycles inside. Headers, facts and findings make none, and it is a quarter to a half of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
