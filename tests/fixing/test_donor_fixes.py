"""Fixes that copy tensors from a donor, and padding by what the donor shows."""

import json

import numpy as np
import pytest
from fix_cases import codes, quantized

from doctor.api import check, fix
from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import BadCheckpoint, PlanRefused
from doctor.edits.kinds import TakeTensor
from doctor.edits.overlay import EditedCheckpoint
from doctor.lint.testing import tiny
from doctor.report.plan_text import render_plan


@pytest.fixture
def doctor(capsys):
    """Run `doctor ARGS`: (exit code, stdout, stderr)."""
    from doctor.cli import main as cli

    def call(*args):
        with pytest.raises(SystemExit) as end:
            cli.main([str(a) for a in args])
            raise SystemExit(0)
        return end.value.code, *capsys.readouterr()

    return call


def test_a_broken_tensor_is_taken_from_a_base_that_agrees_with_what_is_left(tmp_path):
    case = tiny()
    base = case.write(tmp_path / "base")
    want = case.down().copy()
    case.down()[3, 5] = 0x7FC0
    source = case.write(tmp_path / "source")
    result = fix(source, tmp_path / "out", case.recipe, donor=base)
    assert codes(result) == {"W201"} and result.report.ok and not result.report.findings
    assert (Checkpoint.open(tmp_path / "out").load(case.name("down")) == want).all()
    edit = json.loads(result.receipt_path.read_text())["steps"][0]["edits"][0]
    assert edit["kind"] == "TakeTensor" and edit["root"] == base.name and len(edit["digest"]) == 32
    assert "all 8,191 finite values that are left agree with it" in render_plan(result)


def test_a_base_that_differs_is_offered_as_unsafe_with_the_count(tmp_path):
    case = tiny()
    base = case.write(tmp_path / "base")
    case.down()[3, 5] = 0x7FC0
    case.down()[7, 7] ^= 1
    source = case.write(tmp_path / "source")
    result = fix(source, tmp_path / "out", case.recipe, donor=base)
    assert not result.plan.steps and "1 of its 8,191 finite values differ from this tensor's" in render_plan(result)
    assert codes(fix(source, tmp_path / "out", case.recipe, donor=base, unsafe_fixes=True)) == {"W201"}


def test_a_base_that_is_broken_too_or_of_another_shape_gives_nothing(tmp_path):
    case = tiny()
    case.down()[3, 5] = 0x7FC0
    source, base = case.write(tmp_path / "source"), case.write(tmp_path / "base")
    result = fix(source, tmp_path / "out", case.recipe, donor=base, dry_run=True)
    assert [s.title for s in result.plan.optional] == ["replace the non-finite values by 0"]


@pytest.mark.parametrize("shards", [1, 3])
def test_a_missing_tensor_is_added_beside_its_block_and_to_the_index(tmp_path, shards):
    case = tiny()
    case.shards = shards
    base = case.write(tmp_path / "base")
    name = case.name("down", 1)
    want = case.tensors.pop(name)
    source = case.write(tmp_path / "source")
    result = fix(source, tmp_path / "out", case.recipe, donor=base, unsafe_fixes=True)
    assert codes(result) == {"F050"} and not check(tmp_path / "out", case.recipe).findings
    out = Checkpoint.open(tmp_path / "out")
    assert (out.load(name) == want).all() and f"{name}  bf16 [64, 128] added" in render_plan(result)


def test_a_tensor_of_the_wrong_shape_is_taken_from_the_base(tmp_path):
    case = tiny()
    base = case.write(tmp_path / "base")
    name = case.name("down", 1)
    want, case.tensors[name] = case.tensors[name], np.ascontiguousarray(case.tensors[name][:, :96])
    source = case.write(tmp_path / "source")
    result = fix(source, tmp_path / "out", case.recipe, donor=base, unsafe_fixes=True)
    assert codes(result) == {"F051"} and (Checkpoint.open(tmp_path / "out").load(name) == want).all()


def test_an_all_zero_tensor_is_taken_only_as_an_unsafe_fix(tmp_path):
    case = tiny()
    base = case.write(tmp_path / "base")
    want = case.down().copy()
    case.down()[:] = 0
    source = case.write(tmp_path / "source")
    assert not fix(source, tmp_path / "out", case.recipe, donor=base, dry_run=True).plan.steps
    assert "W202" in codes(fix(source, tmp_path / "out", case.recipe, donor=base, unsafe_fixes=True))
    assert (Checkpoint.open(tmp_path / "out").load(case.name("down")) == want).all()


