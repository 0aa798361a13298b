"""Tuning as the last step of a quantization: only scales and norms change, resumed runs write the same bytes."""

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from doctor import api
from doctor.checkpoint.directory import Checkpoint
from doctor.cli.main import cli
from doctor.core.errors import MachineError, NotQuantizable, PlanRefused
from doctor.core.recipe import Recipe
from doctor.formats.schemes import fields_of
from doctor.lint.testing import tiny
from doctor.model.spec import build_spec
from doctor.quant import budget
from doctor.quant.calibration.documents import builtin_paragraphs, read_documents
from doctor.quant.calibration.rows import calibration_rows, stream_of
from doctor.quant.calibration.tokenizer import load_tokenizer
from doctor.quant.calibration.unseen import unseen_rows
from doctor.quant.stage import stage_of
from doctor.quant.tuning import layerwise, train, wanted, within
from doctor.quant.tuning.adam import Adam
from doctor.report.results import results

sys.path.insert(0, str(Path(__file__).parents[3] / "examples"))
from demo import train as teach

ROWS = {"rows": 12, "max_seq_length": 64}


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A model that learnt the letters of Python's documentation."""
    return teach(tiny("llama").write(tmp_path_factory.mktemp("within") / "original"), steps=60)


@pytest.fixture(scope="module")
def recipe():
    return tiny().recipe.with_field("bits", 3)


@pytest.fixture(scope="module")
def plain(taught, recipe, tmp_path_factory):
    done = api.quantize(taught, tmp_path_factory.mktemp("within") / "plain", recipe, tune="off", **ROWS)
    assert done.output and "tuning" not in done.report.extra
    return Checkpoint.open(done.output)


@pytest.fixture(scope="module")
def tuned(taught, recipe, tmp_path_factory):
    return api.quantize(taught, tmp_path_factory.mktemp("within") / "tuned", recipe, tune=12, **ROWS)


def content(checkpoint):
    return {name: bytes(checkpoint.load(name)) for name in checkpoint.tensors}


def test_scales_and_norms_change_alone_and_the_divergence_falls(plain, tuned):
    facts = tuned.report.extra["tuning"]
    assert facts["written"] and facts["unseen"] and facts["rows"] == 12 and facts["watched"] == within.WATCHED
    assert 0 < facts["end"] < 0.95 * facts["start"]
    before, after = content(plain), content(Checkpoint.open(tuned.output))
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed and all(name.endswith(".scales") or "norm" in name for name in changed)
    assert {t.name for t in Checkpoint.open(tuned.output).entries.values()} == {t.name for t in plain.entries.values()}
    receipt = json.loads((tuned.output / "doctor.json").read_text())
    assert any("12" in str(note) and "KL" in str(note) for note in receipt["notes"])
    assert any(label == "tuning" and "12 rows" in text for label, text in results(tuned.report))


@pytest.mark.parametrize("spoiled", [False, True])
def test_a_run_killed_while_it_tunes_ends_in_the_same_bytes(taught, recipe, tuned, tmp_path, monkeypatch, spoiled):
    class Killed(BaseException):
        pass

    step = train.Trainer._step

    def dies(self, number, rows):
        if number == 5:
            raise Killed
        step(self, number, rows)

    monkeypatch.setattr(train.Trainer, "_step", dies)
    with pytest.raises(Killed):
        api.quantize(taught, tmp_path / "out", recipe, tune=12, **ROWS)
    monkeypatch.setattr(train.Trainer, "_step", step)
    state = stage_of(tmp_path / "out") / "tuning.safetensors"
    assert state.exists() and not (tmp_path / "out").exists()
    if spoiled:  # then the tuning starts anew
        state.write_bytes(state.read_bytes()[:-1] + b"?")
    steps = []

    def counts(self, number, rows):
        steps.append(number)
        step(self, number, rows)

    monkeypatch.setattr(train.Trainer, "_step", counts)
    done = api.quantize(taught, tmp_path / "out", recipe, tune=12, resume=True, **ROWS)
    assert steps[0] == (0 if spoiled else 4)
    assert content(Checkpoint.open(done.output)) == content(Checkpoint.open(tuned.output))
    assert done.report.extra["tuning"] == tuned.report.extra["tuning"]


