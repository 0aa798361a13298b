"""The table of model classes (tests/coverage.py) tells a class that works from one that is refused before any work."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent.parent


def test_a_row_works_or_is_refused_before_work(tmp_path):
    pytest.importorskip("accelerate")
    pytest.importorskip("compressed_tensors")
    command = [sys.executable, TESTS / "coverage.py", "--rows", "Llama,T5", "--json", tmp_path / "rows.json"]
    environment = {k: v for k, v in os.environ.items() if k != "DOCTOR_LOAD_PROOF"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    assert run.returncode == 0 and "2 rows: 1 refusal, 1 works" in run.stdout, run.stdout + run.stderr
    llama, t5 = json.loads((tmp_path / "rows.json").read_text())
    assert llama["packed"] == 28 and llama["correlation"] > 0.9 and not llama["unnamed"]
    assert t5["why"].startswith("G321")


def test_every_row_names_a_class_of_transformers():
    import transformers
    from tiny_classes import CLASSES

    assert not [name for name, row in CLASSES.items() if not hasattr(transformers, row.architecture)]
    assert len(CLASSES) >= 95