@pytest.mark.parametrize("code, where", [("W203", (slice(5, 6), slice(32, 64))), ("W204", (slice(3, 5), slice(None)))])
def test_zeros_that_only_this_copy_has_are_filled_from_a_base_that_agrees_elsewhere(tmp_path, code, where):
    case = tiny()
    base = case.write(tmp_path / "base")
    want = case.down().copy()
    case.down()[where] = 0
    count = want[where].size
    source = case.write(tmp_path / "source")
    assert not fix(source, tmp_path / "safe", case.recipe, donor=base).plan.steps
    result = fix(source, tmp_path / "out", case.recipe, donor=base, unsafe_fixes=True)
    assert [s.title for s in result.plan.steps] == [
        f"take the tensor from {base}: its other {want.size - count:,} values are equal, and {count} are 0 only here"
    ]
    assert (
        codes(result) == {code}
        and not result.report.findings
        and (Checkpoint.open(tmp_path / "out").load(case.name("down")) == want).all()
    )
    for spoil in ((0, 0), (where[0].start, 40)):  # a value that differs; and zeros that the base has too
        other = tiny()
        other.down()[spoil] = 0x3F80
        other.down()[where] = 0 if spoil != (0, 0) else other.down()[where]
        again = fix(
            source,
            tmp_path / f"no{spoil[0]}",
            case.recipe,
            donor=other.write(tmp_path / f"other{spoil[0]}"),
            unsafe_fixes=True,
        )
        assert not again.plan.steps


@pytest.mark.parametrize("family, number", [("llama", 0), ("phi3", 1)])
def test_a_cut_width_is_undone_with_a_base_that_it_is_the_first_part_of(tmp_path, family, number):
    from doctor.rules.f060_cut_width import more

    case = list(more())[number]
    facts = [(s, n, v) for (s, n), v in case.facts.items()]
    source, whole = case.write(tmp_path / "source"), tiny(family, mlp=352)
    base = whole.write(tmp_path / "base")
    assert "F060" not in codes(fix(source, tmp_path / "safe", case.recipe, donor=base, facts=facts, only=["F060"]))
    result = fix(source, tmp_path / "out", case.recipe, donor=base, facts=facts, only=["F060"], unsafe_fixes=["F060"])
    assert codes(result) == {"F060"} and not [f for f in result.report.findings if f.code in ("F051", "F060")]
    out = Checkpoint.open(tmp_path / "out")
    assert out.value("config.json")["intermediate_size"] == 352 and all(
        (out.load(n) == a).all() for n, a in whole.tensors.items()
    )
    whole.tensors[whole.name("down")][1, 1] ^= 1
    (item,) = [
        f
        for f in fix(
            source,
            tmp_path / "no",
            case.recipe,
            donor=whole.write(tmp_path / "other"),
            facts=facts,
            unsafe_fixes=["F060"],
            only=["F060"],
        ).plan.for_you
        if f.code == "F060"
    ]
    assert item.fix.safety == "manual"


def test_a_base_that_changed_after_the_plan_is_refused(tmp_path):
    case = tiny()
    base, source = case.write(tmp_path / "base"), Checkpoint.open(case.write(tmp_path / "source"))
    view = EditedCheckpoint(source, [TakeTensor(case.name("down"), str(base), "0" * 32)])
    with pytest.raises(
        PlanRefused, match=f"{case.name('down')} has blake2b [0-9a-f]{{32}}; the edit was made for 0000"
    ):
        view.load(case.name("down"))


def test_what_from_names_must_hold_weights_and_be_another_directory(tmp_path):
    case = tiny()
    source = case.write(tmp_path / "source")
    with pytest.raises(BadCheckpoint, match="is the checkpoint itself"):
        fix(source, tmp_path / "out", donor=source)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadCheckpoint, match="no safetensors tensor can be read; --from needs weights"):
        fix(source, tmp_path / "out", donor=tmp_path / "empty")


def test_the_base_says_whether_a_missing_head_is_tied(tmp_path):
    case = tiny("llama")
    untied = case.write(tmp_path / "untied")
    head = case.tensors.pop("lm_head.weight")
    source = case.write(tmp_path / "source")
    case.config["tie_word_embeddings"] = True
    tied = case.write(tmp_path / "tied")
    safe = fix(source, tmp_path / "one", case.recipe, donor=tied)
    assert (
        codes(safe) == {"F053"}
        and Checkpoint.open(tmp_path / "one").value("config.json")["tie_word_embeddings"] is True
    )
    assert not fix(source, tmp_path / "two", case.recipe, donor=untied).plan.steps
    assert codes(fix(source, tmp_path / "two", case.recipe, donor=untied, unsafe_fixes=True)) == {"F053"}
    assert (Checkpoint.open(tmp_path / "two").load("lm_head.weight") == head).all()


def test_a_base_that_does_not_tie_makes_keeping_the_stored_head_safe(tmp_path):
    case = tiny("llama")
    base = case.write(tmp_path / "base")
    case.config["tie_word_embeddings"] = True
    source = case.write(tmp_path / "source")
    assert not fix(source, tmp_path / "out", case.recipe, dry_run=True).plan.steps
    assert codes(fix(source, tmp_path / "out", case.recipe, donor=base)) == {"F054"}
    assert Checkpoint.open(tmp_path / "out").value("config.json")["tie_word_embeddings"] is False


