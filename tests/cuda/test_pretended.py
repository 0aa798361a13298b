"""R1: what a GPU run does around its kernels, on a device that is pretended (pretend.py): every tensor in its place,
few waits, and the quality of the CPU's run.
"""

import json
import random
import threading

import numpy as np
import packing as pack
import pytest
import torch
from pretend import PLACE, pretend

from doctor import api
from doctor.core.errors import BadCheckpoint, CudaError, NotQuantizable, PlanRefused
from doctor.core.recipe import Recipe
from doctor.evaluate.kvcache import quantizers
from doctor.lint.testing import tiny
from doctor.quant import solving_budget
from doctor.quant.forward.hidden_states import HiddenStates
from doctor.quant.forward.spill import SpillFile
from doctor.quant.solve import awq_search, awq_source, cuda, gptq, grid, grid_search, hessian, square
from doctor.quant.solve.hessian import Hessian, mixed_products
from doctor.quant.solve.losses import proxy_loss

pytestmark = pytest.mark.R1
WAITS_A_LINEAR = 40


@pytest.fixture
def text(tmp_path):
    rng = random.Random(0)
    rows = [[1] + [rng.randrange(3, 96) for _ in range(63)] for _ in range(32)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"input_ids": r}) for r in rows))
    return path


def tiles(k, tile=48):
    return [slice(begin, min(k, begin + tile)) for begin in range(0, k, tile)]


def losses(output):
    linears = json.loads((output / "doctor.json").read_text())["linears"]
    return {x["name"]: x["solve"]["loss"] for x in linears if x["outcome"] not in ("kept",)}


def same_on_both(family, recipe, tmp_path, text, monkeypatch, engine, free=64 << 30):
    monkeypatch.setenv("DOCTOR_NATIVE", "1")
    tiny(family).write(tmp_path / "m")
    options = {"calibration": text, "max_seq_length": 64}
    want = api.quantize(tmp_path / "m", tmp_path / "cpu", recipe, **options)
    with pretend(engine, free):
        got = api.quantize(tmp_path / "m", tmp_path / "gpu", recipe, device="cuda", **options)
    # A channel behind a ReLU that hardly ever is above 0 may be so in one precision only, so Q403 is not compared.
    apart = ("Q417", "Q403")
    assert got.report.ok and [f.code for f in got.report.findings if f.code not in apart] == [
        f.code for f in want.report.findings if f.code not in apart
    ]
    ours, theirs = losses(tmp_path / "gpu"), losses(tmp_path / "cpu")
    assert ours.keys() == theirs.keys() and ours
    total = sum(ours.values()) / sum(theirs.values())
    assert abs(total - 1) <= 0.05, f"losses on the device are {total:.3f} times the CPU's"
    return [(f.code, f.message) for f in got.report.findings if f.code == "Q417"]


def test_a_run_on_the_device_is_as_good_as_one_on_the_cpu(tmp_path, text, host_engine, monkeypatch):
    assert same_on_both("llama", Recipe(group_size=32), tmp_path, text, monkeypatch, host_engine) == []


@pytest.mark.parametrize(
    "family, recipe",
    [
        ("llama", Recipe(method="awq", group_size=32)),
        ("gemma", Recipe(group_size=32)),
        ("qwen2_moe", Recipe(group_size=32, bits=3, sym=False, format="gptq_v2")),
        ("opt", Recipe(group_size=32, format="compressed-tensors")),
    ],
    ids=["awq", "norms of 1 + w", "experts", "positions"],
)
def test_without_kernels_torch_does_the_work_and_a_finding_says_so(family, recipe, tmp_path, text, monkeypatch):
    assert same_on_both(family, recipe, tmp_path, text, monkeypatch, None) == [
        ("Q417", "no CUDA kernel runs on cuda, torch does their work: this device is pretended")
    ]


