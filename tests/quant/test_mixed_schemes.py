"""Several schemes in one file (`--override PATTERN:scheme=NAME`): it loads in transformers as it was meant."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from doctor import api
from doctor.checkpoint.directory import Checkpoint
from doctor.cli.options import other_schemes, overrides
from doctor.core.errors import DoctorError
from doctor.core.recipe import Recipe
from doctor.formats.schemes import fields_of
from doctor.lint.testing import tiny
from doctor.quant.dequantize import as_float
from doctor.quant.forward.prefetch import load_tensor
from tests.helpers.gguf_models import rows


def recipe(scheme, *schemes_for, **given):
    return Recipe(**fields_of(scheme, given), schemes_for=schemes_for)


def written(source, out, recipe):
    text = rows(out.parent) if recipe.calibrated else None
    result = api.quantize(source, out, recipe, calibration=text, ignore=["Q"], tune="off")
    assert result.output, [f.message for f in result.report.findings if f.severity == "error"]
    assert not [f.code for f in result.report.findings if f.code in ("Q401", "Q402", "Q403") or f.severity == "error"]
    return result.output


@pytest.mark.parametrize(
    "plan",
    [
        recipe("NVFP4A16", "*self_attn*=FP8_DYNAMIC", method="rtn"),
        recipe("NVFP4A16", "*self_attn*=FP8_DYNAMIC"),
        recipe("W4A16", "*self_attn*=FP8_DYNAMIC", "*.1.mlp*=MXFP4A16", group_size=32),
    ],
    ids=["streamed", "calibrated", "three"],
)
def test_transformers_computes_what_doctor_reads_of_several_schemes(plan, tmp_path):
    source = tiny("qwen3").write(tmp_path / "m")
    out = written(source, tmp_path / "out", plan)
    stated = json.loads((out / "config.json").read_text())["quantization_config"]
    assert stated["format"] == "mixed-precision"
    assert len(stated["config_groups"]) == len(plan.schemes_for) + 1
    view = as_float(Checkpoint.open(out))
    original = Checkpoint.open(source)
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    theirs(torch.tensor([[1, 2, 3]]))  # the library unpacks before the first forward
    for name in view.tensors:
        if name.endswith("_proj.weight"):
            stored, own = theirs.get_parameter(name), load_tensor(view, name).to(torch.bfloat16)
            exact = plan.output_format != "compressed-tensors"
            # transformers makes bfloat16 of the float16 scales of integers
            assert torch.equal(stored, own) if exact else torch.allclose(stored, own, rtol=2**-6, atol=0), name
            want, got = load_tensor(original, name).float(), load_tensor(view, name)
            near = 0.05 if "self_attn" in name else 0.2  # 8-bit floats there, 4 bits in the MLP
            assert 0 < float((got.float() - want).norm()) <= near * float(want.norm()), name
    report = api.check(out)
    assert report.ok and not [f.code for f in report.findings if f.severity in ("error", "warning")]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: recipe("EXL2", "*self_attn*=FP8_DYNAMIC"), "compressed-tensors alone holds several schemes"),
        (lambda: recipe("INT8", "*self_attn*=FP8_DYNAMIC", method="gptq"), "factors are folded for all linears"),
        (lambda: recipe("NVFP4A16", "*self_attn*=FP9"), "PATTERN=SCHEME with a scheme that is known"),
    ],
)
def test_schemes_that_cannot_stand_in_one_file_are_refused(make, text):
    with pytest.raises(DoctorError, match=text):
        make()


def test_linears_that_engines_join_must_share_a_scheme(tmp_path):
    source = tiny("qwen3").write(tmp_path / "m")
    with pytest.raises(DoctorError, match="engines join q, k, v into one linear of one scheme"):
        api.quantize(source, tmp_path / "o", recipe("NVFP4A16", "*k_proj*=FP8_DYNAMIC", method="rtn"), ignore=["Q"])
    with pytest.raises(DoctorError, match="no linear that is quantized has such a name"):
        api.quantize(source, tmp_path / "o", recipe("NVFP4A16", "*wq*=FP8_DYNAMIC", method="rtn"), ignore=["Q"])


def test_one_option_takes_bits_and_schemes():
    asked = ("*down*:bits=8", "*self_attn*:scheme=fp8-dynamic")
    assert overrides(asked) == ("*down*=8",) and other_schemes(asked) == ("*self_attn*=FP8_DYNAMIC",)
    with pytest.raises(DoctorError, match="Did you mean NVFP4"):
        other_schemes(("*mlp*:scheme=NVFP5",))
