"""R1: what a GPU run does around its kernels, on a device that is pretended (pretend.py): every tensor in its place, few waits, and
the quality of the CPU's run."""

import json
import random

import numpy as np
import pytest
import torch
from pretend import PLACE, pretend

from doctor import api
from doctor.quant import gptq, pack
from doctor.quant.hessian import Hessian, mixed_products
from doctor.quant.run import Hidden
from doctor.recipe import Recipe
from doctor.testing import tiny

pytestmark = pytest.mark.R1
WAITS_A_LINEAR = 40


@pytest.fixture
def text(tmp_path):
    rng = random.Random(0)
    rows = [[1] + [rng.randrange(3, 96) for _ in range(63)] for _ in range(32)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"input_ids": r}) for r in rows))
    return path


def losses(output):
    linears = json.loads((output / "doctor.json").read_text())["linears"]
    return {x["name"]: x["solve"]["loss"] for x in linears if x["outcome"] not in ("kept",)}


def same_on_both(family, recipe, tmp_path, text, monkeypatch, engine):
    monkeypatch.setenv("DOCTOR_NATIVE", "1")
    tiny(family).write(tmp_path / "m")
    options = {"calibration": text, "max_seq_length": 64}
    want = api.quantize(tmp_path / "m", tmp_path / "cpu", recipe, **options)
    with pretend(engine):
        got = api.quantize(tmp_path / "m", tmp_path / "gpu", recipe, device="cuda", **options)
    # A channel behind a ReLU that hardly ever is above 0 may be so in one precision only, so Q403 is not compared.
    apart = ("Q417", "Q403")
    assert got.report.ok and [f.code for f in got.report.findings if f.code not in apart] == [f.code for f in want.report.findings if f.code not in apart]
    ours, theirs = losses(tmp_path / "gpu"), losses(tmp_path / "cpu")
    assert ours.keys() == theirs.keys() and ours
    total = sum(ours.values()) / sum(theirs.values())
    assert abs(total - 1) <= 0.05, f"losses on the device are {total:.3f} times the CPU's"
    return [(f.code, f.message) for f in got.report.findings if f.code == "Q417"]


def test_a_run_on_the_device_is_as_good_as_one_on_the_cpu(tmp_path, text, host_engine, monkeypatch):
    assert same_on_both("llama", Recipe(group_size=32), tmp_path, text, monkeypatch, host_engine) == []


@pytest.mark.parametrize("family, recipe", [("llama", Recipe(method="awq", group_size=32)), ("gemma", Recipe(group_size=32)),
                                            ("qwen2_moe", Recipe(group_size=32, bits=3, sym=False, format="gptq_v2")),
                                            ("opt", Recipe(group_size=32, format="compressed-tensors"))],
                         ids=["awq", "norms of 1 + w", "experts", "positions"])
def test_without_kernels_torch_does_the_work_and_a_finding_says_so(family, recipe, tmp_path, text, monkeypatch):
    assert same_on_both(family, recipe, tmp_path, text, monkeypatch, None) == [
        ("Q417", "no CUDA kernel runs on cuda, torch does their work: this device is pretended")]


@pytest.mark.parametrize("act_order, scattered, width", [(True, False, 32), (True, True, 64), (False, False, 128), (True, False, 48),
                                                         (True, False, -1)])
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
    loss, reference = gptq.proxy_loss(W, Q, H), gptq.proxy_loss(W, want.weight(), H)
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
        got = H.matrix()
        assert got.is_cuda and got.dtype == torch.float32
        got = got.cpu()
    assert not ((got - want).abs() > 1e-5).any()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_are_packed_where_the_codes_are(host_engine, bits):
    codes = torch.randint(0, 2**bits, (64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with pretend(host_engine):
        for packer in (pack.pack_columns, pack.pack_rows, *([lambda c, bits: pack._awq_words(c)] if bits == 4 else [])):
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
    assert "blocks compute in bfloat16 on cuda" in notes["cuda"] and "native library" not in notes["cuda"]
    assert "bfloat16" not in notes["cpu"] and "native library" in notes["cpu"]


@pytest.mark.parametrize("limit, room, place", [(0, 1 << 20, "device"), (1 << 20, 0, "memory"), (0, 0, "disk")])
def test_hidden_states_lie_where_there_is_room(tmp_path, limit, room, place):
    with pretend():
        hidden = Hidden([(2, 3, 4), (1, 5, 4)], limit, tmp_path / "h", lambda text: None, PLACE, torch.bfloat16, room)
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
