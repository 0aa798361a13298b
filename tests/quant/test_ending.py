"""The end of a run: sizes, a comparison on rows that calibrated nothing, the card, the next commands, the upload."""

import io
import json
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml

from doctor import api
from doctor.checkpoint import hub_push
from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import DoctorError, MachineError
from doctor.core.recipe import Recipe
from doctor.evaluate.inputs import text_rows
from doctor.lint.testing import tiny
from doctor.quant.ending import comparing_bytes, run_figures
from doctor.quant.stage import stage_of
from doctor.report import after, results
from doctor.report import render as render_all
from doctor.report.formats.json_report import read
from doctor.report.formats.terminal import render, show
from doctor.report.screen import console

RECIPE = Recipe(group_size=32)
TEXT = "The quick brown fox jumps over the lazy dog and counts its 12 toes. " * 60


@pytest.fixture
def source(tmp_path):
    """A model that knows which tokens are common, so that no rule calls it worse than chance; with a card."""
    case = tiny("llama")
    plain = Checkpoint.open(case.write(tmp_path / "plain"))
    ids = torch.cat([row[0] for row in text_rows(plain, None, 2, 512)[0]])
    head, embed = case.tensors["lm_head.weight"], case.tensors["model.embed_tokens.weight"]
    common = torch.bincount(ids, minlength=len(head)).topk(20).indices.numpy()
    embed[:, 0] = 0x4180  # 16 in every token's first place: after the norm it is as large as all others together
    head[:, 0], head[common, 0] = 0xBE00, 0x3E00  # -1/8 and 1/8
    folder = case.write(tmp_path / "model")
    (folder / "README.md").write_text("---\nlicense: mit\ntags: [mine]\n---\n# Mine\n\nSee | here.\n", encoding="utf-8")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return folder


def quantized(source, out, **options):
    text = source.parent / "text.txt"
    return api.quantize(source, out, RECIPE, calibration=text, rows=4, max_seq_length=32, client=None, **options)


def test_a_run_says_what_it_took_and_how_far_it_is_from_its_original(source, tmp_path):
    done = quantized(source, tmp_path / "out", compare_rows=4)
    assert done.output and done.report.ok, done.report.findings
    run, compared = done.report.extra["run"], done.report.extra["comparison"]
    assert run["source_bytes"] > run["output_bytes"] > 0 and 4 < run["bits"] < 16 and run["peak_bytes"] > 1 << 26
    assert compared["tokens"] > 1000 and compared["kl_mean"] > 0 and compared["kl_span"][0] <= compared["kl_mean"]
    assert compared["kl_median"] <= compared["kl_p99"] <= compared["kl_p999"] <= compared["kl_max"]
    said = dict(results.results(done.report))
    assert "bits a weight" in said["size"] and "model.layers." in said["worst"] and "on average" in said["divergence"]
    assert "replies" not in said and "quantized to gptq 4-bit g32" in render([done.report])


def test_the_card_keeps_the_front_matter_and_holds_no_time(source, tmp_path):
    quantized(source, tmp_path / "out", compare_rows=3)
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["license"] == "mit" and front["tags"] == ["mine"] and front["base_model_relation"] == "quantized"
    for words in ("gptq 4-bit g32", "bits a weight", "KL divergence", "none of them calibrated it", "See | here."):
        assert words in text
    assert str(tmp_path) not in text
    quantized(source, tmp_path / "again", compare_rows=3)
    again = (tmp_path / "again" / "README.md").read_text(encoding="utf-8")
    assert again == text.replace("# out\n", "# again\n")


@pytest.mark.parametrize(
    "card, kept",
    [
        ("no front matter\n", {}),
        ("---\nlicense: [broken\n---\nbody\n", {}),
        ("---\r\nlicense: mit\r\n---\r\nbody\r\n", {"license": "mit"}),
        ("---\njust a line\n---\nbody\n", {}),
    ],
)
def test_a_card_of_any_kind_gives_one_that_can_be_read(card, kept, source, tmp_path):
    (source / "README.md").write_bytes(card.encode())
    api.quantize(source, tmp_path / "out", Recipe(method="rtn", group_size=32), client=None)
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(text.split("---\n")[1])
    assert {k: front[k] for k in kept} == kept and front["library_name"] == "transformers"


