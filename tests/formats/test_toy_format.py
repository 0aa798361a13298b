"""A format that nobody has, added by one class: it goes through quantize, check, read-back, fix and verify."""

import json
import random

import numpy as np
import pytest
import torch

from doctor import api
from doctor.checkpoint.codecs import from_codes
from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import DoctorError
from doctor.core.recipe import Recipe, Scheme
from doctor.formats.arrays import cast, contiguous
from doctor.formats.base import Format, Part, Quantization
from doctor.formats.grid import GridKind
from doctor.formats.registry import KNOWN, forget, register
from doctor.lint.testing import tiny
from doctor.quant.dequantize import as_float


class Rows8(Format):
    """8-bit codes a byte each, whole rows under a float32 scale, symmetric: tensors with names of their own."""

    name = "rows8"
    label = "Rows8"
    quant_methods = ("rows8",)
    config_files = ("rows8.json",)
    words, scales = "row_codes", "row_scale"
    part_names = ("row_codes", "row_scale")
    needed = ("row_scale",)
    bits = (8,)
    own_widths = False

    def grid(self, scheme):
        return GridKind(8, -1, True, scale_dtype="F32")

    def parts(self, in_features, out_features, scheme):
        return Part("row_codes", "U8", (out_features, in_features)), Part("row_scale", "F32", (out_features, 1))

    def size(self, words, bits, version=""):
        return words[1], words[0]

    def scale_shape(self, in_features, out_features, group):
        return out_features, 1

    def pack(self, codes, grid, g_idx, scheme):
        assert (grid.zero == 128).all()
        return {"row_codes": contiguous(codes), "row_scale": contiguous(grid.scale)}

    def unpack(self, parts, scheme, shape=None, rows=None):
        rows = rows or slice(0, len(parts["row_codes"]))
        return (cast(parts["row_codes"][rows], "F32") - 128) * cast(parts["row_scale"][rows], "F32")

    def config(self, recipe, kept=(), widths=None):
        return {"quant_method": "rows8", "left_out": sorted(kept)}

    def read(self, raw, file, pointer, own=True):
        return Quantization(self, self, Scheme(8, -1, True), False, "rows8", dict(raw), file, pointer)

    def excluded(self, raw):
        return lambda module: module in raw["left_out"]


@pytest.fixture
def rows8():
    register(Rows8)
    yield KNOWN["rows8"]
    forget("rows8")


@pytest.fixture
def made(rows8, tmp_path):
    """(source, quantized) of a tiny model with one linear kept."""
    source = tiny("llama").write(tmp_path / "source")
    recipe = Recipe("rtn", 8, -1, format="rows8", keep=("*.0.*down_proj",))
    return source, api.quantize(source, tmp_path / "quantized", recipe)


def test_a_recipe_may_name_it_once_it_is_known_and_no_longer_after(rows8):
    assert Recipe("rtn", 8, -1, format="rows8").label() == "rows8 8-bit per-channel"
    with pytest.raises(DoctorError, match="rows8 with 4 bits; must be 8: the Rows8 format has no other width"):
        Recipe("rtn", 4, format="rows8")
    with pytest.raises(DoctorError, match="Rows8 has one width for all linears"):
        Recipe("rtn", 8, -1, format="rows8", bits_for=("*down*=8",))
    forget("rows8")
    with pytest.raises(DoctorError, match="format 'rows8'; must be one of gptq, gptq_v2, awq, compressed-tensors"):
        Recipe("rtn", 8, -1, format="rows8")
    register(Rows8)


def test_it_is_quantized_with_its_own_tensors_and_configs(made):
    _source, result = made
    out = Checkpoint.open(result.output)
    assert result.report.ok and not [f for f in result.report.findings if f.severity == "error"]
    name = "model.layers.1.mlp.down_proj"
    assert {n: out.tensors[n].dtype.name for n in out.tensors if n.startswith(name)} == {
        f"{name}.row_codes": "U8",
        f"{name}.row_scale": "F32",
    }
    assert "model.layers.0.mlp.down_proj.weight" in out.tensors
    stated = out.value("config.json")["quantization_config"]
    assert stated == json.loads((result.output / "rows8.json").read_text())
    assert KNOWN["rows8"].excluded(stated)("model.layers.0.mlp.down_proj")
    sizes = KNOWN["rows8"].bytes(128, 64, Scheme(8, -1))
    assert sum(out.tensors[f"{name}.{part}"].nbytes for part in ("row_codes", "row_scale")) == sizes == 128 * 64 + 256


def test_it_is_checked_as_a_packed_checkpoint(made):
    source, result = made
    report = api.check(result.output)
    assert not report.crashed and not report.findings
    assert report.recipe.label() == "rows8 8-bit per-channel"
    assert report.summary["parameters"] == api.check(source).summary["parameters"]
    ran = {run.rule.code for run in report.runs if run.status != "skipped"}
    assert {"O607", "O612", "O614"} <= ran


def test_a_part_that_is_absent_is_found(made, tmp_path):
    from safetensors.torch import load_file, save_file

    _source, result = made
    tensors = load_file(result.output / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.row_scale"]
    save_file(tensors, result.output / "model.safetensors", {"format": "pt"})
    found = [f for f in api.check(result.output).findings if f.code == "O612"]
    assert [f.message for f in found] == ["model.layers.1.mlp.down_proj is packed, but has no row_scale"]


def test_it_reads_back_in_torch_and_is_made_plain_in_numpy_alike(made, tmp_path):
    source, result = made
    view, original = as_float(Checkpoint.open(result.output)), Checkpoint.open(source)
    api.fix(result.output, tmp_path / "plain", unsafe_fixes=("C147",))
    plain = Checkpoint.open(tmp_path / "plain")
    assert set(plain.tensors) == set(original.tensors)
    name = "model.layers.1.mlp.down_proj.weight"
    values, kept = view.load(name), from_codes(original.load(name), "BF16")
    assert np.abs(values - kept).max() <= np.abs(kept).max() / 127
    rounded = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert (plain.load(name) == rounded).all()


def test_it_is_verified_against_the_original(made, tmp_path):
    source, result = made
    rng = random.Random(0)
    rows = [{"input_ids": [1] + [rng.randrange(3, 96) for _ in range(31)]} for _ in range(4)]
    text = tmp_path / "rows.jsonl"
    text.write_text("\n".join(map(json.dumps, rows)))
    report = api.verify(source, result.output, text=text, context=32, rows=4)
    assert {f.code for f in report.findings} <= {"O606"}  # random weights guess badly, which is the original's fault
    assert report.extra["comparison"]["kl_mean"] < 1e-3
