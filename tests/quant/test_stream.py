"""Rounding without a model: what the native loops make is what torch defines, shards are whole or absent, and the
output is that of a run layer by layer.
"""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from doctor import api
from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import NotQuantizable, PlanRefused
from doctor.core.methods import STATIC
from doctor.core.recipe import Recipe
from doctor.core.store import Store
from doctor.formats.known import streams
from doctor.formats.registry import KNOWN
from doctor.formats.schemes import SCHEMES, fields_of
from doctor.lint.testing import tiny
from doctor.model.spec import build_spec
from doctor.quant import quantize as command
from doctor.quant.solve.float_scale import FloatScale
from doctor.quant.stream import shards
from doctor.quant.stream.choose import choose
from doctor.quant.stream.rounding import Rounding, largest

NAMES = [
    name
    for name, row in SCHEMES.items()
    if "rtn" in row.methods and KNOWN[row.fields["format"]].rows_apart and row.fields["activations"] not in STATIC
]


def recipe_of(name, **given):
    return Recipe(**fields_of(name, {"method": "rtn"}), **given)


def weight(n=256, k=384, dtype=torch.bfloat16):
    rng = torch.Generator().manual_seed(1)
    W = torch.randn(n, k, generator=rng) * torch.rand(n, 1, generator=rng)
    W[3], W[:, 5], W[7, 9] = 0, 0, 30.0
    W[11] *= 1e-6
    return W.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("mse", [True, False], ids=["mse", "plain"])
@pytest.mark.parametrize("name", NAMES)
def test_the_native_loops_make_the_bytes_that_torch_defines(name, mse, dtype, monkeypatch):
    rounding = Rounding.of(recipe_of(name, mse=mse), divisor=2688 / 30 if name.startswith("NVFP4") else 1.0)
    W = weight(dtype=dtype)
    native = rounding.round(W)
    monkeypatch.setenv("DOCTOR_NATIVE", "0")
    defined = rounding.round(W)
    assert native.parts.keys() == defined.parts.keys()
    for part, tensor in defined.parts.items():
        found = native.parts[part]
        assert found.dtype == tensor.dtype and found.shape == tensor.shape
        ours, wanted = found.view(torch.uint8), tensor.view(torch.uint8)
        assert torch.equal(ours, wanted), f"{part}: {int((ours != wanted).sum())} bytes"
    assert native.lost == pytest.approx(defined.lost, rel=1e-4) and native.whole == pytest.approx(
        defined.whole, rel=1e-4
    )


def test_another_range_of_scales_loses_less():
    name, share, W, divisor = "NVFP4A16", 0.97, weight(), 2688 / 30
    plain = Rounding.of(recipe_of(name, mse=False), divisor).round(W)
    better = Rounding.of(recipe_of(name), divisor).round(W)
    assert better.lost < share * plain.lost


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named(value):
    W = weight()
    W[17, 33] = value
    with pytest.raises(NotQuantizable, match=r"W\[17, 33\]"):
        Rounding.of(recipe_of("FP8_DYNAMIC")).round(W)
    assert not torch.isfinite(largest(W, 384)[17]).all()


@pytest.mark.parametrize("k", [1, 17, 130, 300])
def test_rows_of_any_width_are_rounded(k):
    W = weight()[:6, :k].contiguous()
    parts = Rounding.of(recipe_of("INT8")).round(W).parts
    back = parts["weight"].float() * parts["weight_scale"].float()
    assert float((back - W.float()).abs().max()) <= float(parts["weight_scale"].float().max()) / 1.9


def written(tmp_path, case=None, name="m"):
    folder = tmp_path / name
    (case or tiny("llama")).write(folder)
    return folder


def bytes_of(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.mark.parametrize("name", ["FP8_DYNAMIC", "INT8", "MXFP8"])
def test_the_output_is_that_of_a_run_layer_by_layer(name, tmp_path, monkeypatch):
    folder = written(tmp_path)
    assert api.quantize(folder, tmp_path / "a", recipe_of(name)).output
    monkeypatch.setattr(command, "streams", lambda recipe: False)
    assert api.quantize(folder, tmp_path / "b", recipe_of(name, mse=False)).output
    one, other = (load_file(tmp_path / x / "model.safetensors") for x in "ab")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[n].view(torch.uint8), other[n].view(torch.uint8)) for n in one)
    assert json.loads((tmp_path / "a/config.json").read_text()) == json.loads((tmp_path / "b/config.json").read_text())


