"""A client runs the quantized files, and what it computes is compared with what doctor does."""

import json
import math
import stat
from importlib.resources import files
from importlib.util import find_spec

import jsonschema
import pytest
import torch
from healthy_models import save

from doctor import api
from doctor.core.errors import DoctorError
from doctor.core.recipe import Recipe
from doctor.evaluate.clients.logprobs import run_client
from doctor.evaluate.verify import verify
from doctor.quant.quantize import quantize
from doctor.report import render

SCHEMA = json.loads(files("doctor.report.formats").joinpath("schema.json").read_text())
ROWS = [torch.randint(3, 90, (1, 24), generator=torch.Generator().manual_seed(i)) for i in range(2)]


def of_transformers(folder):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = [model(input_ids=ids).logits[0, :-1] for ids in ROWS]
    return [torch.log_softmax(x, 1).gather(1, ids[0, 1:, None])[:, 0] for x, ids in zip(logits, ROWS, strict=True)]


def test_the_client_is_compared_token_by_token(tmp_path):
    save("qwen3", tmp_path / "m")
    own = of_transformers(tmp_path / "m")
    ran = run_client("transformers", None, tmp_path / "m", ROWS, own)
    assert ran.tokens == 46 and ran.apart < 0.02 and not ran.refused and not ran.reason
    assert math.isclose(ran.perplexity, ran.perplexity_doctor, rel_tol=0.02)
    shifted = run_client("transformers", None, tmp_path / "m", ROWS, [x - 1 for x in own])
    assert math.isclose(shifted.apart, 1, rel_tol=0.05) and shifted.apart_p99 >= shifted.apart


def test_what_the_client_refuses_is_said_in_its_words(tmp_path):
    save("qwen3", tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"architectures": ["NobodysModel"]}))
    ran = run_client("transformers", None, tmp_path / "m", ROWS, [torch.zeros(23)] * 2)
    assert "no class 'NobodysModel'" in ran.refused and ran.tokens == 0


def test_a_client_that_is_not_there_hangs_or_dies_is_no_verdict(tmp_path):
    save("qwen3", tmp_path / "m")
    own = [torch.zeros(23)] * 2
    assert "vllm" in run_client("vllm", None, tmp_path / "m", ROWS, own).reason
    for name, text, reason in (("hangs", "sleep 60", "had not answered"), ("dies", "exit 3", "without an answer")):
        script = tmp_path / name
        script.write_text(f"#!/bin/sh\n{text}\n")
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        assert reason in run_client("vllm", str(script), tmp_path / "m", ROWS, own, seconds=1).reason
    with pytest.raises(DoctorError, match="cannot be started"):
        run_client("vllm", str(tmp_path / "absent"), tmp_path / "m", ROWS, own)


@pytest.mark.skipif(not find_spec("compressed_tensors"), reason="compressed-tensors is not installed")
def test_verify_says_what_the_client_computes_and_judges_it(tmp_path):
    save("qwen3", tmp_path / "m")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"input_ids": row[0].tolist()}) + "\n" for row in ROWS))
    recipe = Recipe(method="rtn", group_size=32, format="compressed-tensors")
    quantize(tmp_path / "m", tmp_path / "q", recipe)
    report = verify(tmp_path / "m", tmp_path / "q", text=rows, context=24, rows=2, client="transformers")
    ran = report.extra["client_run"]
    assert ran["tokens"] == 46 and ran["apart"] < 0.05 and "O624" not in {f.code for f in report.findings}
    jsonschema.validate(json.loads(render("json", [report])), SCHEMA)
    assert "transformers" in render("full", [report]).split("client ")[-1]
    with pytest.raises(DoctorError, match=r"--client ollama: must be one of transformers, vllm and llama\.cpp"):
        verify(tmp_path / "m", tmp_path / "q", client="ollama")


def test_an_interpreter_may_be_named_from_where_the_user_stands(tmp_path, monkeypatch):
    """The client runs in a directory of its own."""
    program = tmp_path / "env" / "python"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nexit 3\n")
    program.chmod(0o755)
    save("qwen3", tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    report = api.verify("m", "m", client="vllm", client_python="env/python", rows=1, context=16, load_proof=False)
    assert "without an answer" in report.to_json()