@pytest.mark.parametrize(
    "act_order, scattered, width",
    [(True, False, 32), (True, True, 64), (False, False, 128), (True, False, 48), (True, False, -1)],
)
def test_a_linear_solved_on_the_device_loses_what_the_definition_loses(host_engine, act_order, scattered, width):
    """Every flavour of order and group; past 128 rows, where losses are told from a sample."""
    g = torch.Generator().manual_seed(5)
    k = 192 if width == 48 else 256
    W = torch.randn(150, k, generator=g) * 0.02
    X = torch.randn(700, k, generator=g) @ (torch.eye(k) + torch.randn(k, k, generator=g) / 16)
    H = 2 / 700 * X.T @ X
    options = {"group_size": width, "act_order": act_order, "scattered": scattered}
    want = gptq.solve(W, H, **options)
    with pretend(host_engine) as mode:
        there, matrix = W.to(PLACE), H.to(PLACE)
        mode.waits.clear()
        got = gptq.solve(there, matrix, **options)
        assert sum(mode.waits.values()) <= WAITS_A_LINEAR, f"the host waits too often: {dict(mode.waits)}"
        assert got.codes.is_cuda and got.g_idx.is_cuda
        Q = got.weight().cpu()
    loss, reference = proxy_loss(W, Q, H), proxy_loss(W, want.weight(), H)
    assert abs(loss / reference - 1) <= 0.01 and loss < 0.9 * got.rtn_loss
    assert abs(got.loss / loss - 1) <= 0.03 and abs(got.rtn_loss / want.rtn_loss - 1) <= 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_hessian_is_summed_from_16_bit_rows_without_a_copy(dtype):
    X = torch.randn(300, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    want = X.double().T @ X.double() * 2 / 300
    with pretend():
        assert mixed_products(PLACE)
        H = Hessian(40, device=PLACE)
        H.add(X[:100].to(PLACE))
        H.add(X[100:].to(PLACE))
        got = H.take()
        assert got.is_cuda and got.dtype == torch.float32
        got = got.cpu()
    assert ((got - want).abs() <= 1e-5).all()


def sums(rows, device, engine):
    """(Hessian of the batches `rows`, waits while they were added)."""
    with pretend(engine) as mode:
        H = Hessian(40, device=device)
        mode.waits.clear()
        for X in rows:
            H.add(X.to(device))
        waits = sum(mode.waits.values())
        return H.rows, H.nonfinite, waits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_calibration_rows_are_looked_through_without_a_wait(dtype, host_engine, launched):
    """What is not finite is found as on a CPU, counted over the batches; without a kernel torch waits once a batch and
    finds the same.
    """
    g = torch.Generator().manual_seed(0)
    rows = [torch.randn(2, 30, 40, generator=g).to(dtype) for _ in range(5)]
    assert sums(rows, PLACE, host_engine) == (300, None, 0) and launched == {"health_scan": 5}
    rows[2][1, 7, 11], rows[2][1, 7, 12], rows[4][0, 0, 0] = float("nan"), -float("inf"), float("inf")
    want = sums(rows, "cpu", host_engine)[1]
    assert (want.row, want.channel, want.count) == (120 + 37, 11, 3)
    assert sums(rows, PLACE, host_engine)[1:] == (want, 0)
    found, waits = sums(rows, PLACE, None)[1:]
    assert found == want and waits >= 5 and launched == {"health_scan": 10}


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("width", [32, -1])
def test_awqs_candidates_are_tried_on_the_device(sym, width, host_engine, launched, monkeypatch):
    """One launch a candidate and weight, a wait for all of them and one for the finalists; the factors are the CPU's to
    the bit, with and without the kernel.
    """
    monkeypatch.setattr(awq_search, "FIRST_ROWS", 50)
    monkeypatch.setattr(awq_search, "FINALISTS", 41)  # all of the 40 candidates
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(n, 96, generator=g) * torch.linspace(0.1, 1, 96) for n in (40, 90)]
    X = torch.randn(400, 96, generator=g) * torch.linspace(3, 0.2, 96)
    X[:, 17] = 0
    H = 2 / 400 * X.T @ X
    options = {"bits": 4, "group_size": width, "sym": sym, "zero_min": 0}
    want, name = awq_search.find_scales(weights, H, awq_source.Source("norm", "x"), **options)
    assert name and want[17] == 1
    for engine, launches in ((host_engine, 2 * 2 * 40), (None, 0)):
        launched.clear()
        with pretend(engine) as mode:
            there = [W.to(PLACE) for W in weights], H.to(PLACE)
            mode.waits.clear()
            s, found = awq_search.find_scales(*there, awq_source.Source("norm", "x"), **options)
            waits = sum(mode.waits.values())
        assert found == name and torch.equal(s.cpu(), want)
        assert launched == ({"awq_difference": launches} if launches else {}) and (waits <= 4 or not launches)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_ends_awqs_search_on_the_device_too(value, host_engine):
    W = torch.ones(32, 32)
    W[3, 4] = value
    with pretend(host_engine), pytest.raises(NotQuantizable, match=r"W\[3, 4\] is"):
        awq_search.find_scales(
            [W.to(PLACE)],
            torch.eye(32).to(PLACE),
            awq_source.Source("norm", "x"),
            bits=4,
            group_size=32,
            sym=True,
            zero_min=0,
        )


