"""AWQ: scales that leave the function alone, a search that never loses, an output that reads back."""

import json
import random

import numpy as np
import pytest
import torch

from doctor import api
from doctor.checkpoint.directory import Checkpoint
from doctor.core.recipe import Recipe
from doctor.lint.testing import FAMILIES, encode, tiny
from doctor.model.spec import build_spec
from doctor.quant import layer
from doctor.quant.dequantize import as_float
from doctor.quant.forward.skeleton import Skeleton
from doctor.quant.solve import awq, awq_fold, awq_search, awq_source, refine
from doctor.quant.solve.grid import dequantize, quantize
from doctor.quant.solve.grid_search import fit
from doctor.quant.solve.losses import proxy_loss

RECIPE = Recipe(method="awq", group_size=32)
SCALED = {
    "llama": {"q", "k", "v", "o", "gate", "up", "down"},
    "qwen2": {"q", "k", "v", "o", "gate", "up", "down"},
    "mistral": {"q", "k", "v", "o", "gate", "up", "down"},
    "gemma": {"q", "k", "v", "o", "gate", "up", "down"},
    "phi3": {"qkv", "gate_up"},
    "opt": {"q", "k", "v", "o", "up", "down"},
    "qwen2_moe": {"q", "k", "v", "o", "down"},
}


@pytest.fixture
def text(tmp_path):
    """8 rows of 64 random ids."""
    rng = random.Random(0)
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "\n".join(json.dumps({"input_ids": [1] + [rng.randrange(3, 96) for _ in range(63)]}) for _ in range(8))
    )
    return path


def uneven(family):
    """A tiny model whose norms give a few channels much larger activations, as real ones do."""
    case = tiny(family)
    for name, codes in case.tensors.items():
        if "norm" in name and name.endswith("weight") and codes.ndim == 1 and ".layers." in name:
            values = np.ones(codes.shape) * (0.0 if family == "gemma" else 1.0)
            values[::9] += 6.0
            case.tensors[name] = encode(values, "BF16")
    return case


def hessian(k, seed=0):
    X = torch.randn(300, k, generator=torch.Generator().manual_seed(seed))
    X[:, ::9] *= 8
    return X.T @ X * (2 / 300)


