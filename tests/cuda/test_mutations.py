"""The tests of the tests: faults planted in the kernels, one at a time, each of which the host build must show.

Also the same kernels under AddressSanitizer and UBSan, where every buffer ends where it ends.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import host
import numpy as np
import packing as pack
import pytest
import torch
from judges import energies, grid_of, judge_columns, judge_fit, judge_refined, problem

from doctor.core.errors import CudaError
from doctor.quant.solve import cuda, grid, grid_search
from doctor.quant.solve.grid import GridParams, contiguous_groups

pytestmark = pytest.mark.R1


# 4 GiB of which a few pages are ever written; open as long as the tests run
HOLE = tempfile.NamedTemporaryFile(prefix="doctor-", suffix=".hole")  # noqa: SIM115


def swap(old, new):
    return lambda text: text.replace(old, new, 1)


def rounds(engine, static=True):
    """Blocks whole and ragged, rows of U by fours and not; codes must follow from one another, and no word may be left
    unwritten.
    """
    for k, n, width in ((200, 70, 8), (128, 33, 32), (99, 9, 33)):
        T, U, cost = problem(k, n, seed=k)
        groups = contiguous_groups(k, width)
        given = grid_of(T, 4, width, False) if static else None
        rule = GridParams(4, width, False, True, False, 0, torch.float16)
        codes, found = cuda.round_columns(
            T.clone(), U, rule, groups, given, cost, 0 if static else width, engine=engine
        )
        assert torch.isfinite(found.scale).all()
        judge_columns(T, U, codes, found, groups, 4)
        if not static:
            judge_fit(
                T[:width].T.contiguous(),
                grid.Grid(found.scale[:, :1], found.zero[:, :1]),
                grid_search.fit(T[:width].T.contiguous(), 4, width, False, mse=True, weight=cost[:width]),
                cost[:width],
                4,
                0.9,
            )


def rounds_on_the_fly(engine):
    rounds(engine, static=False)


def rounds_in_reverse(engine):
    """Threads in the other order: what a missing barrier lets through in one order, it does not in both."""
    import ctypes

    turned = ctypes.c_int.in_dll(engine._cuda, "fake_reversed")
    for turned.value in (0, 1):
        rounds(engine)


def refines(engine):
    """Both orders of threads; blocks whole and ragged, scales that follow their codes and scales that stay; the loss is
    what is added up.
    """
    import ctypes

    turned = ctypes.c_int.in_dll(engine._cuda, "fake_reversed")
    for turned.value, (k, n, width) in ((0, (200, 70, 0)), (1, (256, 33, 64)), (0, (96, 9, 32))):
        T, U, cost = problem(k, n, seed=k)
        H = torch.linalg.inv(U.double().T @ U.double()).float()
        groups = contiguous_groups(k, width or -1)
        given = grid_of(T, 4, width or -1, False, mse=True, weight=cost)
        codes, loss = grid.quantize(T.T, given, 4).T.contiguous(), torch.zeros(n, dtype=torch.float64)
        E = (T - grid.dequantize(codes.T, given).T).contiguous()
        rule = GridParams(4, width or -1, False, True, False, 0, torch.float16)
        got, found = cuda.refine(E, H, codes.clone(), given, groups, rule, width, loss, engine=engine)
        before, after = judge_refined(T, H, (codes, given), (got, found), groups, 4, width)
        assert ((loss - (after - before)).abs() <= 1e-4 * before.max()).all()


def adds_up(engine):
    T, U, _cost = problem(200, 40)
    loss, groups = torch.zeros(40, dtype=torch.float64), contiguous_groups(200, 40)
    codes, found = cuda.round_columns(
        T.clone(),
        U,
        GridParams(4, 40, True, True, False, 0, torch.float16),
        groups,
        grid_of(T, 4, 40, True),
        loss=loss,
        engine=engine,
    )
    want = energies(T - grid.dequantize(codes.T, found).T, torch.linalg.inv(U.double().T @ U.double()))
    assert ((loss - want).abs() <= 1e-3 * want.max()).all()


def searches(engine):
    T, _, cost = problem(384, 30)
    W = T.T.contiguous()
    W[3] = W[3].abs() + 1e-3
    for width in (32, 48, 128, -1):
        for sym in (True, False):
            for mse in (False, True):
                want = grid_search.fit(W, 3, width, sym, mse=mse, weight=cost, zero_min=1)
                found = cuda.fit(W, 3, width, sym, mse=mse, weight=cost, zero_min=1, engine=engine)
                judge_fit(W, found, want, cost, 3, 0.9)
                assert int(found.zero.min()) >= 1


def huge(engine):
    """A code whose index is past 2^31: strides of a view that jumps over untouched memory."""
    stride = 2**31 // 3 + 5
    memory = torch.from_numpy(np.memmap(HOLE.name, np.uint8, "w+", shape=(2**31 + 3 * stride + 64,)))
    lines = memory.as_strided((4, 32), (stride, 1), 2**31)  # an index that wraps to below 0 still finds memory
    lines[3] = 7
    words = cuda.pack_rows(lines, 8, engine=engine)
    assert words[3].tolist() == [0x07070707] * 8 and not words[:3].any()


def packs(engine):
    for bits in (3, 4):
        codes = torch.randint(0, 2**bits, (333, 65), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        assert torch.equal(cuda.pack_columns(codes, bits, engine=engine), pack.pack_columns(codes, bits))
    codes = codes[:32]
    assert torch.equal(cuda.awq_words(codes, engine=engine), pack.awq_words(codes))
    W = torch.randn(96, 160, generator=torch.Generator().manual_seed(0))
    found = grid_search.fit(W, 3, 32, False, zero_min=1)
    order = torch.randperm(160, generator=torch.Generator().manual_seed(1))
    packed = pack.gptq_pack(grid.quantize(W, found, 3), found, contiguous_groups(160, 32)[order], 3)
    assert torch.equal(cuda.gptq_dequantize(**packed, bits=3, engine=engine), pack.gptq_dequantize(**packed, bits=3))
    found = grid_search.fit(W, 4, 32, False)
    packed = pack.awq_pack(grid.quantize(W, found, 4), found)
    assert torch.equal(cuda.awq_dequantize(**packed, engine=engine), pack.awq_dequantize(**packed))


def caches(engine):
    from test_kernels import kv_reference

    x = torch.randn(640, generator=torch.Generator().manual_seed(0)).half()
    for bits in (4, 8):
        codes, scales = cuda.kv_store(x, bits, engine=engine)
        want = kv_reference(x, bits)
        fields = codes if bits == 8 else torch.stack([codes & 15, codes >> 4], 1).reshape(-1)
        assert torch.equal(fields, want[0]) and torch.equal(scales, want[1])
        assert torch.equal(cuda.kv_load(codes, scales, bits, engine=engine), want[2])


def scans(engine):
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    x[4000], x[4300], x[4400], x[4500] = float("nan"), 0.0, 66000.0, -70000.0
    scan = cuda.DeviceScan(x.device, engine=engine)
    for part in x.split(3000):
        scan.add(part)
    found = scan.read()
    assert (
        found["n_nan"],
        found["n_zero"],
        found["n_fp16_overflow"],
        found["first_nonfinite"],
        found["max"],
        found["min"],
    ) == (1, 1, 2, 4000, 66000.0, -70000.0)
    assert abs(found["sum"] - float(x[~x.isnan()].double().sum())) <= 1e-2


def differs(engine):
    g = torch.Generator().manual_seed(0)
    W, s = torch.randn(5, 96, generator=g), torch.rand(96, generator=g) + 0.5
    found = grid_search.fit(W * s, 4, 48, False)
    want = grid.dequantize(grid.quantize(W * s, found, 4), found) / s - W
    assert ((cuda.awq_difference(W, s, 4, 48, False, engine=engine) - want).abs() <= 1e-5).all()


MUTATIONS = {
    "the barrier after U is dropped": (
        "gptq_block",
        rounds_in_reverse,
        {"gptq_block.cu": swap("    __syncthreads();\n", "")},
    ),
    "rows past n leave before the barrier": (
        "gptq_block",
        rounds,
        {
            "gptq_block.cu": swap(
                "    fill<true>(u, c.U, c.k, c.begin, c.count);\n    __syncthreads();\n"
                "    if (row >= c.n)\n        return;",
                "    if (row >= c.n)\n        return;\n"
                "    fill<true>(u, c.U, c.k, c.begin, c.count);\n    __syncthreads();",
            )
        },
    ),
    "the bound of rows is missing": (
        "gptq_block",
        "asan",
        {"gptq_block.cu": swap("    if (row >= c.n)\n        return;\n", "")},
    ),
    "the triangle starts one late": ("gptq_block", rounds, {"gptq_block.cu": swap("later = j + 1;", "later = j + 2;")}),
    "the triangle corrects the column itself": (
        "gptq_block",
        rounds,
        {"gptq_block.cu": swap("lane_fma(-e, urow[later], w[later])", "lane_fma(-e, urow[later - 1], w[later])")},
    ),
    "the last word of U's rows is left unfilled": (
        "gptq_block",
        rounds,
        {
            "gptq_block.cu": swap(
                "for (int lane = 0; lane < 4; lane++)\n                if (j + lane < count)",
                "for (int lane = 0; lane < 3; lane++)\n                if (j + lane < count)",
            )
        },
    ),
    "a quad of U is skipped": (
        "gptq_block",
        rounds,
        {"gptq_block.cu": swap("if (UPPER && j + 3 < i)", "if (UPPER && j < i)")},
    ),
    "a sub-block skips its last correction": (
        "gptq_block",
        rounds,
        {"gptq_block.cu": swap("i < until; i++", "i < until - 1; i++")},
    ),
    "corrections of a group count twice": (
        "gptq_block",
        rounds_on_the_fly,
        {"gptq_block.cu": swap("c.width ? first - first % c.width : 0, first, u", "0, first, u")},
    ),
    "a grid is fitted on weights of before": (
        "gptq_block",
        rounds_on_the_fly,
        {"gptq_block.cu": swap("            c.T[(c.begin + part + j) * c.n + row] = w[j];\n", "            ;\n")},
    ),
    "an error is not divided by the pivot": (
        "gptq_block",
        rounds,
        {
            "gptq_block.cu": swap(
                "divide(w[j] - value_of(code, scale[j], zero[j]), urow[j])", "w[j] - value_of(code, scale[j], zero[j])"
            )
        },
    ),
    "the errors of columns share a place": (
        "gptq_block",
        rounds,
        {"gptq_block.cu": swap("mine[(first + j) * threads] = e;", "mine[(first + (j & 7)) * threads] = e;")},
    ),
    "the groups of a block start at 0": (
        "gptq_block",
        rounds,
        {
            "gptq_block.cu": swap(
                "c.owner[c.begin + (first + j < c.count ? first + j : first)]",
                "c.owner[first + j < c.count ? first + j : first]",
            )
        },
    ),
    "the loss of a column is left out": (
        "gptq_block",
        adds_up,
        {
            "gptq_block.cu": swap(
                "        for (int i = 0; i < c.count; i++)\n            lost",
                "        for (int i = 1; i < c.count; i++)\n            lost",
            )
        },
    ),
    "the barrier after H is dropped": (
        "gptq_block",
        refines,
        {
            "gptq_block.cu": swap(
                "    fill<false>(h, c.H, c.k, c.begin, c.count);\n    __syncthreads();\n",
                "    fill<false>(h, c.H, c.k, c.begin, c.count);\n",
            )
        },
    ),
    "half of H is left unfilled": ("gptq_block", refines, {"gptq_block.cu": swap("fill<false>(", "fill<true>(")}),
    "a refined code forgets its old value": (
        "gptq_block",
        refines,
        {"gptq_block.cu": swap("divide(pull[j], own) + value", "divide(pull[j], own)")},
    ),
    "a move is not passed on": (
        "gptq_block",
        refines,
        {"gptq_block.cu": swap("pull[later] = lane_fma(step,", "pull[later] = lane_fma(0.0f,")},
    ),
    "a new scale's change is not passed on": (
        "gptq_block",
        refines,
        {
            "gptq_block.cu": swap(
                "        mine[i * threads] -= change * ((float)code[i * threads] - zero);\n", "        ;\n"
            )
        },
    ),
    "a scale is fitted to the group before": (
        "gptq_block",
        refines,
        {"gptq_block.cu": swap("first + SUB - c.width, middle", "0, middle")},
    ),
    "a bound of refined rows is missing": (
        "gptq_block",
        "asan",
        {"gptq_block.cu": swap("    if (row >= c.n)\n        return;\n    float lost", "    float lost")},
    ),
    "an index of 32 bits": (
        "pack",
        huge,
        {"pack.cu": swap("s.codes + line * s.line_stride", "s.codes + (int)line * (int)s.line_stride")},
    ),
    "a vector load where rows are not aligned": (
        "gptq_block",
        "asan",
        {"gptq_block.cu": swap("k % 4 == 0 && begin % 4 == 0", "true")},
    ),
    "a shuffle's result is read by half a warp": (
        "kv_cache",
        caches,
        {
            "kv_cache.cu": swap(
                "for (int step = 8; step; step >>= 1)\n            absmax",
                "for (int step = 8; step && lane < 24; step >>= 1)\n            absmax",
            )
        },
    ),
    "a shuffle's offset is halved": (
        "grid_search",
        searches,
        {
            "core.cuh": swap(
                "x += __shfl_xor_sync(ALL_LANES, x, lane);", "x += __shfl_xor_sync(ALL_LANES, x, lane / 2);"
            )
        },
    ),
    "a lane is missing from a shuffle's mask": (
        "grid_search",
        searches,
        {"core.cuh": swap("0xffffffffu", "0x7fffffffu")},
    ),
    "candidates are not rounded to what is stored": (
        "grid_search",
        searches,
        {"core.cuh": swap("s = store_scale(lane_min(s, F(largest_of(rule.dtype))), rule.dtype);", "")},
    ),
    "the zero point may fall below its least": (
        "grid_search",
        searches,
        {
            "core.cuh": swap(
                "clamp(lane_round(divide(-low, first)), rule.zero_min,", "clamp(lane_round(divide(-low, first)), 0.0f,"
            )
        },
    ),
    "lanes past the group hold weights": (
        "grid_search",
        searches,
        {
            "grid_search.cu": swap(
                "column < s.width ? s.W[row * s.row_stride + first + column] : 0.0f",
                "s.W[row * s.row_stride + (first + column) % s.k]",
            )
        },
    ),
    "the refit forgets the costs": (
        "grid_search",
        searches,
        {"core.cuh": swap("weighted = level * group.cost(i);", "weighted = level;")},
    ),
    "rounding goes away from zero": (
        "grid_search",
        searches,
        {"core.cuh": swap("return rintf(x); }", "return floorf(x + 0.75f); }")},
    ),
    "the division is a product only": (
        "grid_search",
        None,
        {"core.cuh": swap("corrected = lane_fma(lane_fma(-q, b, a), reciprocal, q);", "corrected = q;")},
    ),
    "a word keeps the bits of the last": ("pack", packs, {"pack.cu": swap("open >>= 32;", "open >>= 31;")}),
    "the tail is read past its end": ("pack", "asan", {"pack.cu": swap("(i < count ? *codes : 0)", "*codes")}),
    "the last word is written past its end": (
        "pack",
        "asan",
        {"pack.cu": swap("if (word < s.height)", "if (word <= s.height)")},
    ),
    "AWQ's order is the plain one": (
        "pack",
        packs,
        {"pack.cu": swap("field < 4 ? field * 2 : field * 2 - 7", "field")},
    ),
    "a field that crosses words loses its upper half": (
        "pack",
        packs,
        {"pack.cu": swap("if (shift + bits > 32)", "if (shift + bits > 64)")},
    ),
    "a shuffle of the Hadamard is one short": (
        "kv_cache",
        caches,
        {"kv_cache.cu": swap("step < WARP;", "step < WARP / 2;")},
    ),
    "the Hadamard's sign is turned": (
        "kv_cache",
        caches,
        {"kv_cache.cu": swap("lane & step ? pair ^ 0x80008000u : pair", "lane & step ? pair : pair ^ 0x80008000u")},
    ),
    "absmax misses a lane": (
        "kv_cache",
        caches,
        {"kv_cache.cu": swap("for (int step = 8; step;", "for (int step = 4; step;")},
    ),
    "a run with a zero in it is not looked through": (
        "health_scan",
        scans,
        {"health_scan.cu": swap("least >= plain && ", "least >= -plain && ")},
    ),
    "a run with a NaN in it is not looked through": (
        "health_scan",
        scans,
        {"health_scan.cu": swap("squares <= 3.4028234663852886e38f && ", "")},
    ),
    "a run beyond float16 is not looked through": (
        "health_scan",
        scans,
        {"health_scan.cu": swap(" && lane_max(high, -low) < 65520.0f", "")},
    ),
    "a warp's partial result is not waited for": (
        "health_scan",
        scans,
        {"health_scan.cu": swap("    __syncthreads();\n", "")},
    ),
    "the last warp is not joined": (
        "health_scan",
        scans,
        {"health_scan.cu": swap("other < blockDim.x / WARP;", "other + 1 < blockDim.x / WARP;")},
    ),
    "a second batch counts from the first value": (
        "health_scan",
        scans,
        {"health_scan.cu": swap("first = (u64)(base + i);", "first = (u64)i;")},
    ),
    "zeros past the end are counted": (
        "health_scan",
        "asan",
        {"health_scan.cu": swap("i < at + RUN && i < count;", "i < at + RUN;")},
    ),
    "a group takes the factors of the first": (
        "awq_difference",
        differs,
        {"awq_difference.cu": swap("{d.W, d.s + column, first,", "{d.W, d.s, first,")},
    ),
    "the bound of groups is missing": (
        "awq_difference",
        "asan",
        {"awq_difference.cu": swap("    if (at >= d.n * groups)\n        return;\n", "")},
    ),
    "a stored zero point is read as it is": (
        "pack",
        packs,
        {"pack.cu": swap("(float)(p.zero_offset + (", "(float)((")},
    ),
    "AWQ's zero points are those of the first field": (
        "pack",
        packs,
        {"pack.cu": swap("(int)(zero >> field * 4 & 15u)", "(int)(zero & 15u)")},
    ),
    "the bound of unpacked columns is missing": (
        "pack",
        "asan",
        {"pack.cu": swap("    if (fast >= (p.along_rows ? p.n : runs))\n        return;\n", "")},
    ),
    "a run that crosses words loses its upper part": (
        "pack",
        packs,
        {"pack.cu": swap("if (shift + count * p.bits > 32)", "if (shift + count * p.bits > 64)")},
    ),
    "a run keeps the scale of its first group": (
        "pack",
        packs,
        {"pack.cu": swap("fresh = fresh || owner != group;", "")},
    ),
    "a run of 16 bytes starts anywhere": (
        "pack",
        "asan",
        {"pack.cu": swap("count == 32 && by_sixteen(codes)", "count == 32")},
    ),
    "a scale is read for the wrong 32 values": (
        "kv_cache",
        caches,
        {"kv_cache.cu": swap("scales[at / 32 + lane / 16])", "scales[at / 32])")},
    ),
    "a cached sum is not rounded to float16": (
        "kv_cache",
        caches,
        {"core.cuh": swap("return f16_code(lane_f16(low))", "return f16_code(low)")},
    ),
    "the bound of cached values is missing": (
        "kv_cache",
        "asan",
        {"kv_cache.cu": swap("if (at >= count)", "if (at >= count + 64)")},
    ),
    "the difference is not scaled back": (
        "awq_difference",
        differs,
        {
            "awq_difference.cu": swap(
                "divide(value_of(code, fit.scale, fit.zero), d.s[column + lane + i * WARP])",
                "value_of(code, fit.scale, fit.zero)",
            )
        },
    ),
}
CHECKS = {
    "gptq_block": rounds,
    "grid_search": searches,
    "pack": packs,
    "kv_cache": caches,
    "health_scan": scans,
    "awq_difference": differs,
}


def divides_exactly(engine):
    """round(w / s) at and beside ties, where a quotient that is off by one unit shows."""
    s = (torch.rand(400, generator=torch.Generator().manual_seed(0)) * 0.3 + 1e-4).half().float()
    ties = (torch.arange(-7, 7) + 0.5)[None, :, None] * s[:, None, None]
    beside = torch.stack([torch.nextafter(ties, ties - 1), ties, torch.nextafter(ties, ties + 1)], -1).reshape(400, -1)
    W = torch.cat([beside, torch.zeros(400, 128 - beside.shape[1])], 1)
    T, U = W.T.contiguous(), torch.eye(128)
    given = grid.Grid(s[:, None], torch.full((400, 1), 8, dtype=torch.int32))
    codes, _ = cuda.round_columns(
        T, U, GridParams(4, -1, True, False, False, 0, torch.float16), contiguous_groups(128, -1), given, engine=engine
    )
    assert torch.equal(codes.T, grid.quantize(W, given, 4))


@pytest.mark.parametrize("fault", MUTATIONS)
def test_a_planted_fault_is_caught(fault, tmp_path, host_builds, record_property):
    source, check, edit = MUTATIONS[fault]
    shutil.copytree(host_builds, tmp_path / "builds")  # the other sources as they are: a check may need them too
    record_property("fault", [source, fault, caught_by(source, check, edit, tmp_path)])


def caught_by(source, check, edit, tmp_path):
    """What showed the fault, in one line. Fails where nothing did."""
    if check == "asan":
        made, output = under_sanitizers(source, tmp_path, edit)
        assert made != 0 and ("AddressSanitizer" in output or "misaligned address" in output), output[-2000:]
        return re.search(r"AddressSanitizer: [\w-]+|runtime error: [\w ]*misaligned address", output)[0]
    if check is None:
        source, check = "gptq_block", divides_exactly
    host.build(source, tmp_path / "builds", edit=edit)
    with pytest.raises((AssertionError, CudaError)) as caught:
        check(host.engine(tmp_path, tmp_path / "builds"))
    assert "finds nothing to change" not in str(caught.value) and "cuModuleLoadData" not in str(caught.value)
    return f"{check.__name__}: {str(caught.value).splitlines()[0]}" if str(caught.value) else check.__name__


@pytest.mark.parametrize(
    "check", [*CHECKS.values(), rounds_on_the_fly, rounds_in_reverse, refines, adds_up, huge, divides_exactly]
)
def test_the_checks_pass_without_a_fault(check, tmp_path, host_builds):
    check(host.engine(tmp_path, host_builds))


def under_sanitizers(source, folder, edit=None):
    """(exit status, output) of sanitized.py for one kernel source built with AddressSanitizer and UBSan."""
    runtime = subprocess.run(
        [host.COMPILER, "-print-file-name=libasan.so"], capture_output=True, text=True
    ).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip("g++ has no AddressSanitizer runtime here")
    made = host.build(
        source,
        folder / "asan",
        ("-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "--param", "asan-stack=0"),
        edit=edit,
    )
    run = subprocess.run(
        [sys.executable, str(Path(__file__).parents[1] / "helpers" / "sanitized.py"), source, str(made)],
        capture_output=True,
        text=True,
        env={"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "PATH": "/usr/bin:/bin"},
    )
    return run.returncode, run.stdout + run.stderr


@pytest.mark.parametrize("source", host.SOURCES)
def test_no_kernel_leaves_its_buffers_or_the_language(source, tmp_path, host_builds):
    status, output = under_sanitizers(source, tmp_path)
    assert (status, output.strip()) == (0, f"{source}: clean"), output[-3000:]
