"""`verify --tasks`: the built-in choices for both models, and the harness by its own program."""

import json
import math
import sys
import textwrap

import pytest
import torch
from click.testing import CliRunner
from noisy_models import noisy

from doctor import api
from doctor.checkpoint.directory import Checkpoint
from doctor.cli.main import cli
from doctor.core.errors import DoctorError, MachineError
from doctor.core.tables import table
from doctor.evaluate import choices
from doctor.evaluate.clients.harness import require_harness, run_tasks
from doctor.lint.testing import tiny
from doctor.quant.calibration.tokenizer import load_tokenizer

QUESTIONS = table("choices")["questions"]


def test_the_questions_are_sound():
    assert len(QUESTIONS) >= 40 and len({begin for begin, *_ends in QUESTIONS}) == len(QUESTIONS)
    for begin, *ends in QUESTIONS:
        assert len(ends) == len(set(ends)) == 4 and not begin.endswith(" ")


def test_scores_are_those_of_the_whole_model(tmp_path):
    """Against transformers itself, row by row."""
    import transformers

    original, other = tiny("llama").write(tmp_path / "original"), noisy(tmp_path / "other", 0.8)
    tokenizer = load_tokenizer(Checkpoint.open(original), "")
    found = choices.choose(Checkpoint.open(original), Checkpoint.open(other), tokenizer)
    rows = choices.rows_of_questions(lambda text: tokenizer(text)["input_ids"])
    shares = []
    for folder in (original, other):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        likely: dict[int, list[float]] = {}
        for row in rows:
            with torch.no_grad():
                logs = torch.log_softmax(model(torch.tensor([row.ids])).logits[0, :-1], 1)
            taken = logs.gather(1, torch.tensor(row.ids[1:])[:, None])[row.begin - 1 :, 0]
            likely.setdefault(row.question, []).append(float(taken.sum()))
        shares.append(sum(max(q) == q[0] for q in likely.values()) / len(likely))
    assert [found.original, found.quantized] == pytest.approx(shares) and found.questions == len(QUESTIONS)
    assert 0 < found.same < 1 and found.span[0] <= found.quantized - found.original <= found.span[1]


def test_an_end_begins_where_its_tokens_part_from_the_beginning():
    rows = choices.rows_of_questions(lambda text: [ord(c) for c in text])
    begin, *ends = QUESTIONS[0]
    assert [(r.question, r.end) for r in rows[:4]] == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert rows[0].begin == len(begin) and len(rows[0].ids) == len(begin) + 1 + len(ends[0])


def test_nan_is_no_choice_and_a_perfect_copy_chooses_the_same():
    good, bad = [[0.0, -1.0, -2.0]] * 3 + [[-1.0, 0.0, -2.0]], [[0.0, math.nan, -2.0]] * 4
    same, broken = choices.score(good, good), choices.score(good, bad)
    assert (same.original, same.quantized, same.same, same.span) == (0.75, 0.75, 1.0, (0.0, 0.0))
    assert (broken.quantized, broken.same) == (0.0, 0.0)


def test_verify_reports_the_task(tmp_path):
    original, other = tiny("llama").write(tmp_path / "original"), noisy(tmp_path / "other", 0.3)
    flags = ["--tasks", "choices", "--rows", "1", "--context", "16", "--memory", "1MB"]
    file = tmp_path / "v.json"
    done = CliRunner().invoke(cli, ["verify", str(original), str(other), *flags, "-f", "full", "-f", f"json:{file}"])
    assert "choices acc" in done.output and f"{len(QUESTIONS)} questions, the same choice on" in " ".join(
        done.output.split()
    )
    (score,) = json.loads(file.read_text())["extra"]["tasks"]
    assert score["task"] == "choices" and 0 <= score["quantized"] <= 1


def test_without_the_harness_one_line_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr("doctor.evaluate.clients.harness.find_spec", lambda name: None)
    with pytest.raises(DoctorError, match=r"--tasks gsm8k: .* not installed") as caught:
        require_harness(["gsm8k"], None)
    assert "pip install lm_eval" in caught.value.hint
    one = tiny("llama").write(tmp_path / "m")
    with pytest.raises(DoctorError, match="--tasks gsm8k"):
        api.verify(one, one, tasks=["choices", "gsm8k"])


def harness(folder, body):
    """An interpreter whose lm_eval is this program: what lm-evaluation-harness 0.4 writes, and where."""
    folder.mkdir()
    (folder / "lm_eval.py").write_text(textwrap.dedent(body))
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH={folder} exec {sys.executable} "$@"\n')
    script.chmod(0o755)
    return str(script)


def test_scores_of_the_harness_are_read_from_what_it_writes(tmp_path):
    python = harness(
        tmp_path / "h",
        """
        import json, pathlib, sys
        given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
        assert given["--model"] == "hf" and given["--tasks"] == "arc_easy"
        name = pathlib.Path(given["--model_args"].removeprefix("pretrained=")).name
        value = {"model": 0.5, "q4": 0.45}[name]
        out = pathlib.Path(given["--output_path"], name)
        out.mkdir(parents=True)
        found = {"alias": "arc_easy", "acc,none": value, "acc_stderr,none": 0.01, "acc_norm,none": value + 0.1}
        (out / "results_2026.json").write_text(json.dumps({"results": {"arc_easy": found}}))
        """,
    )
    for name in ("model", "q4"):
        (tmp_path / name).mkdir()
    found = run_tasks(tmp_path / "model", tmp_path / "q4", ["arc_easy"], python)
    assert next((f.task, f.metric, f.original, f.quantized, f.original_error) for f in found) == (
        "arc_easy", "acc", 0.5, 0.45, 0.01,
    )  # fmt: skip
    assert [f.metric for f in found] == ["acc", "acc_norm"] and math.isnan(found[1].original_error)


def test_a_harness_that_fails_is_quoted(tmp_path):
    python = harness(tmp_path / "h", "raise SystemExit('no task arc_eazy')")
    with pytest.raises(MachineError, match="lm_eval on model: no task arc_eazy"):
        run_tasks(tmp_path / "model", tmp_path / "q4", ["arc_eazy"], python)