def test_a_candidate_whose_scales_no_float16_holds_loses(host_engine):
    """Weights near float16's end: some factors would take a group's scale past it, the rest are judged all the same."""
    W = torch.randn(32, 32, generator=torch.Generator().manual_seed(0)) * 5e4
    H = torch.diag(torch.logspace(8, -8, 32))
    options = {"bits": 4, "group_size": 32, "sym": True, "zero_min": 0}
    want, name = awq_search.find_scales([W], H, awq_source.Source("norm", "x"), **options)
    assert torch.isfinite(grid_search.fit(W * want, 4, 32, True).scale).all()
    with pretend(host_engine):
        s, found = awq_search.find_scales([W.to(PLACE)], H.to(PLACE), awq_source.Source("norm", "x"), **options)
    assert found == name and torch.equal(s.cpu(), want)


def packed_in(form, bits):
    """(the tensors of a packed weight [64, 96], the pack function that reads them, its arguments)."""
    W = torch.randn(64, 96, generator=torch.Generator().manual_seed(bits))
    found = grid_search.fit(W, bits, 32, False, zero_min=1)
    codes, g_idx = grid.quantize(W, found, bits), grid.contiguous_groups(96, 32)
    if form == "awq":
        return pack.awq_pack(codes, found), pack.awq_dequantize, {}
    if form == "compressed-tensors":
        return pack.compressed_pack(codes, found, bits, False), pack.compressed_dequantize, {"bits": bits}
    if form == "scattered":
        g_idx = g_idx[torch.randperm(96, generator=torch.Generator().manual_seed(0))]
    return pack.gptq_pack(codes, found, g_idx, bits), pack.gptq_dequantize, {"bits": bits}


@pytest.mark.parametrize(
    "form, bits",
    [*((form, bits) for form in ("gptq", "scattered", "compressed-tensors") for bits in (2, 3, 4, 8)), ("awq", 4)],
)
def test_words_are_read_where_they_are(form, bits, host_engine, launched):
    packed, read, options = packed_in(form, bits)
    want = read(**packed, **options)
    for engine in (host_engine, None):
        launched.clear()
        with pretend(engine):
            there = {name: t.to(PLACE) if name != "weight_shape" else t for name, t in packed.items()}
            W = read(**there, **options)
            assert W.is_cuda
        assert torch.equal(W.cpu(), want)
        assert sum(launched.values()) == bool(engine) and all(kernel.startswith("dequantize") for kernel in launched)


@pytest.mark.parametrize("form", ["gptq", "awq", "compressed-tensors"])
def test_words_that_do_not_fit_each_other_reach_no_kernel(form, host_engine, launched):
    """A kernel trusts its words: shapes and groups are looked at before."""
    packed, read, options = packed_in(form, 4)
    zeros = "weight_zero_point" if form == "compressed-tensors" else "qzeros"
    wrong = [{**packed, zeros: packed[zeros][:1]}]
    if form == "gptq":
        wrong.append({**packed, "g_idx": packed["g_idx"] + 1})
    with pretend(host_engine):
        for tensors in wrong:
            with pytest.raises(BadCheckpoint, match=r"ask for|there are 3 groups"):
                read(**{name: t.to(PLACE) if name != "weight_shape" else t for name, t in tensors.items()}, **options)
    assert not launched


def test_three_bits_in_the_layout_of_old_are_read_by_torch(host_engine, launched):
    W = torch.randint(0, 8, (4, 32), generator=torch.Generator().manual_seed(0))
    words = torch.stack(
        [sum(W[:, i] << 3 * (i - at) for i in range(at, min(at + 10, 32))) for at in range(0, 32, 10)], 1
    ).to(torch.int32)
    scale = torch.ones(4, 1)
    with pretend(host_engine):
        read = pack.compressed_dequantize(words.to(PLACE), scale.to(PLACE), (4, 32), 3)
    assert torch.equal(read.cpu(), W - 4.0) and not launched