@pytest.mark.parametrize("spoiled", [False, True])
def test_a_run_killed_between_layers_ends_in_the_same_bytes(taught, recipe, tuned, tmp_path, monkeypatch, spoiled):
    class Killed(BaseException):
        pass

    settle, tuned_layers = layerwise._tune, []

    def dies(student, i, *more):
        if i == 1:
            raise Killed
        settle(student, i, *more)

    def counts(student, i, *more):
        tuned_layers.append(i)
        settle(student, i, *more)

    monkeypatch.setattr(layerwise, "_tune", dies)
    with pytest.raises(Killed):
        api.quantize(taught, tmp_path / "out", recipe, tune=12, **ROWS)
    state = stage_of(tmp_path / "out") / "tuning.safetensors"
    assert state.exists() and not (tmp_path / "out").exists()
    if spoiled:  # then the layers are tuned anew
        state.write_bytes(state.read_bytes()[:-1] + b"?")
    monkeypatch.setattr(layerwise, "_tune", counts)
    done = api.quantize(taught, tmp_path / "out", recipe, tune=12, resume=True, **ROWS)
    assert tuned_layers == ([0, 1] if spoiled else [1])
    assert content(Checkpoint.open(done.output)) == content(Checkpoint.open(tuned.output))
    assert done.report.extra["tuning"] == tuned.report.extra["tuning"]


def test_what_does_not_help_is_not_written(taught, recipe, plain, tmp_path, monkeypatch):
    monkeypatch.setattr(Adam, "step", lambda *_anything: None)
    done = api.quantize(taught, tmp_path / "out", recipe, tune=12, **ROWS)
    assert not done.report.extra["tuning"]["written"]
    assert content(Checkpoint.open(done.output)) == content(plain)
    assert any(label == "tuning" and "stay as they are" in text for label, text in results(done.report))


def test_few_rows_are_not_trained_on_unasked(taught, recipe, plain, tmp_path):
    done = api.quantize(taught, tmp_path / "out", recipe, **ROWS)
    assert str(done.report.extra["tuning"]["reason"]).startswith("12 rows of 768 tokens are too few")
    assert content(Checkpoint.open(done.output)) == content(plain)


def test_rows_are_not_asked_for_where_there_is_nothing_to_tune(taught, recipe, tmp_path):
    for wrong in (recipe.with_field("method", "rtn"), Recipe(**fields_of("NVFP4A16", {}))):
        with pytest.raises(PlanRefused, match="--tune 12"):
            api.quantize(taught, tmp_path / "out", wrong, tune=12)
    with pytest.raises(PlanRefused, match=r"--tune 13: 12 rows calibrate; must be as many at most"):
        api.quantize(taught, tmp_path / "out", recipe, tune=13, **ROWS)
    for text in ("some", "1", "-3", "2.5"):
        done = CliRunner().invoke(cli, ["quantize", str(taught), "-o", str(tmp_path / "out"), "--tune", text])
        assert done.exit_code == 2 and "auto, off" in done.output


def test_memory_that_is_too_small_is_said(taught, recipe, plain, tmp_path, monkeypatch):
    monkeypatch.setattr(within, "need", lambda *x: 1 << 60)
    monkeypatch.setattr(wanted, "LEAST_ROWS", 4)
    monkeypatch.setattr(wanted, "LEAST_TOKENS", 100)
    done = api.quantize(taught, tmp_path / "out", recipe, **ROWS)
    assert "GiB" in str(done.report.extra["tuning"]["reason"])
    with pytest.raises(MachineError, match=r"--tune 12.*--resume"):
        api.quantize(taught, tmp_path / "asked", recipe, tune=12, **ROWS)
    again = api.quantize(taught, tmp_path / "asked", recipe, tune="off", resume=True, **ROWS)
    assert content(Checkpoint.open(again.output)) == content(Checkpoint.open(done.output)) == content(plain)


def test_rows_that_do_not_fit_in_memory_are_refused_before_the_first_layer(taught, recipe, tmp_path):
    with pytest.raises(MachineError, match=r"--tune 12: it takes .* GiB may be used\. Give --tune fewer rows"):
        api.quantize(taught, tmp_path / "out", recipe, tune=12, memory=budget.constant() + (1 << 21), **ROWS)
    assert not list(tmp_path.iterdir())


def test_auto_trains_on_more_rows_where_more_rows_calibrate(taught, recipe):
    checkpoint = Checkpoint.open(taught)
    spec = build_spec(checkpoint.value("config.json"), checkpoint.tensors)
    found = [wanted.wanted("auto", recipe, spec, rows, 512).rows for rows in (8, 16, 64, 256)]
    assert found[0] == 0 < found[1] <= found[2] < found[3] < 256, found


def test_layers_that_tuning_does_not_follow_are_kept(taught, recipe, tmp_path, monkeypatch):
    def refuse(*_args, **_options):
        raise NotQuantizable("its layers hand on more than hidden states")

    monkeypatch.setattr(within, "tuned_values", refuse)
    monkeypatch.setattr(wanted, "LEAST_ROWS", 4)
    monkeypatch.setattr(wanted, "LEAST_TOKENS", 100)
    done = api.quantize(taught, tmp_path / "out", recipe, **ROWS)
    assert done.output and "hand on more" in str(done.report.extra["tuning"]["reason"])
    with pytest.raises(NotQuantizable, match=r"hand on more.*--resume"):
        api.quantize(taught, tmp_path / "asked", recipe, tune=12, **ROWS)