def quantized(folder, output, text, recipe=RECIPE, **options):
    return api.quantize(folder, output, recipe, calibration=text, max_seq_length=64, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_folded_scales_leave_the_function_alone_and_the_output_is_clean(family, tmp_path, text, monkeypatch):
    uneven(family).write(tmp_path / "m")
    moved, scaled = [], set()
    real = layer._fold_scales

    def watch(setup, activations, i, *args):
        before = activations.run_first(i)
        folding = real(setup, activations, i, *args)
        after = activations.run_first(i)
        moved.append(float((after - before).norm() / before.norm()))
        scaled.update(setup.skeleton.linears[i][name].role for name in folding.columns)
        return folding

    monkeypatch.setattr(layer, "_fold_scales", watch)
    result = quantized(tmp_path / "m", tmp_path / "o", text)
    assert result.output and result.report.ok and [f for f in result.report.findings if f.severity != "info"] == []
    assert moved and all(
        m < (1e-3 if family in ("opt", "qwen2", "qwen2_moe") else 1e-5) for m in moved
    )  # biases are stored in 16 bits
    assert scaled and scaled <= SCALED[family], scaled
    assert {r["outcome"] for r in result.linears} <= {"awq", "rtn"}
    assert all(r["solve"]["note"] for r in result.linears)
    total, rounded = (sum(r["solve"][k] for r in result.linears if r["outcome"] == "awq") for k in ("loss", "rtn_loss"))
    assert total <= rounded


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_what_is_written_is_what_the_run_computed(family, tmp_path, text):
    """The dequantized output is closer than rounding without scales: folded norms were written beside their linears."""
    uneven(family).write(tmp_path / "m")
    source = Checkpoint.open(tmp_path / "m")
    ids = torch.randint(3, 96, (4, 32), generator=torch.Generator().manual_seed(1))
    want = last_hidden(source, source.value("config.json"), ids)
    for format in ("awq", "compressed-tensors"):
        result = quantized(tmp_path / "m", tmp_path / format, text, Recipe(method="awq", group_size=32, format=format))
        got = last_hidden(as_float(Checkpoint.open(result.output)), source.value("config.json"), ids)
        rounded = quantized(
            tmp_path / "m",
            tmp_path / f"rtn-{format}",
            text,
            Recipe(method="rtn", group_size=32, sym=False, format=format),
        )
        coarse = last_hidden(as_float(Checkpoint.open(rounded.output)), source.value("config.json"), ids)
        assert (got - want).norm() < (coarse - want).norm()
        name = "model.layers.0.input_layernorm.weight"
        changed = Checkpoint.open(result.output).load(name)
        assert (changed != source.load(name)).any()
    stated = json.loads((tmp_path / "awq" / "config.json").read_text())["quantization_config"]
    assert stated["quant_method"] == "awq" and stated["zero_point"] is True and stated["version"] == "gemm"


def last_hidden(checkpoint, config, ids):
    class View:
        root, tensors, load = None, checkpoint.tensors, staticmethod(checkpoint.load)

        @staticmethod
        def value(name):
            return config

    built = Skeleton(View, build_spec(config, checkpoint.tensors))
    with torch.no_grad():
        [(hidden, calls)] = list(built.open_calls([ids]))
        for i in range(len(built.layers)):
            built.load_layer(i)
            hidden = built.run_layer(i, hidden, calls[i])
    return hidden


def test_an_interrupted_run_resumes_to_the_same_bytes(tmp_path, text, monkeypatch):
    from doctor.quant import export

    uneven("llama").write(tmp_path / "m")
    quantized(tmp_path / "m", tmp_path / "whole", text)
    write, count = export.Output.write_part, 0

    def killed(self, name, tensors):
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        write(self, name, tensors)

    monkeypatch.setattr(export.Output, "write_part", killed)
    with pytest.raises(KeyboardInterrupt):
        quantized(tmp_path / "m", tmp_path / "o", text)
    monkeypatch.setattr(export.Output, "write_part", write)
    quantized(tmp_path / "m", tmp_path / "o", text, resume=True)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "o" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("sym", [True, False])
def test_scales_and_clipping_never_lose_to_rounding(sym):
    W, H = torch.randn(48, 90, generator=torch.Generator().manual_seed(2)), hessian(90)
    rules = {"bits": 4, "group_size": 30, "sym": sym, "zero_min": 0}
    s, found = awq_search.find_scales([W], H, awq_source.Source("norm", "x"), **rules)
    assert found.startswith("rms(x)^") and s.shape == (90,) and (s > 0).all()
    plain = fit(W, 4, 30, sym)
    base = proxy_loss(W, dequantize(quantize(W, plain, 4), plain), H)
    scaled = awq.solve(W * s, H / s / s[:, None], s, **rules)
    assert scaled.loss < base and scaled.rtn_loss == pytest.approx(base, rel=1e-3)
    fitted = fit(W, 4, 30, sym, mse=True, weight=H.diagonal())
    clipped = awq.clip(W, H, plain, 30, 4, others=(fitted,))
    D, E, F = ((W - dequantize(quantize(W, grid, 4), grid)).reshape(48, 3, 30) for grid in (clipped, plain, fitted))
    for g in range(3):
        block = H[g * 30 : g * 30 + 30, g * 30 : g * 30 + 30]
        kept, least = (
            ((D[:, g] @ block) * D[:, g]).sum(1),
            torch.minimum(((E[:, g] @ block) * E[:, g]).sum(1), ((F[:, g] @ block) * F[:, g]).sum(1)),
        )
        assert (kept <= least * (1 + 1e-5)).all()


def test_equal_columns_need_no_scales():
    generator = torch.Generator().manual_seed(5)
    W = torch.randn(16, 1, generator=generator) * torch.randn(16, 32, generator=generator).sign()
    s, found = awq_search.find_scales(
        [W], 2 * torch.eye(32), awq_source.Source("norm", "x"), bits=4, group_size=32, sym=True, zero_min=0
    )
    assert found == "" and torch.equal(s, torch.ones(32))


def test_columns_of_small_weights_grow_where_activations_are_equal():
    W = torch.randn(64, 32, generator=torch.Generator().manual_seed(6))
    W[:, 3:] *= 0.1
    rules = {"bits": 4, "group_size": 32, "sym": True, "zero_min": 0}
    s, found = awq_search.find_scales([W], torch.eye(32), awq_source.Source("norm", "x"), **rules)
    assert "size(w)" in found and (s[3:].min() > s[:3].max())
    plain = fit(W, 4, 32, True)
    assert awq.solve(W * s, torch.eye(32) / s / s[:, None], s, **rules).loss < 0.7 * proxy_loss(
        W, dequantize(quantize(W, plain, 4), plain), torch.eye(32)
    )


@pytest.mark.parametrize("kind", ["norm", "norm+1"])
def test_the_factor_follows_what_the_norm_stores(kind):
    weight = torch.tensor([0.0, 1.37, -0.4, 2.0]).bfloat16().float()
    s, new, bias = awq_fold.fold(
        awq_source.Source(kind, "x"), torch.tensor([1.3, 0.7, 3.0, 1.0]), weight, None, torch.bfloat16
    )
    offset = 1.0 if kind == "norm+1" else 0.0
    assert torch.equal(new, new.bfloat16().float()) and bias is None
    assert torch.allclose((new + offset) * s, weight + offset, rtol=1e-6)


def test_heads_shared_by_queries_share_their_factors():
    source = awq_source.Source("rows", "v", repeat=3, head=2)
    s = torch.tensor([1.0, 2, 3, 4])
    assert source.spread(s).tolist() == [1, 2, 1, 2, 1, 2, 3, 4, 3, 4, 3, 4]
    assert torch.equal(source.gather(source.spread(s)), s)


def test_a_fold_that_moves_the_output_is_taken_back(tmp_path, text, monkeypatch):
    uneven("llama").write(tmp_path / "m")
    real = awq_fold.fold
    monkeypatch.setattr(
        awq_fold, "fold", lambda source, s, *rest: (real(source, s, *rest)[0] * 1.1, *real(source, s, *rest)[1:])
    )
    result = quantized(tmp_path / "m", tmp_path / "o", text)
    assert all("folding moved" in r["solve"]["note"] or "scales of 1" in r["solve"]["note"] for r in result.linears)
    before, after = Checkpoint.open(tmp_path / "m"), Checkpoint.open(tmp_path / "o")
    name = "model.layers.0.input_layernorm.weight"
    assert (before.load(name) == after.load(name)).all()


def test_a_linear_that_came_out_worse_than_rounding_is_found(tmp_path, text, monkeypatch):
    uneven("llama").write(tmp_path / "m")
    monkeypatch.setattr(
        awq, "clip", lambda W, H, start, *rest, **more: start._replace(scale=(start.scale * 0.25).half().float())
    )
    result = quantized(tmp_path / "m", tmp_path / "o", text)
    worse = {r["name"] for r in result.linears if not r["solve"]["loss"] <= r["solve"]["rtn_loss"] * 1.01}
    assert worse == {r["name"] for r in result.linears}
    found = {f.message.partition(":")[0] for f in result.report.findings if f.code == "Q405"}
    assert found == worse


def test_the_search_on_some_rows_first_chooses_as_the_search_on_all(monkeypatch):
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(n, 96, generator=generator) for n in (700, 1300)]
    H, source = hessian(96), awq_source.Source("norm", "norm.weight")
    options = {"bits": 4, "group_size": 32, "sym": False, "zero_min": 0}
    sampled, found = awq_search.find_scales(weights, H, source, **options)
    monkeypatch.setattr(awq_search, "FIRST_ROWS", 1300)
    whole, _ = awq_search.find_scales(weights, H, source, **options)

    def loss(s):
        return sum(awq.solve(W * s, H / s / s[:, None], s, **options).loss for W in weights)

    assert found and loss(sampled) == pytest.approx(loss(whole), rel=0.02)


