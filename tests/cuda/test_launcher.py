"""R1: the launcher itself against a fake driver: compiling, the cache, limits, and errors that name what failed."""

import ctypes
import os

import host
import pytest
import torch

from doctor.core.errors import CudaError
from doctor.quant.solve import cuda
from doctor.quant.solve.cuda import columns, driver
from doctor.quant.solve.grid import Grid, GridParams, contiguous_groups

pytestmark = pytest.mark.R1
CODES = torch.arange(64, dtype=torch.uint8).reshape(32, 2) % 16


@pytest.fixture
def library(tmp_path, host_builds):
    return host.fake_libraries(tmp_path)


def counter(library, name):
    return ctypes.c_int.in_dll(library, name)


def test_a_kernel_is_compiled_once_and_then_taken_from_disk(library, tmp_path, host_builds):
    first = host.engine(tmp_path, host_builds, library)
    cuda.pack_columns(CODES, 4, engine=first)
    cuda.awq_words(CODES, engine=first)
    second = host.engine(tmp_path, host_builds, library)
    cuda.pack_columns(CODES, 4, engine=second)
    assert counter(library, "fake_compilations").value == 1 and counter(library, "fake_launches").value == 3
    assert [p.suffix for p in (tmp_path / "kernels").iterdir()] == [".cubin"], "one whole file, nothing half-written"


def test_a_broken_file_in_the_cache_is_compiled_anew(library, tmp_path, host_builds):
    engine = host.engine(tmp_path, host_builds, library)
    _, path, _ = engine.image("pack")
    path.write_bytes(b"half a cubin")
    want = cuda.pack_columns(CODES, 4, engine=engine)
    assert counter(library, "fake_compilations").value == 2 and path.read_bytes().startswith(b"host:")
    assert want.shape == (4, 2)


def test_the_key_changes_with_source_and_device(library, tmp_path, host_builds, monkeypatch):
    paths = {host.engine(tmp_path, host_builds, library).image("pack")[1]}
    counter(library, "fake_capability").value = 86
    paths.add(host.engine(tmp_path, host_builds, library).image("pack")[1])
    copied = tmp_path / "cuda"
    copied.mkdir()
    for name in ("pack.cu", "core.cuh"):
        (copied / name).write_text((host.CUDA / name).read_text() + ("// changed\n" if name == "core.cuh" else ""))
    monkeypatch.setattr(driver, "source_folder", lambda: copied)
    paths.add(host.engine(tmp_path, host_builds, library).image("pack")[1])
    assert len(paths) == 3


def test_a_device_newer_than_nvrtc_gets_ptx(library, tmp_path, host_builds):
    counter(library, "fake_capability").value = 121
    assert host.engine(tmp_path, host_builds, library).image("pack")[1].name.startswith("pack-compute_90-")


def test_a_device_older_than_nvrtc_is_refused(library, tmp_path, host_builds):
    counter(library, "fake_capability").value = 75
    with pytest.raises(CudaError, match="compiles for capabilities from 80, and this device has 75"):
        host.engine(tmp_path, host_builds, library).image("pack")


def test_a_cache_that_cannot_be_written_costs_a_compilation_only(library, tmp_path, host_builds):
    (tmp_path / "kernels").write_text("a file where a folder should be")
    assert cuda.pack_columns(CODES, 4, engine=host.engine(tmp_path, host_builds, library)).shape == (4, 2)


def test_a_compilers_words_reach_the_user(library, tmp_path, host_builds, monkeypatch):
    engine = host.engine(tmp_path, host_builds, library)
    monkeypatch.delenv("FAKE_CUDA_BUILDS")
    with pytest.raises(
        CudaError, match=r"pack.cu: NVRTC 12.9 stopped with code 6 for .*sm_90: fake.cu\(1\): error: no builds"
    ):
        cuda.pack_columns(CODES, 4, engine=engine)


def test_a_missing_kernel_is_named(library, tmp_path, host_builds):
    engine = host.engine(tmp_path, host_builds, library)
    with pytest.raises(CudaError, match=r"no_such: cuModuleGetFunction returned 500 \(CUDA_ERROR_NOT_FOUND\)"):
        engine.launch("no_such", "pack", (1, 1), 32, 0, (), 0, "")


def test_shared_memory_past_the_device_is_refused_with_numbers(library, tmp_path, host_builds):
    engine = host.engine(tmp_path, host_builds, library)
    with pytest.raises(
        CudaError, match=r"gptq_block\(T\): grid 1x1, 128 threads, 131072 bytes .* allows 101376 bytes a block"
    ):
        engine.launch("gptq_block", "gptq_block", (1, 1), 128, 131072, (), 0, "T")