@pytest.mark.parametrize("count", [1, 3, 8])
def test_watched_rows_hold_no_token_of_a_calibration_row(taught, tmp_path, count):
    checkpoint, text = Checkpoint.open(taught), tmp_path / "text.txt"
    text.write_text("\n\n".join(builtin_paragraphs()[:100]))
    rows, facts, _notes = calibration_rows(checkpoint, text, rows=12, length=64)
    watched = unseen_rows(checkpoint, text, facts.rows, count=count, length=64, known=rows)
    assert len(watched) == count
    documents = read_documents(text)
    first, stream = stream_of(documents, load_tokenizer(checkpoint, documents.name))
    step, body = len(stream) // 12, 64 - len(first)
    held = {row * step + place for row in range(12) for place in range(body)}
    starts = [12 * (2 * i + 1) // (2 * count) * step + body for i in range(count)]
    assert [first + stream[at : at + 64 - len(first)] for at in starts] == watched
    assert not held & {at + place for at in starts for place in range(body)}


def test_text_that_is_used_up_leaves_no_rows_to_watch(taught, tmp_path):
    checkpoint = Checkpoint.open(taught)
    (tmp_path / "text.txt").write_text("some words that are read twice. " * 60)
    rows, facts, _notes = calibration_rows(checkpoint, tmp_path / "text.txt", rows=500, length=64)
    assert len(rows) > 4
    assert unseen_rows(checkpoint, tmp_path / "text.txt", facts.rows, count=4, length=64) == []


def test_ready_rows_that_did_not_calibrate_are_watched(taught, tmp_path):
    rows = [[row, *range(row, row + 39)] for row in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"input_ids": row}) for row in rows))
    source = tmp_path / "rows.jsonl"
    checkpoint = Checkpoint.open(taught)
    known, facts, _notes = calibration_rows(checkpoint, source, rows=12, length=40)
    options = {"count": 4, "length": 40, "known": known}
    assert unseen_rows(checkpoint, source, facts.rows, **options) == [rows[row] for row in (13, 15, 17, 19)]
    assert unseen_rows(checkpoint, source, facts.rows, count=4, length=40, known=rows) == []


def test_text_that_repeats_what_calibrated_is_not_watched(taught, tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(builtin_paragraphs()[:40]))
    rows, facts, _notes = calibration_rows(Checkpoint.open(taught), tmp_path / "text.txt", rows=4, length=64)
    given = (Checkpoint.open(taught), tmp_path / "text.txt", facts.rows)
    before = unseen_rows(*given, count=4, length=64)
    assert len(before) == 4
    assert unseen_rows(*given, count=4, length=64, known=[*rows, [0, *before[1]]]) == [before[0], *before[2:]]


def test_the_plan_counts_the_tuning(taught, recipe):
    def planned(**options):
        return api.plan_quantize(taught, "out", recipe, **{"rows": 128, "max_seq_length": 128, **options})

    plain, auto = planned(tune="off"), planned()
    assert plain.tuning == 0 and plain.peak <= auto.peak and auto.tuning > 0
    assert any(f"on {auto.tuned_rows} rows (--tune)" in line for line in auto.lines())
    assert not any("--tune" in line for line in plain.lines())
    assert planned(rows=8).tuning == 0  # too few rows to be done unasked
    assert planned(rows=8, tune=8).tuning > 0
    assert planned(memory=auto.tuning // 2).tuning == 0 and planned(memory=auto.tuning // 2, tune=8).tuning > 0
    assert planned(tune=128).tuning > auto.tuning


def test_layers_alone_are_said_as_such_and_steps_only_where_there_are_some(taught, recipe, tmp_path, monkeypatch):
    """`auto` may find time for the layers alone: then no step from end to end follows."""
    monkeypatch.setattr(wanted, "LEAST_ROWS", 4)
    monkeypatch.setattr(wanted, "LEAST_TOKENS", 100)
    monkeypatch.setattr(wanted, "_affordable", lambda *_all: 0)
    told = []
    done = api.quantize(taught, tmp_path / "out", recipe, progress=lambda text: told.append(str(text)), **ROWS)
    assert done.report.extra["tuning"]["steps"] == 0
    looks = [x.split(", KL")[0] for x in told if "rows that are not trained on" in x]
    assert looks == ["tune: no change", "tune: layer by layer"]