def test_a_card_names_no_library_that_does_not_read_the_format(source, tmp_path):
    api.quantize(source, tmp_path / "out", Recipe(method="rtn", group_size=32, format="exl2"), client=None)
    front = yaml.safe_load((tmp_path / "out" / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    assert "library_name" not in front


def test_the_base_model_is_named_where_the_files_name_it(source, tmp_path):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "_name_or_path": "org/base-1.5B"}))
    api.quantize(source, tmp_path / "out", Recipe(method="rtn", group_size=32), client=None)
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert (
        yaml.safe_load(text.split("---\n")[1])["base_model"] == "org/base-1.5B" and "org/base-1.5B, quantized" in text
    )


def test_an_original_that_is_worse_than_chance_is_not_compared_and_said(tmp_path):
    folder = tiny("llama").write(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    done = quantized(folder, tmp_path / "out", compare_rows=3)
    assert done.output and done.report.ok and "comparison" not in done.report.extra
    assert any("not compared with the original" in note for note in done.notes)
    assert "divergence not compared with the original" in " ".join(render([done.report]).split())


def test_a_comparison_that_fails_costs_no_output(source, tmp_path):
    def compare(original, written):
        assert (written / "config.json").is_file()
        raise MachineError("no memory for it.")

    done = quantized(source, tmp_path / "out", compare=compare)
    assert done.output and "not compared with the original: no memory for it." in done.notes


def test_a_comparison_keeps_the_memory_that_the_run_was_given(source, tmp_path):
    checkpoint = Checkpoint.open(source)
    need = comparing_bytes(checkpoint, 96)
    assert need > 4 * sum(i.numel for n, i in checkpoint.tensors.items() if ".0." in n or "layers" not in n)
    done = quantized(source, tmp_path / "out", compare_rows=3, memory=need - 1, tune="off")
    assert done.output and "comparison" not in done.report.extra
    assert any("--memory is" in note for note in done.notes)


def test_peak_and_bits_are_of_the_tensors(source):
    checkpoint = Checkpoint.open(source)
    figures = run_figures(checkpoint, checkpoint)
    assert figures["bits"] == 16 and figures["source_bytes"] == figures["output_bytes"]


@pytest.mark.parametrize(
    "fields, engine",
    [
        ({"group_size": 64}, "vllm serve out"),
        ({"group_size": 32, "format": "compressed-tensors", "tp": 2}, "vllm serve out --tensor-parallel-size 2"),
        ({"method": "rtn", "bits": 4, "group_size": 32, "format": "gguf", "sym": False}, "llama-server -m out/m.gguf"),
        ({"bits": 2, "group_size": 64}, "python -c"),  # vLLM has no kernel for 2 bits
        ({"format": "compressed-tensors", "kv_cache": "fp8"}, "vllm serve out --kv-cache-dtype fp8"),
        (
            {"format": "compressed-tensors", "kv_cache": "fp8", "runtime": "sglang", "tp": 2},
            "python -m sglang.launch_server --model-path out --tp 2 --kv-cache-dtype fp8_e4m3",
        ),
    ],
)
def test_the_next_commands_are_those_of_a_reader(fields, engine):
    steps = after.commands("model", Path("out"), Recipe(**fields), "m.gguf")
    assert steps[0][0] == "doctor verify model out" and steps[1][0].startswith(engine)
    assert ("vllm serve" in steps[1][0]) == ("vllm" in engine)


@pytest.mark.parametrize("fields", [{"format": "exl2"}, {"runtime": "exllamav2"}], ids=["EXL2", "GPTQ"])
def test_the_line_for_exllamav2_calls_it_as_it_is(fields):
    """Its classes at version 0.3.2, with stand-ins: it runs on GPUs alone. What is called is what there is."""
    steps = after.commands("model", Path("it's"), Recipe(group_size=64, **fields))
    assert [command.split()[0] for command, _what in steps] == ["doctor", "python"]
    code, seen = shlex.split(steps[1][0])[2], []

    class Stub:
        def __init__(self, *args, **kwargs):
            seen.append((type(self).__name__, [type(x).__name__ if isinstance(x, Stub) else x for x in args], kwargs))

        def load_autosplit(self, cache):
            seen.append(("load", [type(cache).__name__], {}))

        def generate(self, prompt, max_new_tokens, add_bos):
            seen.append(("generate", [prompt], {}))

    names = [f"ExLlamaV2{what}" for what in ("", "Cache", "Config", "Tokenizer", "DynamicGenerator")]
    stubs = {name: type(name, (Stub,), {}) for name in names}
    modules = {"exllamav2": types.ModuleType("exllamav2"), "exllamav2.generator": types.ModuleType("generator")}
    for module in modules.values():
        module.__dict__.update(stubs)
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        exec(code, {})
    assert seen == [
        ("ExLlamaV2Config", ["it's"], {}),
        ("ExLlamaV2", ["ExLlamaV2Config"], {}),
        ("ExLlamaV2Cache", ["ExLlamaV2"], {"max_seq_len": 2048, "lazy": True}),
        ("load", ["ExLlamaV2Cache"], {}),
        ("ExLlamaV2Tokenizer", ["ExLlamaV2Config"], {}),
        ("ExLlamaV2DynamicGenerator", ["ExLlamaV2", "ExLlamaV2Cache", "ExLlamaV2Tokenizer"], {"paged": False}),
        ("generate", ["Hello"], {}),
    ]


@pytest.mark.parametrize("width", [80, 120])
def test_what_to_type_next_has_one_head_beside_what_the_findings_ask_for(source, tmp_path, width):
    done = quantized(source, tmp_path / "out")  # its rows repeat one text: Q407
    steps = after.commands("model", Path("out"), RECIPE)
    file = io.StringIO()
    show([done.report], console(file, width), then=steps)
    lines = file.getvalue().splitlines()
    heads = [i for i, line in enumerate(lines) if line.startswith("  next  ")]
    assert len(heads) == 1 and "doctor explain Q407" in lines[heads[0]]
    assert [sum(command in line for line in lines) for command, _what in steps] == [1] * len(steps)


def test_the_line_for_transformers_runs_as_it_is_printed(source, tmp_path):
    pytest.importorskip("compressed_tensors")
    out = tmp_path / 'a "b" c'
    done = api.quantize(source, out, Recipe(method="rtn", group_size=32, format="compressed-tensors"), client=None)
    steps = after.commands(str(source), done.output, done.report.recipe)
    command, what = next(step for step in steps if "pipeline" in step[0])
    assert "compressed-tensors" in what
    words = shlex.split(command)
    ran = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0 and "generated_text" in ran.stdout, ran.stderr[-2000:]


def test_a_run_that_is_killed_while_it_compares_has_its_output(source, tmp_path):
    class Killed(BaseException):
        pass

    def compare(original, written):
        raise Killed

    with pytest.raises(Killed):
        quantized(source, tmp_path / "out", compare=compare)
    left = Checkpoint.open(tmp_path / "out")
    assert left.value("config.json")["quantization_config"] and not stage_of(tmp_path / "out").exists()
    assert "bits a weight" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_nothing_is_pushed_without_a_name_and_a_token(monkeypatch):
    for name in ("org", "a/b/c", "../x", "org/", ""):
        with pytest.raises(DoctorError, match="must be org/name"):
            hub_push.require_pushable(name)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(MachineError, match="no token"):
        hub_push.require_pushable("org/name")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_x")
    hub_push.require_pushable("org/name")


def test_a_push_uploads_the_folder_to_a_private_repository_and_a_refusal_names_what_to_do(tmp_path, monkeypatch):
    calls = []

    class Api:
        def create_repo(self, name, **options):
            calls.append((name, options))
            return f"https://hub/{name}"

        def upload_folder(self, **options):
            calls.append(options)

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert hub_push.push(tmp_path, "org/name") == "https://hub/org/name"
    assert calls[0] == ("org/name", {"private": True, "exist_ok": True}) and calls[1]["folder_path"] == str(tmp_path)

    def refuse(self, name, **options):
        raise OSError("403 Forbidden: no write access.\nmore")

    monkeypatch.setattr(Api, "create_repo", refuse)
    with pytest.raises(MachineError) as error:
        hub_push.push(tmp_path, "org/name")
    assert "403 Forbidden: no write access." in error.value.message and "hf upload org/name" in error.value.hint


def test_a_page_made_of_a_receipt_says_nothing_twice(source, tmp_path):
    done = quantized(source, tmp_path / "out", tune="off")
    page = render_all("html", read((done.output / "doctor.json").read_text()))
    text = page.partition("<script")[0]
    assert (
        "By area" not in text and "Receipt" in text and text.count(">calibration<") == text.count("act_order True") == 1
    )
