"""R1: bench/gpu.py line by line on a device that is pretended (pretend.py), small: what dies here would have cost a run
on a real one.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

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
    monkeypatch.setattr(
        module, "milliseconds", lambda work, repeats=1, prepare=None: (prepare and prepare(), work(), 1.0)[2]
    )
    return module


def test_every_row_of_the_table_is_measured(gpu, host_engine, tmp_path):
    with pretend(host_engine):
        failed = gpu.table(
            PLACE, tmp_path, side=256, large=256, wide=(384, 64), copy=1 << 12, tokens=512, cached=1 << 12
        )
    text = (tmp_path / "table.md").read_text()
    assert not failed and "failed" not in text, text
    assert text.count("\n| ") >= 30
    wanted = text.partition("| wanted | bound | measured | met |")[2].splitlines()[2:5]  # every run lasts 1 ms here
    assert [line.rpartition(" | ")[2] for line in wanted] == [
        "no |",
        "yes |",
        "no |",
    ] and "against the torch loop" in wanted[0]


def test_a_row_that_fails_leaves_the_others(gpu, tmp_path):
    bench = gpu.Bench(torch.device("cpu"))

    def fails():
        raise RuntimeError("out of memory")

    assert bench.row("a", fails) is None and bench.row("b", lambda: 2.0, 8e6) == 2.0
    assert "| a | failed: RuntimeError: out of memory | | | |" in bench.lines and bench.rate == 4.0
    assert all(line.endswith("| failed | no |") for line in bench.wanted()[2:])


def test_the_sanitizer_meets_every_kernel(gpu):
    """Its tests are chosen by name, and a name that is not there chooses nothing in silence."""
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-o",
            "addopts=",
            "--collect-only",
            "-q",
            "-p",
            "no:cacheprovider",
            "tests/cuda/test_kernels.py",
            "-k",
            gpu.SANITIZED,
        ],
        capture_output=True,
        text=True,
        cwd=host.ROOT,
    )
    names = {line.partition("::")[2].partition("[")[0] for line in run.stdout.splitlines() if "[gpu" in line}
    assert run.returncode == 0 and names >= {
        "test_ragged_shapes_round_as_the_reference",
        "test_a_refinement_is_the_references",
        "test_grids_are_the_references",
        "test_bit_streams_are_the_packers",
        "test_awq_words_are_the_packers",
        "test_gptq_words_become_the_references_weights",
        "test_awq_words_become_the_references_weights",
        "test_awq_differences_are_the_references",
        "test_a_cached_key_reads_back_as_exllamav2s",
        "test_a_scan_counts_what_the_cpu_counts",
    }, run.stdout
    assert "[host" not in run.stdout and run.stdout.count("[gpu") < 70, "more than its minutes allow"


def test_goldens_are_recorded_as_they_are_read(gpu, host_engine, tmp_path):
    with pretend(host_engine):
        gpu.goldens(PLACE, tmp_path)
    found = json.loads((tmp_path / "cuda.json").read_text())
    for source in host.SOURCES:
        assert found["sources"][source] == {
            "source": source_hash(source),
            "digests": digest(run(source, host_engine, torch.device("cpu"))),
        }


def test_a_model_goes_from_directory_to_directory(gpu, host_engine, tmp_path, capsys):
    with pretend(host_engine):
        failed = gpu.model(PLACE, tmp_path, rows=4, length=64, layers=2, hidden=128, inner=128, heads=2)
    said = capsys.readouterr().out
    assert not failed and "14 gptq" in said and "layer 2 of 2" in said, said


def test_wheels_and_the_native_library_come_along(gpu, tmp_path, monkeypatch):
    """A checkout as it travels: nothing built, and a Python that lacks a package."""
    import zipfile

    monkeypatch.setattr(gpu, "ROOT", tmp_path / "checkout")
    shutil.copytree(
        host.ROOT,
        tmp_path / "checkout",
        ignore=shutil.ignore_patterns(".venv", ".cache", ".git", "*.so", "build", "tests", "docs", "fixtures"),
    )
    with zipfile.ZipFile(tmp_path / "one-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("one/__init__.py", "")
    first = Path(gpu.places(tmp_path).split(":")[0])
    assert (first / "one" / "__init__.py").exists() and not (first / "doctor" / "scan" / "libdoctor_cpu.so").exists()
    assert (
        gpu.build_library() == "built"
        and (first / "doctor" / "scan" / "libdoctor_cpu.so").exists()
        and gpu.build_library() == "there already"
    )
    monkeypatch.setattr(gpu.sys, "executable", "/bin/false")
    old = tmp_path / "checkout" / "doctor" / "scan" / "libdoctor_cpu.so"
    old.write_bytes(b"of older sources")
    os.utime(old, (0, 0))
    gpu.places()
    assert (
        gpu.build_library().startswith("not built, NumPy reads the model")
        and not (first / "doctor" / "scan" / old.name).exists()
        and old.exists()
    )


def test_a_step_is_ended_at_its_limit_and_the_next_one_runs(gpu, tmp_path, monkeypatch):
    assert (
        gpu.one_step("a", [sys.executable, "-c", "import time; time.sleep(60)"], 1, None, tmp_path / "a")[0]
        == "ended at its limit of 1 s"
    )
    assert (
        gpu.one_step("b", [sys.executable, "-c", "raise SystemExit(3)"], 30, None, tmp_path / "b")[0] == "failed with 3"
    )
    assert gpu.one_step("c", [sys.executable, "-c", "print(1)"], 30, None, tmp_path / "a")[0] == "passed"
    assert (tmp_path / "a").read_text().endswith("== c\n1\n"), "one file holds all steps, and each shows its own part"


def test_a_checkout_runs_without_an_installation(gpu):
    """Under an isolated interpreter that knows only torch's packages and what places() lays out."""
    packages = [p for p in sys.path if p.endswith("site-packages")]
    code = (
        f"import sys; own = [p for p in sys.path if 'site-packages' not in p]; "
        f"sys.path[:] = {gpu.places().split(':')!r} + own + {packages!r}; "
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f).lower()]; "
        "from doctor.lint.engine import load_rules; from doctor.core import tables; "
        "from doctor.quant.solve import cuda; "
        "print(len(load_rules()), cuda.source_folder().name, len(tables.family_names()))"
    )
    run = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, cwd="/")
    assert run.returncode == 0, run.stderr
    rules, folder, tables = run.stdout.split()
    assert int(rules) > 100 and folder == "cuda" and int(tables) > 0


def test_without_a_gpu_it_says_so_and_runs_nothing():
    run = subprocess.run(
        [sys.executable, "bench/gpu.py"],
        capture_output=True,
        text=True,
        cwd=host.ROOT,
        env={"PATH": "/usr/bin", "DOCTOR_KERNELS": "0"},
    )
    assert run.returncode == 3 and run.stdout.startswith(
        "no GPU here: DOCTOR_KERNELS=0 turns them off. Nothing was run."
    )
