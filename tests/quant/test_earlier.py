"""`--resume --retry-failed`: what fell back is solved again, everything else is what it was, to the byte."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file

from doctor import api
from doctor.core.errors import PlanRefused
from doctor.core.recipe import Recipe
from doctor.lint.testing import tiny
from doctor.quant.solve import gptq

FEW = Recipe(group_size=32, damp=0.0)  # nothing added: fewer tokens than columns have no factor
MORE = Recipe(group_size=32, damp=0.01)


def rows_of(path, count):
    draw = random.Random(count)
    rows = [[1] + [draw.randrange(3, 96) for _ in range(63)] for _ in range(count)]
    path.write_text("\n".join(json.dumps({"input_ids": r}) for r in rows))
    return path


def tensors(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= {name: t.reshape(-1).view(torch.uint8).numpy().tobytes() for name, t in load_file(path).items()}
    return found


def failed(result):
    return {
        r["name"]
        for r in result.linears
        if r["outcome"] == "rtn" or (r["solve"]["attempts"] and r["solve"]["damp_used"] > r["solve"]["attempts"][0][0])
    }


@pytest.fixture
def first(tmp_path):
    """A run in which the linears of 128 columns fell back, for want of tokens."""
    tiny("llama").write(tmp_path / "m")
    rows = rows_of(tmp_path / "few.jsonl", 2)
    return api.quantize(tmp_path / "m", tmp_path / "o", FEW, calibration=rows, max_seq_length=50, client=None)


def retry(tmp_path, recipe=MORE, **options):
    rows = rows_of(tmp_path / "more.jsonl", 32)
    given = {"calibration": rows, "max_seq_length": 64, "client": None, "resume": True, "retry_failed": True, **options}
    return api.quantize(tmp_path / "m", tmp_path / "o", recipe, **given)


def test_only_what_fell_back_is_solved_again(first, tmp_path, monkeypatch):
    lost, before = failed(first), tensors(tmp_path / "o")
    assert 0 < len(lost) < len(first.linears)
    solved, real = [], gptq.solve
    monkeypatch.setattr(gptq, "solve", lambda *a, **k: solved.append(1) or real(*a, **k))
    result = retry(tmp_path)
    after = tensors(tmp_path / "o")
    assert result.output and len(solved) == len(lost)
    assert not failed(result) and len(result.linears) == len(first.linears)
    changed = {name.rpartition(".")[0] for name in before if before[name] != after[name]}
    assert before.keys() == after.keys() and changed == lost
    assert any("that fell back" in note for note in json.loads((tmp_path / "o" / "doctor.json").read_text())["notes"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["few.jsonl", "m", "more.jsonl", "o"]


def test_a_killed_retry_is_resumed_and_the_first_output_stays_until_it_is_done(first, tmp_path, monkeypatch):
    before, real = tensors(tmp_path / "o"), gptq.solve
    solved = []

    def killed(*args, **options):
        solved.append(1)
        if len(solved) == len(failed(first)):
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(gptq, "solve", killed)
    with pytest.raises(KeyboardInterrupt):
        retry(tmp_path)
    assert tensors(tmp_path / "o") == before
    monkeypatch.setattr(gptq, "solve", real)
    assert not failed(retry(tmp_path))


def test_nothing_but_rows_and_damping_may_differ(first, tmp_path):
    before = tensors(tmp_path / "o")
    with pytest.raises(PlanRefused, match=r"differs in recipe \(group_size was 32, is 64\)"):
        retry(tmp_path, Recipe(group_size=64, damp=0.01))
    case = tiny("llama")
    case.config["rope_theta"] = 5000.0
    case.write(tmp_path / "other")
    with pytest.raises(PlanRefused, match="differs in source"):
        api.quantize(tmp_path / "other", tmp_path / "o", MORE, resume=True, retry_failed=True, client=None)
    case = tiny("llama")  # the same class, trained further: one matrix
    case.tensors[case.name("down")] ^= 1
    case.write(tmp_path / "trained")
    with pytest.raises(PlanRefused, match="differs in source"):
        api.quantize(tmp_path / "trained", tmp_path / "o", MORE, resume=True, retry_failed=True, client=None)
    assert tensors(tmp_path / "o") == before


def test_a_receipt_that_says_what_is_not_there_is_refused(first, tmp_path):
    path = tmp_path / "o" / "doctor.json"
    receipt = json.loads(path.read_text())
    receipt["linears"] = [entry for entry in receipt["linears"] if "q_proj" not in entry["name"]]
    path.write_text(json.dumps(receipt))
    with pytest.raises(PlanRefused, match="q_proj as its receipt says"):
        retry(tmp_path)


def test_an_output_without_a_fallback_is_left_alone(tmp_path):
    tiny("llama").write(tmp_path / "m")
    rows = rows_of(tmp_path / "rows.jsonl", 32)
    api.quantize(tmp_path / "m", tmp_path / "o", MORE, calibration=rows, max_seq_length=64, client=None)
    with pytest.raises(PlanRefused, match="no linear fell back"):
        retry(tmp_path)


def test_there_must_be_a_finished_output(tmp_path):
    tiny("llama").write(tmp_path / "m")
    with pytest.raises(PlanRefused, match=r"holds no doctor\.json"):
        retry(tmp_path)
