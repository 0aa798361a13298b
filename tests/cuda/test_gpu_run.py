"""R1: bench/gpu.py line by line on a device that is pretended (pretend.py), small: what dies here would have cost a run on a real one."""

import importlib.util
import json
import subprocess
import sys

import host
import pytest
import torch
from pretend import PLACE, pretend
from test_goldens import digest, run, source_hash

pytestmark = pytest.mark.R1


@pytest.fixture
def gpu(monkeypatch):
    spec = importlib.util.spec_from_file_location("bench_gpu", host.ROOT / "bench" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "milliseconds", lambda work, repeats=1, prepare=None: (prepare and prepare(), work(), 1.0)[2])
    return module


def test_every_row_of_the_table_is_measured(gpu, host_engine, tmp_path):
    with pretend(host_engine):
        failed = gpu.table(PLACE, tmp_path, side=256, large=256, wide=(384, 64), copy=1 << 12, tokens=512, cached=1 << 12)
    text = (tmp_path / "table.md").read_text()
    assert not failed and "failed" not in text, text
    assert text.count("\n| ") >= 30


def test_a_row_that_fails_leaves_the_others(gpu, tmp_path):
    bench = gpu.Bench(torch.device("cpu"))

    def fails():
        raise RuntimeError("out of memory")

    assert bench.row("a", fails) is None and bench.row("b", lambda: 2.0, 8e6) == 2.0
    assert "| a | failed: RuntimeError: out of memory | | | |" in bench.lines and bench.rate == 4.0


def test_goldens_are_recorded_as_they_are_read(gpu, host_engine, tmp_path):
    with pretend(host_engine):
        gpu.goldens(PLACE, tmp_path)
    found = json.loads((tmp_path / "cuda.json").read_text())
    for source in host.SOURCES:
        assert found["sources"][source] == {"source": source_hash(source), "digests": digest(run(source, host_engine, torch.device("cpu")))}


def test_a_model_goes_from_directory_to_directory(gpu, host_engine, tmp_path, capsys):
    with pretend(host_engine):
        failed = gpu.model(PLACE, tmp_path, rows=4, length=64, layers=2, hidden=128, inner=128, heads=2)
    said = capsys.readouterr().out
    assert not failed and "14 gptq" in said and "block 2 of 2" in said, said


def test_a_step_is_ended_at_its_limit_and_the_next_one_runs(gpu, tmp_path, monkeypatch):
    assert gpu.one_step("a", [sys.executable, "-c", "import time; time.sleep(60)"], 1, None, tmp_path / "a")[0] == "ended at its limit of 1 s"
    assert gpu.one_step("b", [sys.executable, "-c", "raise SystemExit(3)"], 30, None, tmp_path / "b")[0] == "failed with 3"
    assert gpu.one_step("c", [sys.executable, "-c", "print(1)"], 30, None, tmp_path / "c")[0] == "passed"


def test_a_checkout_runs_without_an_installation(gpu):
    """Under an isolated interpreter that knows only torch's packages and what places() lays out."""
    packages = [p for p in sys.path if p.endswith("site-packages")]
    code = (f"import sys; sys.path[:] = {gpu.places().split(':')!r} + [p for p in sys.path if 'site-packages' not in p] + {packages!r}; "
            "sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f).lower()]; "
            "from doctor.engine import load_rules; from doctor import tables; from doctor.quant import kernels; "
            "print(len(load_rules()), kernels.source_folder().name, len(tables.table('architectures')))")
    run = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, cwd="/")
    assert run.returncode == 0, run.stderr
    rules, folder, tables = run.stdout.split()
    assert int(rules) > 100 and folder == "cuda" and int(tables) > 0


def test_without_a_gpu_it_says_so_and_runs_nothing():
    run = subprocess.run([sys.executable, "bench/gpu.py"], capture_output=True, text=True, cwd=host.ROOT, env={"PATH": "/usr/bin", "DOCTOR_KERNELS": "0"})
    assert run.returncode == 3 and run.stdout.startswith("no GPU here: DOCTOR_KERNELS=0 turns them off. Nothing was run.")
