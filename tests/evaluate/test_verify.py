"""The command itself on a model that was really trained: a healthy 4-bit copy and three broken ones get four different
answers.
"""

import json
import re
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import save_file

from doctor import api
from doctor.cli.main import cli
from doctor.lint.testing import tiny

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from demo import train

RECIPE = tiny().recipe


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(original, its 4-bit copy): two blocks that learnt the letters of Python's documentation."""
    folder = tmp_path_factory.mktemp("trained")
    original = train(tiny("llama").write(folder / "original"), steps=60)
    result = api.quantize(original, folder / "q4", RECIPE, rows=16, max_seq_length=64)
    assert result.output
    return original, result.output


def spoiled(source, folder, spoil):
    """A copy of a checkpoint whose tensors went through spoil(name, tensor)."""
    folder.mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    with safe_open(source / "model.safetensors", "pt") as file:
        tensors = {name: spoil(name, file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 - it is no dict
        save_file(tensors, folder / "model.safetensors", file.metadata())
    return folder


def answer(original, quantized, folder):
    """(exit code, code -> finding, comparison, screen) of the command."""
    file = folder / "verify.json"
    done = CliRunner().invoke(
        cli,
        ["verify", str(original), str(quantized), "--rows", "4", "--context", "64", "-f", "full", "-f", f"json:{file}"],
    )
    report = json.loads(file.read_text())
    assert not any(r["crashed"] for r in report["rules"])
    return done.exit_code, {f["code"]: f for f in report["findings"]}, report["extra"]["comparison"], done.output


def test_a_healthy_copy_agrees(trained, tmp_path):
    code, findings, figures, screen = answer(*trained, tmp_path)
    assert code == 0 and not findings and "✓ agrees with its original" in screen
    assert figures["perplexity_quantized"] < 1.1 * figures["perplexity_original"] < 40, (
        "a trained model guesses far better than among 96"
    )
    assert figures["half"]["first"] is None and "the original fits: its largest activation" in screen


def test_a_16_bit_model_against_its_base_is_asked_nothing_about_a_plan(trained, tmp_path):
    code, findings, _, screen = answer(trained[0], trained[0], tmp_path)
    assert (
        code == 0
        and not findings
        and "✓ agrees with its original: bf16" in screen
        and "not quantized" in CliRunner().invoke(cli, ["render", str(tmp_path / "verify.json"), "-f", "html"]).output
    )


@pytest.mark.parametrize("option, value, least", [("--rows", 0, 1), ("--context", 1, 2)])
def test_rows_that_hold_no_prediction_are_refused(option, value, least, trained):
    done = CliRunner().invoke(cli, ["verify", *map(str, trained), option, str(value)])
    assert f"{option} {value}: must be {least} or more" in done.output and done.exit_code == 2


def test_scales_of_nan_are_a_collapse(trained, tmp_path):
    broken = spoiled(
        trained[1],
        tmp_path / "b",
        lambda name, x: x * float("nan") if name.endswith("layers.0.mlp.down_proj.scales") else x,
    )
    code, findings, figures, screen = answer(trained[0], broken, tmp_path)
    assert (
        code == 1
        and {"W201", "O602"} <= findings.keys()
        and findings["W201"]["where"]["tensor"].endswith("layers.0.mlp.down_proj.scales")
    )
    assert (
        "layer 0 is the first whose output is not finite" in findings["O602"]["message"]
        and figures["token0_share"] == 1.0
    )
    assert "✗ does not agree" in screen


def test_zero_points_of_the_other_version_are_named_as_such(trained, tmp_path):
    mixed = spoiled(trained[1], tmp_path / "b", lambda name, x: x + 0x11111111 if name.endswith(".qzeros") else x)
    code, findings, figures, _ = answer(trained[0], mixed, tmp_path)
    assert code == 1 and "O608" in findings and "O602" not in findings
    assert figures["perplexity_quantized"] > 1.5 * figures["perplexity_original"] and figures["block_errors"][0] > 0.2


def test_one_wrong_linear_is_found_and_its_block_is_named(trained, tmp_path):
    """Scales of the wrong size and order: each of them is a scale that a file may hold, only the outputs tell."""
    wrong = spoiled(
        trained[1],
        tmp_path / "b",
        lambda name, x: x.flip(1).contiguous() * 30 if name.endswith("layers.1.mlp.down_proj.scales") else x,
    )
    code, findings, figures, screen = answer(trained[0], wrong, tmp_path)
    assert "O601" in findings and code == (findings["O601"]["severity"] == "error"), figures
    assert figures["perplexity_quantized"] > 1.25 * figures["perplexity_original"]
    assert not {"O602", "O608", "W201"} & findings.keys()
    assert (
        findings["O601"]["message"]
        .partition("; ")[2]
        .startswith("layer 1 is defective: alone, given the original's input, its error is ")
    )
    assert figures["block_errors"][0] < 0.2 < figures["block_errors"][1]
    assert figures["own_errors"][1] > 2 * figures["own_errors"][0]
    said = " ".join(screen.split())
    assert "layer 1 the most by" in said and "carried along to the last layer" in said and "each layer alone" in said
    file = str(tmp_path / "verify.json")
    for form, words in (("html", "each layer alone"), ("markdown", "layer 1 the most by")):
        assert words in CliRunner().invoke(cli, ["render", file, "-f", form]).output
    assert "每层单独" in CliRunner().invoke(cli, ["render", file, "-f", "html", "--lang", "zh"]).output


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """(original, its 4-bit copy) of six blocks that learnt the same letters."""
    folder = tmp_path_factory.mktemp("deep")
    case = tiny("llama")
    case.config["num_hidden_layers"] = 6  # transformers draws the blocks that are not there
    original = train(case.write(folder / "original"), steps=60)
    return original, api.quantize(original, folder / "q4", RECIPE, rows=16, max_seq_length=64).output


@pytest.mark.parametrize(
    "block, linear", [(0, "mlp.down_proj"), (2, "mlp.up_proj"), (3, "self_attn.o_proj"), (5, "mlp.gate_proj")]
)
def test_the_block_with_a_linear_of_another_block_is_named(block, linear, deep, tmp_path):
    """Whole and plausible in every file, and the error carried along grows after it too."""
    other, parts = (block + 3) % 6, (".qweight", ".scales", ".qzeros", ".g_idx")
    with safe_open(deep[1] / "model.safetensors", "pt") as file:
        swapped = {
            f"model.layers.{block}.{linear}{p}": file.get_tensor(f"model.layers.{other}.{linear}{p}") for p in parts
        }
    wrong = spoiled(deep[1], tmp_path / "b", lambda name, x: swapped.get(name, x))
    _, findings, figures, _ = answer(*(deep[0], wrong), tmp_path)
    assert max(range(6), key=figures["own_errors"].__getitem__) == block, figures["own_errors"]
    if "O601" in findings:
        assert f"; layer {block} is defective" in findings["O601"]["message"]


def test_a_chinese_screen_has_no_english_sentence(trained):
    """Messages of findings stay English, with their numbers; a healthy copy has none."""
    done = CliRunner().invoke(
        cli, ["verify", *map(str, trained), "--rows", "2", "--context", "32", "--memory", "1KB", "--lang", "zh", "-v"]
    )
    head = done.output.split("╭")[0]
    assert "float16" in head and "放不进给它的 0.0 GiB" in head and "与原模型相符" in done.output, done.output
    for line in head.splitlines():
        assert not re.search(r"[a-z]{2,} [a-z]{2,} [a-z]{2,} [a-z]{2,}", line), line
