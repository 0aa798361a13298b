"""What the tests of the command line share."""

import os

import pytest


@pytest.fixture
def plain_environment(monkeypatch):
    """No setting of doctor from the environment, but for the switch that keeps tests from asking transformers."""
    for name in list(os.environ):
        if name.startswith("DOCTOR_") and name != "DOCTOR_LOAD_PROOF":
            monkeypatch.delenv(name)
