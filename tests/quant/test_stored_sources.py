"""A checkpoint in FP8, INT4, MXFP4, NVFP4 or bitsandbytes is quantized as it is, its codes decoded as they are read.

What the codes stand for, the formats' own libraries say (tests/formats); here a run reads it, and so does verify.
"""

import pytest
import torch
from healthy_models import save
from stored_sources import STORED, store_as

from doctor import api
from doctor.checkpoint.directory import Checkpoint
from doctor.core.recipe import Recipe
from doctor.quant.dequantize import as_float
from doctor.quant.forward.prefetch import load_tensor
from doctor.report.verdict import verdict

FAMILY = {"mxfp4": "gpt_oss", "int4-experts": "qwen3_moe"}
APART = {"fp8-block": 0.04, "fp8-channel": 0.04, "bitsandbytes": 0.12, "int4-experts": 0.12}  # four-bit floats: 0.15


@pytest.fixture(scope="module", params=STORED)
def stored(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored")
    plain = save(FAMILY.get(request.param, "llama"), folder / "plain")
    return request.param, plain, store_as(request.param, plain, folder / "codes")


def weights(checkpoint, names):
    return {name: load_tensor(checkpoint, name, torch.float32) for name in names}


def test_quantize_reads_the_numbers_that_the_codes_stand_for(stored, tmp_path):
    kind, plain, source = stored
    recipe = Recipe(method="rtn", bits=8, group_size=32, goal="quantize")
    report = api.check(source, recipe)
    assert [f.code for f in report.findings if f.severity != "info"] == []
    [note] = [f for f in report.findings if f.code == "C147"]
    assert "decoded as they are read" in note.message
    done = api.quantize(source, tmp_path / "out", recipe)
    assert done.output and any("are decoded as they are read" in n for n in done.notes)
    original, decoded, written = Checkpoint.open(plain), as_float(Checkpoint.open(source)), Checkpoint.open(done.output)
    assert "quantization_config" not in decoded.value("config.json")
    read = as_float(written)
    names = [n for n in original.tensors if original.tensors[n].dtype.is_float and n in read.tensors]
    assert len(names) > 20
    floats, codes, out = (weights(c, names) for c in (original, decoded, read))
    changed = [n for n in names if not torch.equal(floats[n], codes[n])]
    assert len(changed) >= 14 or kind == "mxfp4"
    for name in changed:
        assert (codes[name] - floats[name]).norm() < APART.get(kind, 0.15) * floats[name].norm(), name
    for name in names:  # the second rounding, to 8 bits, is a small part of the first
        assert (out[name] - codes[name]).norm() <= 0.01 * codes[name].norm(), name


def test_verify_compares_with_what_the_codes_stand_for(tmp_path):
    plain = save("llama", tmp_path / "plain")
    source = store_as("fp8-block", plain, tmp_path / "codes")
    done = api.quantize(source, tmp_path / "out", Recipe(method="rtn", bits=8, group_size=32))
    report = api.verify(source, done.output, rows=2, context=32, memory=0)
    assert report.extra["comparison"]["kl_mean"] < 1e-3
    assert [f.code for f in report.findings if f.severity == "error"] == ["O606"]  # random weights guess
    assert verdict(report)[1].startswith("no verdict on ")  # it says nothing of what was quantized


def test_a_plan_counts_what_the_codes_stand_for(tmp_path):
    plain = save("qwen3_moe", tmp_path / "plain")
    source = store_as("int4-experts", plain, tmp_path / "codes")
    plans = [
        api.plan_quantize(c, tmp_path / "out", Recipe(method="rtn", bits=8, group_size=32)) for c in (plain, source)
    ]
    assert plans[0].need == plans[1].need


def test_fixes_are_made_of_what_the_codes_stand_for(tmp_path):
    source = store_as("fp8-block", save("llama", tmp_path / "plain"), tmp_path / "codes")
    done = api.quantize(source, tmp_path / "out", Recipe(method="rtn", group_size=32), fix=True)
    assert done.output and any("C147" in note for note in done.notes)


@pytest.mark.parametrize(
    "changes, refused",
    [({"group_size": 128}, True), ({"group_size": 32}, False), ({"bits": 3}, False), ({"bits": 8}, False)],
)
def test_a_second_rounding_that_saves_nothing_is_refused_and_what_helps_is_said(changes, refused, tmp_path):
    source = store_as("int4-experts", save("qwen3_moe", tmp_path / "plain", moe_intermediate_size=128), tmp_path / "m")
    report = api.check(
        source, Recipe(**{"method": "rtn", "goal": "quantize", "group_size": 32} | changes), select=("C147",)
    )
    [found] = report.findings
    assert (found.severity == "error") == refused
    if refused:
        assert "would round it a second time and save nothing" in found.message and "--group-size 32" in found.advice


def test_codes_without_scales_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    source = store_as("fp8-block", save("llama", tmp_path / "plain"), tmp_path / "m")
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight_scale_inv"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    done = api.quantize(source, tmp_path / "out", Recipe(method="rtn", group_size=32))
    assert done.output is None
    assert {"C147", "O622"} & {f.code for f in done.report.findings if f.severity == "error"}


def test_every_way_of_storing_has_a_row_in_the_table():
    from tiny_classes import CLASSES

    assert {row.stored for row in CLASSES.values()} >= set(STORED)