@pytest.mark.parametrize("native", ["1", "0"])
@pytest.mark.parametrize(("sym", "width"), [(True, 32), (False, 32), (False, 96)])
def test_refinement_lowers_the_loss_of_codes_from_anywhere(native, sym, width, monkeypatch):
    monkeypatch.setenv("DOCTOR_NATIVE", native)
    W, H = torch.randn(40, 96, generator=torch.Generator().manual_seed(8)), hessian(96)
    grid = fit(W, 4, width, sym)
    codes = quantize(W, grid, 4)
    before = proxy_loss(W, dequantize(codes, grid), H)
    better, moved = refine.improve(W, H, codes, grid, bits=4, group_size=width, sym=sym, zero_min=0)
    assert proxy_loss(W, dequantize(better, moved), H) < 0.8 * before
    assert (
        torch.equal(moved.zero, grid.zero)
        and torch.equal(moved.scale, moved.scale.half().float())
        and better.max() <= 15
    )
    still, same = refine.improve(W, torch.zeros(96, 96), codes, grid, bits=4, group_size=width, sym=sym, zero_min=0)
    assert torch.equal(still, codes) and same is grid


def test_folded_norms_are_written_in_one_order_in_every_process():
    """A set of strings is ordered by a hash that differs between processes, and a resumed run is another process."""
    names = [f"model.layers.0.norm{i}.weight" for i in range(20)]
    folding = awq_fold.ScaleFolding({}, {n: torch.nn.LayerNorm(4) for n in names}, lambda name: torch.bfloat16)
    folding.norms = set(names)
    assert list(folding.tensors()) == sorted(names)
