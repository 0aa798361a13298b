"""What files are judged for: a plan to quantize, serving them as they are, or nothing but themselves."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from doctor.api import check
from doctor.cli import main as cli
from doctor.core.errors import DoctorError
from doctor.core.recipe import Recipe, parse_runtime
from doctor.lint.testing import tiny, tiny_gptq


@pytest.fixture
def run(capsys, plain_environment):
    """Run `doctor ARGS`: exit_code, output, stderr."""

    def call(*args):
        with pytest.raises(SystemExit) as end:
            cli.main([str(a) for a in args])
            raise SystemExit(0)
        out = capsys.readouterr()
        return SimpleNamespace(exit_code=end.value.code or 0, output=out.out, stdout=out.out, stderr=out.err)

    return call


def fp8(block=32):
    case, rng = tiny(), np.random.default_rng(3)
    for linear in case.spec.linears:
        n, k = case.tensors[linear.tensor].shape
        case.tensors[linear.tensor] = rng.integers(1, 0x78, (n, k), np.uint8)
        scale = f"{linear.tensor}_scale_inv"
        case.tensors[scale] = np.full((n // block, k // block), 0.01, np.float32)
        case.dtypes |= {linear.tensor: "F8_E4M3", scale: "F32"}
    case.config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [block, block],
    }
    return case


@pytest.fixture
def q4(tmp_path):
    return tiny_gptq().write(tmp_path / "q4")


def codes(report):
    return {f.code for f in report.findings if f.severity != "info"}


def test_quantized_files_are_judged_to_be_served_where_nobody_says(run, q4, tmp_path):
    assert "✓ ready to serve: gptq 4-bit g32" in run("check", q4).output
    stored = fp8().write(tmp_path / "fp8")
    result = run("check", stored)
    assert result.exit_code == 0 and "✓ ready to serve: fp8 8-bit 32 × 32" in result.output
    assert "info[C147]" in result.output and "gptq 4-bit" not in result.output


@pytest.mark.parametrize("method", ["gptq", "awq", "rtn"])
def test_a_method_that_is_typed_asks_to_quantize_what_is_quantized_already(run, q4, method):
    result = run("check", q4, "--for", method)
    assert result.exit_code == 1 and "error[C147]" in result.output
    assert "would round it a second time and save nothing" in " ".join(result.output.replace("│", " ").split())
    assert "ready for" not in result.output.replace("not ready for", "")


def test_a_method_in_the_configuration_does_not(run, q4, tmp_path, monkeypatch):
    (tmp_path / "doctor.toml").write_text('[recipe]\nmethod = "gptq"\nbits = 4\ngroup-size = 32\n')
    result = run("check", q4, "--config", tmp_path / "doctor.toml")
    assert result.exit_code == 0 and "ready to serve: gptq 4-bit g32" in result.output


@pytest.mark.parametrize("goal", ["serve", "none"])
def test_floats_get_no_finding_of_a_plan_to_quantize(run, tmp_path, goal):
    folder = tiny(mlp=112).write(tmp_path)
    assert "G301" in codes(check(folder, Recipe(group_size=128)))
    report = check(folder, Recipe(group_size=128, goal=goal))
    assert not report.findings and not report.crashed
    result = run("check", folder, "--for", goal)
    assert result.exit_code == 0 and "doctor quantize" not in result.output
    said = {"serve": "ready to serve: bf16", "none": "no error in the files (bf16)"}[goal]
    assert said in result.output


def test_serving_floats_judges_heads_against_gpus(run, tmp_path):
    result = run("check", tiny().write(tmp_path), "--for", "serve", "--runtime", "vllm", "--tp", "3")
    assert result.exit_code == 1 and "error[G304]" in result.output and "not ready to serve: bf16 tp3" in result.output


def test_zero_groups_are_a_matter_of_a_plan_to_quantize(tmp_path):
    case = tiny()
    case.tensors[case.name("down")][3, 32:64] = 0
    folder = case.write(tmp_path)
    assert "W203" in codes(check(folder, Recipe(group_size=32)))
    assert "W203" not in codes(check(folder, Recipe(group_size=32, goal="none")))


@pytest.mark.parametrize("version", ["", "==0.4.1", "==0.3.3", "==latest", "==v0.9.0", "==0.6.0.post1"])
@pytest.mark.parametrize("maker", [tiny_gptq, fp8, tiny], ids=["gptq", "fp8", "floats"])
def test_every_version_is_judged_and_no_rule_crashes(tmp_path, maker, version):
    name, number = parse_runtime(f"vllm{version}")
    report = check(maker().write(tmp_path), Recipe(group_size=32, runtime=name, runtime_version=number))
    assert not report.crashed, [r.crashed for r in report.crashed]
    assert number not in ("latest", "") or not report.recipe.runtime_version


@pytest.mark.parametrize("version", ["abc", "x.y", "-1"])
def test_a_version_that_is_no_number_is_refused_in_one_sentence(run, q4, version):
    with pytest.raises(DoctorError):
        parse_runtime(f"vllm=={version}")
    result = run("check", q4, "--runtime", f"vllm=={version}")
    assert result.exit_code == 2 and f"version '{version}' of vllm; must be a number" in result.stderr


def test_a_runtime_whose_kernels_are_not_known_is_not_called_judged(run, tmp_path):
    output = run("check", fp8().write(tmp_path), "--runtime", "vllm").output
    assert "nothing against serving with vllm" not in output
    [serving] = [line for line in output.splitlines() if "Serving" in line]
    assert "○" in serving and "not judged" in serving


def test_a_runtime_that_was_judged_is_said(run, tmp_path):
    case = tiny_gptq()
    output = run("check", case.write(tmp_path), "--runtime", "vllm==0.9.0").output  # warnings, for the box
    assert "nothing against serving with vllm" in output


def test_quantize_takes_no_other_goal(run, q4, tmp_path):
    result = run("quantize", q4, "-o", tmp_path / "out", "--for", "serve")
    assert result.exit_code == 2 and "quantizes nothing" in result.stderr


def test_quantize_reads_what_is_in_eight_bits_and_says_so(tmp_path):
    from doctor.api import quantize

    result = quantize(fp8().write(tmp_path / "in"), tmp_path / "out", Recipe(method="rtn", group_size=32))
    assert result.output and any("14 weights in FP8 are decoded as they are read" in note for note in result.notes)
    assert "C147" in {f.code for f in result.report.findings if f.severity == "info"}


def test_goal_is_in_the_json_report(run, q4):
    document = json.loads(run("check", q4, "-f", "json").stdout)
    assert document["summary"]["goal"] == "serve" and document["summary"]["stored"] == "gptq 4-bit g32"


def test_a_note_needs_nobody(run, tmp_path):
    output = run("check", fp8().write(tmp_path), "--concise").output
    assert "Found 1 note" in output and "needs you" not in output
