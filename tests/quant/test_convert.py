"""`doctor convert`: the same weights in other words, or as plain floats; and what it refuses."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from fix_cases import quantized

from doctor import api
from doctor.checkpoint.codecs import to_codes
from doctor.checkpoint.directory import Checkpoint
from doctor.cli.main import cli
from doctor.core.errors import PlanRefused
from doctor.core.records import LoadProof
from doctor.formats.registry import KNOWN, read_quantization
from doctor.lint.testing import tiny
from doctor.quant.client import Client
from doctor.quant.conversion import targets
from doctor.quant.convert import convert
from doctor.quant.dequantize import as_float

PACKED = [
    ("gptq", 4, True, False),
    ("gptq", 3, False, False),
    ("gptq", 4, True, True),
    ("gptq_v2", 8, True, True),
    ("gptq_v2", 4, False, False),
    ("awq", 4, False, False),
    ("awq", 4, True, False),
    ("compressed-tensors", 4, True, False),
    ("compressed-tensors", 8, False, False),
]
INTEGERS = [name for name in targets() if name in KNOWN]


def weights(folder):
    """name -> f32 values of every linear, as engines compute with them."""
    read = as_float(Checkpoint.open(folder))
    return {n: read.load(n) for n in read.tensors if "_proj.weight" in n}


def floats_to_hold(folder, dtype):
    return {n: to_codes(w, dtype) for n, w in weights(folder).items()}


@pytest.mark.parametrize("target", INTEGERS)
@pytest.mark.parametrize("form, bits, sym, act_order", PACKED)
def test_codes_and_grid_stay_the_same_or_the_reason_is_said(tmp_path, form, bits, sym, act_order, target):
    _case, source = quantized(tmp_path / "in", form, bits, sym, act_order)
    new = KNOWN[target]
    why = (
        "is stored as"
        if form == target
        else "bits; AWQ holds 4"
        if bits not in new.bits
        else "scattered over columns (act-order), in 14 of 14 linears"
        if act_order and not new.order_key
        else ""
    )
    if why:
        with pytest.raises(PlanRefused, match=why.replace("(", r"\(").replace(")", r"\)")):
            convert(source, tmp_path / "out", target)
        assert not (tmp_path / "out").exists()
        return
    done = convert(source, tmp_path / "out", target)
    assert done.conversion.exact and done.conversion.linears == 14 and done.report.ok, done.report.findings
    before, after = weights(source), weights(tmp_path / "out")
    assert before.keys() == after.keys() and all((before[n] == after[n]).all() for n in before)
    config = Checkpoint.open(tmp_path / "out").value("config.json")
    read = read_quantization(config["quantization_config"], "config.json", "/quantization_config")
    assert read.format is new and read.bits == bits and read.group_size == 32 and read.desc_act == act_order
    assert {p.name for p in (tmp_path / "out").iterdir() if "quant" in p.name} == set(new.config_files) & {
        p.name for p in (tmp_path / "out").iterdir()
    }
    assert not [f for f in api.check(tmp_path / "out").findings if f.severity == "error"]


def test_a_conversion_and_back_gives_the_first_files_tensors(tmp_path):
    _case, source = quantized(tmp_path / "in", "gptq")
    convert(source, tmp_path / "ct", "compressed-tensors")
    convert(tmp_path / "ct", tmp_path / "back", "gptq")
    first, last = Checkpoint.open(source), Checkpoint.open(tmp_path / "back")
    assert first.tensors.keys() == last.tensors.keys()
    assert all((first.load(n) == last.load(n)).all() for n in first.tensors)


def test_autorounds_packing_becomes_plain_gptq(tmp_path):
    _case, source = quantized(tmp_path / "in", "gptq")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "data_type": "int",
    }
    (source / "config.json").write_text(json.dumps(config))
    (source / "quantize_config.json").unlink()
    convert(source, tmp_path / "out", "gptq")
    first, last = Checkpoint.open(source), Checkpoint.open(tmp_path / "out")
    assert last.value("config.json")["quantization_config"]["quant_method"] == "gptq"
    assert last.value("quantize_config.json") == last.value("config.json")["quantization_config"]
    assert all((first.load(n) == last.load(n)).all() for n in first.tensors)


@pytest.mark.parametrize("target, dtype", [("bf16", "BF16"), ("f16", "F16")])
@pytest.mark.parametrize("form, bits, sym, act_order", PACKED[1::3])
def test_plain_floats_are_the_engines_weights_rounded_once(tmp_path, form, bits, sym, act_order, target, dtype):
    _case, source = quantized(tmp_path / "in", form, bits, sym, act_order)
    done = convert(source, tmp_path / "out", target)
    out = Checkpoint.open(tmp_path / "out")
    assert not done.conversion.exact and {i.dtype.name for i in out.tensors.values()} == {dtype}
    want = floats_to_hold(source, dtype)
    assert want and all((out.load(n) == codes).all() for n, codes in want.items())
    config = out.value("config.json")
    assert (
        "quantization_config" not in config
        and config.get("dtype", config.get("torch_dtype")) == ({"BF16": "bfloat16", "F16": "float16"}[dtype])
    )


def test_formats_with_scales_beside_the_weight_become_floats_too(tmp_path):
    from doctor.lint.engine import load_rules

    load_rules()
    import doctor.rules.c147_already_quantized as c147

    case = c147.eight_bit_floats()
    done = convert(case.write(tmp_path / "fp8"), tmp_path / "out", "bf16")
    assert done.conversion.old == "FP8" and done.conversion.linears == 14
    assert {i.dtype.name for i in Checkpoint.open(tmp_path / "out").tensors.values()} == {"BF16"}
    with pytest.raises(PlanRefused, match="FP8 has no integer codes on an affine grid; GPTQ holds only those"):
        convert(tmp_path / "fp8", tmp_path / "again", "gptq")


def bad_example(code):
    from importlib import import_module

    return import_module(f"doctor.rules.{code}").bad()[0]


def test_a_wrong_exclude_list_does_not_keep_weights_from_becoming_floats(tmp_path):
    source = bad_example("o623_exclude_list").write(tmp_path / "in")
    assert "O623" in {f.code for f in api.check(source).findings}
    convert(source, tmp_path / "out", "bf16")
    out = Checkpoint.open(tmp_path / "out")
    assert {i.dtype.name for i in out.tensors.values()} == {"BF16"}
    assert "quantization_config" not in out.value("config.json") and not [p for p in out.entries if "quant" in p]


def test_a_scale_that_no_known_format_has_there_is_not_left_behind(tmp_path):
    source = bad_example("o621_stored_bits_differ").write(tmp_path / "in")
    with pytest.raises(PlanRefused, match="weight_scale_2 belongs to packed weights and is not read here"):
        convert(source, tmp_path / "out", "bf16")


@pytest.mark.clients
@pytest.mark.parametrize("form", ["awq", "compressed-tensors", "gptq_v2"])
def test_gptqmodels_torch_kernel_unpacks_a_conversion_to_the_same_weights(tmp_path, form):
    pytest.importorskip("gptqmodel")
    from healthy_models import save

    from doctor.core.recipe import Recipe
    from doctor.evaluate.clients.load_proof import prove_loading

    save("qwen3", tmp_path / "m")
    api.quantize(tmp_path / "m", tmp_path / "q", Recipe(method="rtn", format=form, group_size=32))
    convert(tmp_path / "q", tmp_path / "out", "gptq")
    proof = prove_loading(tmp_path / "out")
    assert proof.whole and proof.compared == 3 and "gptqmodel" in proof.library


def test_a_zero_point_that_the_format_cannot_hold_is_named(tmp_path):
    _case, source = quantized(tmp_path / "in", "awq", sym=False)
    found = Checkpoint.open(source)
    name = "model.layers.1.mlp.up_proj.qzeros"
    info = found.tensors[name]
    with open(source / info.shard, "r+b") as file:
        file.seek(info.begin)
        file.write(bytes(info.nbytes))
    with pytest.raises(PlanRefused, match=r"model\.layers\.1\.mlp\.up_proj: GPTQ v1 stores zero - 1, and row 0"):
        convert(source, tmp_path / "out", "gptq")
    assert not (tmp_path / "out").exists() and not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    convert(source, tmp_path / "out", "gptq_v2")


def test_scales_with_more_digits_than_the_format_holds_are_refused(tmp_path):
    case, _source = quantized(tmp_path / "in", "compressed-tensors")
    for name in [n for n in case.tensors if n.endswith(".weight_scale")]:
        case.tensors[name] = np.full(case.tensors[name].shape, 0.012345, np.float32)
        case.dtypes[name] = "F32"
    with pytest.raises(PlanRefused, match="scales are not exact in float16"):
        convert(case.write(tmp_path / "wide"), tmp_path / "out", "gptq")
    assert not (tmp_path / "out").exists()


def test_what_is_no_quantized_model_is_refused_at_once(tmp_path):
    plain = tiny().write(tmp_path / "plain")
    with pytest.raises(PlanRefused, match="its weights are plain floats"):
        convert(plain, tmp_path / "out", "gptq")


def test_a_broken_source_is_not_copied(tmp_path):
    case, _source = quantized(tmp_path / "in", "gptq")
    del case.tensors["model.layers.1.mlp.up_proj.scales"]
    with pytest.raises(PlanRefused, match="Convert copies what is there"):
        convert(case.write(tmp_path / "cut"), tmp_path / "out", "awq")


def test_what_stays_in_16_bits_is_excluded_in_the_targets_spelling(tmp_path):
    case, _source = quantized(tmp_path / "in", "gptq")
    plain = tiny("llama")
    name = "model.layers.1.mlp.down_proj"
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        del case.tensors[f"{name}.{part}"], case.dtypes[f"{name}.{part}"]
    case.tensors[f"{name}.weight"] = plain.tensors[f"{name}.weight"]
    case.config["quantization_config"]["dynamic"] = {rf"-:^{name}$".replace(".", r"\."): {}}
    case.json.pop("quantize_config.json")
    source = case.write(tmp_path / "mixed")
    client = Client(
        lambda folder, modules: {name: (name,), "lm_head": (), "model.tower.proj": ()}, lambda f: LoadProof("c")
    )
    convert(source, tmp_path / "ct", "compressed-tensors", client=client)
    stated = Checkpoint.open(tmp_path / "ct").value("config.json")["quantization_config"]
    assert set(stated["ignore"]) == {"lm_head", name, "model.tower.proj"}
    convert(source, tmp_path / "awq", "awq", client=client)
    stated = Checkpoint.open(tmp_path / "awq").value("config.json")["quantization_config"]
    assert set(stated["modules_to_not_convert"]) == {"lm_head", name, "model.tower.proj"}


def test_the_command_says_sizes_and_what_the_client_said(tmp_path):
    _case, source = quantized(tmp_path / "in", "gptq")
    done = CliRunner().invoke(
        cli, ["convert", str(source), "-o", str(tmp_path / "out"), "--format", "compressed-tensors"]
    )
    assert done.exit_code == 0, done.output
    assert "✓ GPTQ → compressed-tensors: 14 linears; codes, scales and zero points are the same" in done.output
    assert "tensors " in done.output and "receipt" in done.output
    again = CliRunner().invoke(cli, ["convert", str(source), "-o", str(tmp_path / "out"), "--format", "awq"])
    assert again.exit_code != 0


def test_experts_of_gpt_oss_become_the_floats_that_transformers_makes_of_their_blocks(tmp_path):
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    from doctor.lint.testing import use_family

    with use_family("gpt_oss"):
        case = tiny()
    rng, packed = np.random.default_rng(3), {}
    for name in [n for n in case.tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, k, n = case.tensors.pop(name).shape
        case.dtypes.pop(name, None)
        blocks = rng.integers(0, 256, (experts, n, k // 32, 16), np.uint8)
        packed[name] = blocks, rng.integers(110, 122, blocks.shape[:3], np.uint8)
        case.tensors[f"{name}_blocks"], case.tensors[f"{name}_scales"] = packed[name]
        case.dtypes |= {f"{name}_blocks": "U8", f"{name}_scales": "U8"}
    case.config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    done = convert(case.write(tmp_path / "in"), tmp_path / "out", "bf16")
    assert done.report.ok and len(packed) == 4
    out = Checkpoint.open(tmp_path / "out")
    assert "quantization_config" not in out.value("config.json") and not any("_blocks" in n for n in out.tensors)
    for name, (blocks, scales) in packed.items():
        theirs = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.bfloat16)
        assert (out.load(name) == theirs.contiguous().view(torch.int16).numpy().view(np.uint16)).all()