@pytest.mark.parametrize(
    "recipe",
    [Recipe(group_size=32, format="compressed-tensors"), Recipe(method="awq", group_size=32)],
    ids=lambda r: r.method,
)
def test_a_resumed_run_reads_its_words_back_on_the_device(recipe, tmp_path, text, host_engine, launched, monkeypatch):
    """Interrupted and gone on: the same bytes as in one go. Every linear is read back once as a proof, and those of a
    replayed block again.
    """
    monkeypatch.setattr(awq_search, "RATIOS", (0.0, 0.5))
    tiny("llama").write(tmp_path / "m")
    text.write_text("\n".join(text.read_text().splitlines()[:6]))
    options = {"calibration": text, "max_seq_length": 64, "device": "cuda"}
    with pretend(host_engine):
        whole = api.quantize(tmp_path / "m", tmp_path / "whole", recipe, **options)
        linears = sum(r["outcome"] in ("gptq", "awq", "rtn") for r in whole.linears)
        once = sum(count for kernel, count in launched.items() if kernel.startswith("dequantize"))
        assert (
            once == linears > 0
            and bool(launched["awq_difference"]) == (recipe.method == "awq")
            and launched["health_scan"]
        )
        launched.clear()

        def stop(line):
            if line.startswith("layer 1 of"):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            api.quantize(tmp_path / "m", tmp_path / "halved", recipe, progress=stop, **options)
        launched.clear()
        api.quantize(tmp_path / "m", tmp_path / "halved", recipe, resume=True, **options)
    assert sum(count for kernel, count in launched.items() if kernel.startswith("dequantize")) == linears
    for name in ("model.safetensors", "doctor.json"):
        assert (tmp_path / "halved" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_words_that_do_not_read_back_end_the_run(tmp_path, text, host_engine, monkeypatch):
    """A device that packs wrongly writes nothing."""
    tiny("llama").write(tmp_path / "m")
    packs = cuda.pack_columns

    def flawed(codes, bits, **more):
        words = packs(codes, bits, **more)
        words[0, 0] ^= 1
        return words

    monkeypatch.setattr(cuda, "pack_columns", flawed)
    with pretend(host_engine), pytest.raises(CudaError, match="packed weights do not round-trip on cuda:0"):
        api.quantize(
            tmp_path / "m", tmp_path / "q", Recipe(group_size=32), calibration=text, max_seq_length=64, device="cuda"
        )
    assert not (tmp_path / "q").exists()


def test_the_next_block_is_read_into_pinned_memory_by_a_thread_of_its_own(tmp_path, text, host_engine, monkeypatch):
    tiny("llama").write(tmp_path / "m")
    pinned = []

    def pin(tensor):
        pinned.append(threading.current_thread().name)
        return tensor

    with pretend(host_engine), monkeypatch.context() as m:
        m.setattr(torch.Tensor, "pin_memory", pin)
        api.quantize(
            tmp_path / "m", tmp_path / "q", Recipe(group_size=32), calibration=text, max_seq_length=64, device="cuda"
        )
    assert pinned == ["doctor-read-ahead"] * 9  # seven linears and two norms of the second of two blocks


def test_where_the_device_does_not_hold_the_hessians_they_lie_in_the_hosts_memory(
    tmp_path, text, host_engine, monkeypatch
):
    monkeypatch.setenv("DOCTOR_NATIVE", "1")  # which arranges the square
    for module in (solving_budget, hessian, square):
        monkeypatch.setattr(module, "tiles_of" if module is hessian else "TILE", tiles if module is hessian else 48)
    text.write_text("\n".join(text.read_text().splitlines()[:8]))
    recipe = Recipe(group_size=32, bits=3, sym=False, format="gptq_v2")
    options = {"calibration": text, "rows": 8, "max_seq_length": 64}
    need = api.plan_quantize(tiny("qwen2_moe").write(tmp_path / "plan"), tmp_path / "o", recipe, **options).need
    assert 0 < need.on_small_device < need.on_device
    found = same_on_both("qwen2_moe", recipe, tmp_path, text, monkeypatch, host_engine, need.on_device - 1)
    assert [code for code, _message in found] == ["Q417"] and "they lie in the host's memory" in found[0][1]


@pytest.mark.parametrize(
    "free, said", [(1 << 30, ""), (1 << 10, ": it may run out of memory; finished layers are kept for --resume")]
)
def test_a_run_says_what_it_takes_of_the_device(free, said, tmp_path, text, host_engine):
    tiny("llama").write(tmp_path / "m")
    lines = []

    def progress(line):
        lines.append(line)
        if line.startswith("cuda: "):
            raise KeyboardInterrupt

    with pretend(host_engine, free=free), pytest.raises(KeyboardInterrupt):
        api.quantize(
            tmp_path / "m",
            tmp_path / "q",
            Recipe(group_size=32),
            calibration=text,
            max_seq_length=64,
            device="cuda",
            progress=progress,
        )
    planned = api.plan_quantize(
        tmp_path / "m", tmp_path / "q", Recipe(group_size=32), calibration=text, rows=32, max_seq_length=64
    )
    assert (
        lines[-1]
        == f"cuda: up to {planned.need.on_device / 2**30:.2f} GiB are needed, {free / 2**30:.2f} GiB are free{said}"
    )
    assert (
        f"GPU     up to {planned.need.on_device / 2**30:.2f} GiB of its memory, with --device cuda" in planned.lines()
    )


def test_a_run_of_the_cpu_is_not_taken_up_on_the_device(tmp_path, text, host_engine):
    tiny("llama").write(tmp_path / "m")
    options = {"calibration": text, "max_seq_length": 64}

    def stop(line):
        if line.startswith("layer 1 of"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.quantize(tmp_path / "m", tmp_path / "q", Recipe(group_size=32), progress=stop, **options)
    with pretend(host_engine), pytest.raises(PlanRefused, match="differs in device"):
        api.quantize(tmp_path / "m", tmp_path / "q", Recipe(group_size=32), resume=True, device="cuda", **options)


def test_two_models_are_compared_on_the_device(tmp_path, text, host_engine, launched, monkeypatch):
    """Words are read by a kernel, activations and logits stay there, and the figures are the CPU's; without a kernel a
    finding says so.
    """
    tiny("llama").write(tmp_path / "m")
    with monkeypatch.context() as m:
        m.setenv("DOCTOR_NATIVE", "1")
        made = api.quantize(tmp_path / "m", tmp_path / "q", Recipe(group_size=32), calibration=text, max_seq_length=64)
    linears = sum(r["outcome"] == "gptq" for r in made.linears)
    options = {"text": text, "rows": 3, "context": 64, "memory": 1 << 30}
    want = api.verify(tmp_path / "m", tmp_path / "q", **options)
    for engine in (host_engine, None):
        launched.clear()
        with pretend(engine):
            got = api.verify(tmp_path / "m", tmp_path / "q", device="cuda", **options)
        ours, theirs = got.extra["comparison"], want.extra["comparison"]
        for name in ("perplexity_original", "perplexity_quantized", "kl_mean", "kl_p99", "entropy_quantized"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
        assert (
            ours["tokens"] == theirs["tokens"]
            and ours["replies"] == theirs["replies"]
            and ours["half"]["place"] == theirs["half"]["place"]
        )
        assert ours["own_errors"] == pytest.approx(theirs["own_errors"], rel=1e-3)
        # Once for the comparison and once for the replies, for which the model is held whole; the first block once
        # more, to see what it returns.
        assert launched["dequantize_stream"] == (2 * linears + linears // 2 if engine else 0) and linears
        slow = [f.message for f in got.findings if f.code == "Q417"]
        assert slow == (
            [] if engine else ["no CUDA kernel runs on cuda, torch does their work: this device is pretended"]
        )
    assert not [f for f in want.findings if f.code == "Q417"]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_a_cache_on_the_device_gives_back_what_the_definition_gives(bits, host_engine, launched):
    """Spans that are not full, zeros, and sums that overflow; widths that no engine's kernel has are the definition's
    everywhere.
    """
    x = torch.randn(3, 200, generator=torch.Generator().manual_seed(bits))
    x[0, 5], x[1, :64], x[2, 64:128] = 140.0, 0.0, 3000.0
    want = quantizers.round_trip(x, bits)
    assert not torch.isfinite(want[2, 64:128]).any() and torch.isfinite(want[0]).all()
    with pretend(host_engine):
        got = quantizers.round_trip(x.to(PLACE), bits)
        assert got.is_cuda
    assert torch.equal(got.cpu().nan_to_num(7.0), want.nan_to_num(7.0)) and got.dtype == torch.float16
    assert launched == ({"kv_store": 1, "kv_load": 1} if bits in cuda.KV_BITS else {})


def test_a_cache_is_measured_on_the_device(tmp_path, text, host_engine, launched):
    """kvcache --measure: the figures of the CPU, and a note where torch stands in for the kernels."""
    tiny("qwen2").write(tmp_path / "m")
    options = {"measure": True, "text": text, "rows": 2, "measured_context": 64}
    want = api.kvcache(tmp_path / "m", **options).data
    for engine in (host_engine, None):
        launched.clear()
        with pretend(engine):
            got = api.kvcache(tmp_path / "m", device="cuda", **options).data
        assert [(s["scheme"], s["perplexity"]) for s in got["measured"]["schemes"]] == [
            (s["scheme"], pytest.approx(s["perplexity"], rel=1e-4)) for s in want["measured"]["schemes"]
        ]
        for ours, theirs in zip(got["fitness"], want["fitness"], strict=True):
            assert ours["errors"] == pytest.approx(theirs["errors"], rel=1e-3)
        assert bool(launched["kv_store"]) == bool(launched["kv_load"]) == bool(engine)
        note = "no CUDA kernel runs on cuda, torch does their work: this device is pretended"
        assert (note in got["notes"]) == (engine is None) and note not in want["notes"]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_are_packed_where_the_codes_are(host_engine, bits):
    codes = torch.randint(0, 2**bits, (64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with pretend(host_engine):
        for packer in (pack.pack_columns, pack.pack_rows, *([lambda c, bits: pack.awq_words(c)] if bits == 4 else [])):
            there = packer(codes.to(PLACE), bits)
            assert there.is_cuda
            assert torch.equal(there.cpu(), packer(codes, bits))


def test_a_run_that_computes_in_bfloat16_says_so_and_not_a_word_of_the_cpus_library(tmp_path, text, host_engine):
    """tests/cuda turn the native library off, which a run on the device has no reason to mention."""
    tiny("llama").write(tmp_path / "m")
    options = {"calibration": text, "max_seq_length": 64}
    notes = {}
    with pretend(host_engine):
        api.quantize(tmp_path / "m", tmp_path / "cuda", Recipe(group_size=32), device="cuda", **options)
    api.quantize(tmp_path / "m", tmp_path / "cpu", Recipe(group_size=32), **options)
    for place in ("cuda", "cpu"):
        notes[place] = " ".join(json.loads((tmp_path / place / "doctor.json").read_text())["notes"])
    assert "decoder layers compute in bfloat16 on cuda" in notes["cuda"] and "native library" not in notes["cuda"]
    assert "bfloat16" not in notes["cpu"] and "native library" in notes["cpu"]


@pytest.mark.parametrize("limit, room, place", [(0, 1 << 20, "device"), (1 << 20, 0, "memory"), (0, 0, "disk")])
def test_hidden_states_lie_where_there_is_room(tmp_path, limit, room, place):
    with pretend():
        hidden = HiddenStates(
            [(2, 3, 4), (1, 5, 4)], [6, 5], limit, lambda: SpillFile(tmp_path), PLACE, torch.bfloat16, room
        )
        assert ("device" if hidden.on_device else "disk" if hidden.on_disk else "memory") == place
        for i, shape in enumerate([(2, 3, 4), (1, 5, 4)]):
            hidden[i] = torch.full(shape, float(i)).to(PLACE)
        assert all(hidden[i].is_cuda and (hidden[i] == i).all() for i in (0, 1))


def test_the_pretended_device_refuses_what_cuda_refuses():
    with pretend() as mode:
        x = torch.ones(3, device="cuda")
        with pytest.raises(RuntimeError, match="two devices, cuda:0 and cpu"):
            x + torch.ones(3)
        with pytest.raises(TypeError, match="numpy"):
            np.asarray(x.numpy())
        assert not mode.waits and x.sum().item() == 3 and mode.waits == {"item": 1}
    assert not torch.ones(3).is_cuda