def test_large_shared_memory_is_opted_in(library, tmp_path, host_builds):
    """gptq_block asks for 80 KiB, and the fake driver refuses what was not opted in."""
    engine = host.engine(tmp_path, host_builds, library)
    static = Grid(torch.full((3, 1), 0.1), torch.full((3, 1), 8, dtype=torch.int32))
    cuda.round_columns(
        torch.zeros(32, 3),
        torch.eye(32),
        GridParams(4, 32, True, False, False, 0, torch.float16),
        contiguous_groups(32, 32),
        static,
        engine=engine,
    )
    _function, allowed = engine._functions["gptq_block"]
    assert allowed == [(128 + 32) * 512]


@pytest.mark.parametrize(
    "n, optin, multiprocessors, threads",
    [
        (64, 232448, 132, 32),
        (8192, 101376, 84, 64),
        (29568, 232448, 132, 128),
        (8448, 232448, 132, 64),
        (29568, 101376, 84, 64),
    ],
)
def test_blocks_are_as_wide_as_device_and_rows_allow(host_engine, monkeypatch, n, optin, multiprocessors, threads):
    monkeypatch.setattr(host_engine, "shared_optin", optin)
    monkeypatch.setattr(host_engine, "multiprocessors", multiprocessors)
    assert columns.threads_per_block(host_engine, n, columns.shared_bytes) == threads


def test_a_failing_kernel_is_named_with_its_shapes_and_code(library, tmp_path):
    builds = tmp_path / "broken"
    host.build(
        "pack",
        builds,
        edit={
            "pack.cu": lambda text: text.replace(
                "    const u8 *codes = s.codes",
                "    if (threadIdx.x) __syncthreads();\n    const u8 *codes = s.codes",
                1,
            )
        },
    )
    with pytest.raises(
        CudaError,
        match=r"pack_stream\(codes\[2, 32\], 4 bits\): grid 1x1.*cuLaunchKernel returned 719 "
        r"\(block \(0, 0\): some threads wait at __syncthreads",
    ):
        cuda.pack_columns(CODES, 4, engine=host.engine(tmp_path, builds, library))


def test_fibers_in_reverse_order_give_the_same_bits(library, tmp_path, host_builds):
    """A result that depends on which thread runs first is a race."""
    engine = host.engine(tmp_path, host_builds, library)
    from judges import problem

    T, U, cost = problem(128, 70)
    W = T.T.contiguous()
    results = []
    for turned in (0, 1):
        counter(library, "fake_reversed").value = turned
        codes, found = cuda.round_columns(
            T.clone(),
            U,
            GridParams(4, 32, False, True, False, 0, torch.float16),
            contiguous_groups(128, 32),
            None,
            cost,
            32,
            engine=engine,
        )
        scan = cuda.health_scan(W[:7], engine=engine)
        scan.pop("sum"), scan.pop("sumsq")
        results.append(
            (
                codes,
                *found[:2],
                *cuda.fit(W, 4, 64, False, mse=True, engine=engine)[:2],
                *cuda.kv_store(W.reshape(-1).half(), 4, engine=engine),
                torch.tensor(list(scan.values())),
            )
        )
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=False))


def test_without_a_device_a_reason_is_given(monkeypatch):
    if torch.cuda.is_available():
        assert cuda.available() is None or "libnvrtc" in cuda.available()
    else:
        assert cuda.available() == "torch sees no CUDA device"
        with pytest.raises(CudaError, match="no CUDA kernels on cuda: torch sees no CUDA device"):
            cuda.engine_for(torch.device("cuda"))
    assert cuda.available("cpu") == "the kernels are for CUDA, and the tensors are on cpu"
    monkeypatch.setenv("DOCTOR_KERNELS", "0")
    assert cuda.available("cuda") == "DOCTOR_KERNELS=0 turns them off"


def test_the_cache_lies_with_hugging_faces_or_xdgs(monkeypatch):
    monkeypatch.setenv("HF_HOME", "/data/hf")
    assert str(cuda.cache_folder()) == os.path.join("/data/hf", "doctor", "kernels")
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", "/data/xdg")
    assert str(cuda.cache_folder()) == os.path.join("/data/xdg", "doctor", "kernels")


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda e: cuda.kv_store(torch.zeros(63, dtype=torch.float16), 4, engine=e), "63 cached values at 4 bits"),
        (lambda e: cuda.kv_store(torch.zeros(64), 4, engine=e), "x is torch.float32 on cpu; must be torch.float16"),
        (
            lambda e: cuda.awq_words(torch.zeros(12, 2, dtype=torch.uint8), engine=e),
            r"torch.uint8\[12, 2\]; must be torch.uint8",
        ),
        (lambda e: cuda.pack_rows(torch.zeros(4, 4), 4, engine=e), "codes are torch.float32; must be torch.uint8"),
    ],
)
def test_what_a_kernel_cannot_take_is_refused_before_launch(host_engine, call, message):
    with pytest.raises(CudaError, match=message):
        call(host_engine)
