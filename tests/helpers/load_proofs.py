"""Outputs of the client tests, loaded by transformers of .cache/venv-hf: its libraries unpack GPTQ too."""

import os
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from doctor.evaluate.clients.load_proof import prove_loading

ROOT = Path(__file__).resolve().parents[2]
WHOLE: list[str] = []  # a line an output


def prove(folder: Path, properties: list, *, left_out: str = "") -> None:
    """Fails where the output does not load whole. left_out: a part of names that transformers is known to pass over,
    packed experts (G319) or towers (G323); all else must load.
    """
    environment = ROOT / ".cache" / "venv-hf"
    if not (environment / "finished").exists():
        pytest.skip("venv-hf is not built: make test-clients")
    with (
        mock.patch.object(sys, "executable", str(environment / "bin" / "python")),
        mock.patch.dict(os.environ, PYTHONPATH=str(ROOT)),
    ):
        found = prove_loading(folder)
    rest = found
    if left_out:
        assert found.missing and found.unexpected, found
        rest = replace(
            found,
            missing=tuple(n for n in found.missing if left_out not in n),
            unexpected=tuple(n for n in found.unexpected if left_out not in n),
        )
    assert rest.whole and rest.packed, rest
    told = f"{found.packed} packed, {found.compared} unpacked equal"
    properties.append(("load proof", f"{folder.parent.name}/{folder.name}: {found.client}, {told}"))


def summary(terminalreporter) -> None:
    if not WHOLE:
        return
    terminalreporter.write_line(f"load proofs: {len(set(WHOLE))} outputs load whole")
    if terminalreporter.verbosity > 0:
        for line in sorted(set(WHOLE)):
            terminalreporter.write_line(f"  {line}")