def test_every_kind_of_edit_is_used_by_a_rule():
    from pathlib import Path
    from typing import get_args

    from doctor.edits.kinds import Edit

    text = "\n".join(p.read_text() for p in (Path(__file__).parents[2] / "rules").glob("[a-z]*.py"))
    made_by = {"TakeTensor": "base.offer(", "TakeFile": "from_base(", "Dequantize": "decoding("}
    made_by |= dict.fromkeys(("Repack", "DecodeGguf"), "")  # by `doctor convert`
    assert not [kind.__name__ for kind in get_args(Edit) if made_by.get(kind.__name__, f"{kind.__name__}(") not in text]


@pytest.mark.parametrize("family", ["opt", "gemma", "phi3", "qwen2"])
def test_a_narrow_mlp_of_every_form_is_padded_for_two_gpus(tmp_path, family):
    case = tiny(family, mlp=96)
    case.recipe = case.recipe.with_field("tp", 2)
    result = fix(case.write(tmp_path / "source"), tmp_path / "out", case.recipe, unsafe_fixes=("G302",))
    assert "G302" in codes(result) and [p.status for p in result.proofs] in (["equal"], ["agrees"])
    assert not [f for f in check(tmp_path / "out", case.recipe).findings if f.code == "G302"]


def test_a_packed_source_is_quantized_again_through_the_cure_without_a_copy(tmp_path):
    from doctor.api import quantize
    from doctor.core.recipe import Recipe

    _, source = quantized(tmp_path / "source", "gptq")
    result = quantize(source, tmp_path / "out", Recipe(method="rtn", group_size=32), fix=True, unsafe_fixes=("C147",))
    out = Checkpoint.open(tmp_path / "out")
    assert result.output and out.value("config.json")["quantization_config"]["group_size"] == 32
    assert any(n.endswith(".qweight") or n.endswith(".weight_packed") for n in out.tensors) and sorted(
        p.name for p in tmp_path.iterdir()
    ) == ["out", "source"]


def test_a_byte_order_mark_is_taken_away_and_nothing_else(tmp_path):
    source = tiny().write(tmp_path / "source")
    plain = (source / "config.json").read_bytes()
    (source / "config.json").write_bytes(b"\xef\xbb\xbf" + plain)
    result = fix(source, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == plain and not {
        f.code for f in result.report_after.findings
    } & {"C149", "C150"}


@pytest.mark.parametrize("first, safe", [('"llama"', True), ('"gpt2"', False)])
def test_a_key_that_stands_twice_keeps_the_value_that_readers_take(first, safe, tmp_path):
    source = tiny("llama").write(tmp_path / "source")
    text = (source / "config.json").read_text()
    (source / "config.json").write_text(text.replace("{", f'{{\n  "model_type": {first},', 1))
    result = fix(source, tmp_path / "out")
    assert bool(result.receipt_path) == safe
    if not safe:
        result = fix(source, tmp_path / "out", unsafe_fixes=["C149"])
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(text) and not {
        f.code for f in result.report_after.findings
    } & {"C149", "C150"}
    assert (tmp_path / "out" / "config.json").read_text().count("model_type") == 1


def test_the_commands_of_the_pipelines_page_do_what_it_says(tmp_path, monkeypatch, doctor):
    """Its pre-commit entry and its workflow's line, word for word, on a model that passes and on one that does not."""
    import re
    import shlex
    from pathlib import Path

    text = (Path(__file__).parents[2] / "docs" / "pipelines.md").read_text()
    hook = re.search(r"entry: doctor (.*)", text)[1]
    workflow = (
        re.search(r"run: doctor (check .*)", text)[1]
        .replace("$GITHUB_STEP_SUMMARY", "summary.md")
        .replace("--group-size 128", "")
    )
    cure = re.search(r"`doctor (check model/ --fix -o fixed/)`", text)[1]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DOCTOR_GROUP_SIZE", "32")
    case = tiny()
    case.write(tmp_path / "model")
    assert doctor(*shlex.split(hook))[0] == 0 and doctor(*shlex.split(workflow))[0] == 0
    assert (
        "ready" in (tmp_path / "summary.md").read_text()
        and json.loads((tmp_path / "doctor.sarif").read_text())["version"] == "2.1.0"
    )
    case.config["bos_token_id"] = "1"
    case.write(tmp_path / "model")
    code, out, _ = doctor(*shlex.split(hook))
    assert code == 1 and "C106" in out and doctor(*shlex.split(workflow))[0] == 1
    assert doctor(*shlex.split(cure))[0] == 0 and Checkpoint.open("fixed").value("config.json")["bos_token_id"] == 1
