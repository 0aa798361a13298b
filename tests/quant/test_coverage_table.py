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
    rows = ("Qwen3-VL", "GPT-2", "T5")  # a tower, a class of transposed linears, two halves
    command = [sys.executable, TESTS / "coverage.py", "--rows", ",".join(rows), "--json", tmp_path / "rows.json"]
    environment = {k: v for k, v in os.environ.items() if k != "DOCTOR_LOAD_PROOF"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    assert run.returncode == 0 and "3 of 3 rows: 1 other client, 2 works" in run.stdout, run.stdout + run.stderr
    *written, gpt2, t5 = json.loads((tmp_path / "rows.json").read_text())
    for row in (*written, t5):
        assert row["packed"] >= 20 and row["correlation"] > 0.9 and not row["unnamed"], row
    assert gpt2["why"].startswith("G323") and gpt2["packed"] == 16 and gpt2["correlation"] > 0.9
    assert t5["scheme"] == "FP8_DYNAMIC"


def test_every_family_of_the_rules_tests_is_a_row():
    from healthy_models import FAMILIES, UNKNOWN
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    assert not [name for name in (*FAMILIES, *UNKNOWN) if name not in CONFIG_MAPPING]
    assert len({*FAMILIES, *UNKNOWN}) >= 103


def test_every_row_names_a_class_of_transformers():
    import transformers
    from tiny_classes import CLASSES

    assert not [name for name, row in CLASSES.items() if not hasattr(transformers, row.architecture)]
    assert len(CLASSES) >= 95