def sharded(tmp_path):
    """The tiny model in three shards."""
    folder = written(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for number in range(3):
        file = f"model-{number + 1:05d}-of-00003.safetensors"
        save_file({n: tensors[n] for n in names[number::3]}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names[number::3], file)
    (folder / "model.safetensors").unlink()
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("name", ["NVFP4A16", "FP8_DYNAMIC"])
def test_an_interrupted_run_goes_on_at_the_next_shard(name, tmp_path, monkeypatch):
    folder, recipe = sharded(tmp_path), recipe_of(name)
    before = bytes_of(folder)
    assert api.quantize(folder, tmp_path / "whole", recipe).output
    real, seen = shards.OutputShard.write, []

    def failing(self, info):
        if info.shard.startswith("model-00003"):
            raise KeyboardInterrupt
        return real(self, info)

    monkeypatch.setattr(shards.OutputShard, "write", failing)
    with pytest.raises(KeyboardInterrupt):
        api.quantize(folder, tmp_path / "o", recipe)
    assert not (tmp_path / "o").exists()
    with pytest.raises(PlanRefused, match="holds 2 finished shards"):
        api.quantize(folder, tmp_path / "o", recipe)

    def counting(self, info):
        seen.append(info.shard)
        return real(self, info)

    monkeypatch.setattr(shards.OutputShard, "write", counting)
    assert api.quantize(folder, tmp_path / "o", recipe, resume=True).output
    assert set(seen) == {"model-00003-of-00003.safetensors"}
    assert bytes_of(tmp_path / "o") == bytes_of(tmp_path / "whole") and bytes_of(folder) == before
    assert not list(tmp_path.glob(".o.*"))


def test_what_fixes_make_of_the_source_is_read(tmp_path):
    case = tiny("llama")
    name = "model.layers.1.mlp.up_proj.weight"
    case.tensors[name][3, 5] = 0x7FC0  # a NaN
    folder = written(tmp_path, case)
    assert api.quantize(folder, tmp_path / "a", recipe_of("FP8_DYNAMIC")).output is None
    assert api.quantize(folder, tmp_path / "b", recipe_of("FP8_DYNAMIC"), unsafe_fixes=["W201"]).output
    found = load_file(tmp_path / "b" / "model.safetensors")[name]
    assert found.dtype == torch.float8_e4m3fn and float(found[3, 5]) == 0 and torch.isfinite(found.float()).all()


def test_linears_of_different_shards_share_their_divisor(tmp_path):
    folder = sharded(tmp_path)
    assert api.quantize(folder, tmp_path / "o", recipe_of("NVFP4A16")).output
    found = {}
    for path in (tmp_path / "o").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {n: file.get_tensor(n) for n in file.keys() if n.endswith("global_scale")}  # noqa: SIM118
    first = {n.rpartition("_proj")[0].rpartition(".")[2]: float(t) for n, t in found.items() if ".layers.0." in n}
    assert first["q"] == first["k"] == first["v"] and first["gate"] == first["up"] != first["down"]


def test_experts_apart_and_those_kept_are_as_a_run_chooses_them(tmp_path, monkeypatch):
    folder = written(tmp_path, tiny("qwen3_moe"))
    recipe = replace(recipe_of("FP8_DYNAMIC"), keep=("*down_proj",))
    assert api.quantize(folder, tmp_path / "a", recipe).output
    monkeypatch.setattr(command, "streams", lambda recipe: False)
    assert api.quantize(folder, tmp_path / "b", recipe).output
    one, other = (load_file(tmp_path / x / "model.safetensors") for x in "ab")
    assert {n: t.dtype for n, t in one.items()} == {n: t.dtype for n, t in other.items()}
    assert json.loads((tmp_path / "a/config.json").read_text()) == json.loads((tmp_path / "b/config.json").read_text())


def test_transposed_weights_are_turned(tmp_path):
    folder = written(tmp_path, tiny("gpt2"))
    checkpoint = Checkpoint.open(folder)
    spec = build_spec(checkpoint.value("config.json"), checkpoint.tensors)
    chosen = choose(checkpoint, spec, recipe_of("INT8"), {}, Store())
    tensor, linear = next((t, x) for t, x in chosen.rounded.items() if x.transposed)
    rows = list(shards.weight_rows(chosen.view, chosen.view.tensors[tensor], linear, 1))
    assert [tuple(r.shape) for r in rows] == [(linear.out_features, linear.in_features)]


def test_only_what_needs_no_calibration_and_no_columns_is_streamed():
    assert streams(recipe_of("FP8_BLOCK")) and streams(recipe_of("MXFP4"))
    assert not streams(Recipe(**fields_of("NVFP4A16", {}))) and not streams(Recipe("rtn"))


def test_memory_does_not_grow_with_a_tensor(tmp_path):
    """Rows are read in slabs of a few MiB, whatever the tensor's size."""
    name = "model.layers.0.mlp.up_proj.weight"
    W = np.random.default_rng(random.Random(0).randrange(9)).integers(0, 0x4000, (9000, 1024), np.uint16)
    folder = tmp_path / "m"
    folder.mkdir()
    save_file({name: torch.from_numpy(W.view(np.int16)).view(torch.bfloat16)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    checkpoint = Checkpoint.open(folder)
    info = checkpoint.tensors[name]
    from doctor.model.linears import Linear

    linear = Linear(name.removesuffix(".weight"), name, "up", 0, 1024, 9000)
    sizes = [len(rows) for rows in shards.weight_rows(checkpoint, info, linear, 128)]
    assert sum(sizes) == 9000 and max(sizes) * 2048 <= shards.CHUNK_BYTES and all(n % 128 == 0 for n in sizes[:-1])


@pytest.mark.parametrize("least", [2.0**-9, 2.0**-6, 1.0])
def test_scales_of_nvfp4_are_those_of_torchs_own_cast(least):
    """The stream rounds them by their bits; ties and the ends of the range are among these."""
    steps = torch.arange(0, 449 * 64, dtype=torch.float32) / 64
    wanted = steps[steps >= least]
    for divisor in (1.0, 3.7, 12345.678):
        made = FloatScale(False, divisor)
        spans = torch.cat([wanted, torch.rand(4096) * 448 + least]) * 6 / divisor
        empty = torch.zeros(spans.shape, dtype=torch.bool)
        empty[::97] = True
        spans[::97] = 0.0
        for level in (6.0, 4.0):
            plain = torch.where(empty, torch.tensor(made.unit), made.snap(spans / (2 * level))) * 2
            assert torch.equal(made.of_values(spans, level, empty), plain)
