"""Builds cuda/*.cu for the host with g++, and an Engine that runs them through the real launcher and a fake libcuda."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
CUDA = ROOT / "cuda"
SOURCES = ("gptq_block", "grid_search", "pack", "awq_difference", "kv_cache", "health_scan")
COMPILER = shutil.which("g++")
# -fno-strict-aliasing: kernels read floats by fours, as CUDA allows. FMA hardware, where there is one, is only faster.
FLAGS = [
    "-O2",
    "-std=c++17",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-fPIC",
    "-shared",
    "-x",
    "c++",
]
if platform.machine() == "x86_64" and " fma " in (
    Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
):
    FLAGS = ["-mfma", *FLAGS]
CACHE = ROOT / ".cache" / "cuda-tests"


def build(source: str, folder: Path, extra: tuple[str, ...] = (), edit=None) -> Path:
    """folder/<source>.so of cuda/<source>.cu; edit(text) -> text plants a fault in the .cu or, as {name: edit}, in a
    header.

    Unedited builds are kept under .cache, keyed by everything that goes into them.
    """
    texts = {p.name: p.read_text() for p in (CUDA / f"{source}.cu", CUDA / "core.cuh", CUDA / "shim.h")}
    for name, change in (edit or {}).items():
        changed = change(texts[name])
        assert changed != texts[name], f"the edit of {name} finds nothing to change"
        texts[name] = changed
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / f"{source}.so"
    key = hashlib.sha256(repr((sorted(texts.items()), FLAGS, extra, COMPILER)).encode()).hexdigest()[:24]
    kept = CACHE / f"{source}-{key}.so"
    if not kept.exists():
        work = folder / f"{source}.src"
        work.mkdir(exist_ok=True)
        for name, text in texts.items():
            (work / name).write_text(text)
        made = work / out.name
        flags = ["-O1" if edit and flag == "-O2" else flag for flag in FLAGS]  # built once, run once
        run = subprocess.run(
            [COMPILER, *flags, *extra, "-include", str(work / "shim.h"), str(work / f"{source}.cu"), "-o", str(made)],
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
        if edit:
            shutil.copyfile(made, out)
            return out
        CACHE.mkdir(parents=True, exist_ok=True)
        os.replace(shutil.copyfile(made, kept.with_suffix(f".{os.getpid()}")), kept)
    shutil.copyfile(kept, out)
    return out


def fake_libraries(folder: Path) -> ctypes.CDLL:
    """The fake libcuda and libnvrtc in one library, a fresh copy (its counters are its own)."""
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / "libfake_cuda.so"
    run = subprocess.run(
        [
            shutil.which("gcc") or COMPILER,
            "-O1",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-fPIC",
            "-shared",
            "-x",
            "c",
            str(Path(__file__).with_name("fake_cuda.c")),
            "-o",
            str(out),
            "-ldl",
        ],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return ctypes.CDLL(str(out))


def engine(folder: Path, builds: Path, library: ctypes.CDLL | None = None):
    """An Engine whose device is this CPU. builds: a folder of <source>.so."""
    from doctor.quant.solve.cuda import Compiler, Engine

    library = library or fake_libraries(folder)
    os.environ["FAKE_CUDA_BUILDS"] = str(builds)
    return Engine(library, Compiler(library), 0, folder / "kernels")
