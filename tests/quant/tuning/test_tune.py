"""Tuning of scales and norms: slopes are right, codes stay, the divergence falls on rows that were not trained on."""

import gc
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from fix_cases import quantized

from doctor import api
from doctor.checkpoint.directory import Checkpoint
from doctor.cli.main import cli
from doctor.cli.progress import counted_in
from doctor.core.errors import NotQuantizable, PlanRefused
from doctor.lint.testing import tiny
from doctor.model.spec import build_spec
from doctor.quant.forward.prefetch import load_tensor
from doctor.quant.forward.skeleton import Skeleton
from doctor.quant.tuning import layerwise, train
from doctor.quant.tuning.parameters import Gain, GroupScales, Scales
from doctor.quant.tuning.student import Student
from doctor.quant.tuning.train import Ends, last_states
from doctor.quant.tuning.tune import tuned_values

sys.path.insert(0, str(Path(__file__).parents[3] / "examples"))
from demo import train as teach

LENGTH = 32


def rows_of(count, seed=0, vocabulary=64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocabulary, (1, LENGTH), generator=generator) for _row in range(count)]


@pytest.fixture(scope="module")
def rounded(tmp_path_factory):
    """(original, its 3-bit copy): a model that learnt the letters of Python's documentation, plainly rounded."""
    folder = tmp_path_factory.mktemp("tune")
    original = teach(tiny("llama").write(folder / "original"), steps=60)
    recipe = tiny().recipe.with_field("method", "rtn").with_field("bits", 3)
    assert api.quantize(original, folder / "q3", recipe).output
    return original, folder / "q3"


@pytest.mark.parametrize(
    "form, bits, sym, act_order, stride",
    [("gptq", 4, False, True, 1), ("awq", 4, False, False, 3), ("compressed-tensors", 4, True, False, 1)],
)
def test_slopes_are_those_of_the_divergence(tmp_path, form, bits, sym, act_order, stride):
    _case, source = quantized(tmp_path / "q", form, bits, sym, act_order)
    original = Checkpoint.open(tiny("llama").write(tmp_path / "original"))
    rows = rows_of(2)
    student = Student(Checkpoint.open(source), rows)
    teacher = Skeleton(original, build_spec(original.value("config.json"), original.tensors))
    wanted = last_states(teacher, rows)
    ends = Ends(student, teacher, stride)

    def divergence(found=None):
        states = [student.first]
        for i in range(len(student)):
            states.append(student.run(i, states[-1], [0, 1]))
        told = [ends.divergence(*x, found) for x in zip(rows, wanted, states.pop(), strict=True)]
        if found is not None:
            slopes = [slope for _total, slope in told]
            for i in reversed(range(len(student))):
                slopes = student.pull_back(i, states.pop(), [0, 1], lambda n, _y, s=slopes: s[n], found)
        return sum(total for total, _slope in told)

    found = {}
    divergence(found)
    assert found.keys() == student.changes.keys()
    assert {type(x) for x in student.tunables.values()} == {GroupScales, Gain}
    generator = torch.Generator().manual_seed(1)
    for name, slope in found.items():
        way, step = torch.randn(slope.shape, generator=generator), 2e-3
        at = student.changes[name]
        student.changes[name] = at + step * way
        above = divergence()
        student.changes[name] = at - step * way
        measured = (above - divergence()) / (2 * step)
        student.changes[name] = at
        told = float((slope * way).sum())
        assert abs(told - measured) <= 0.05 * abs(measured) + 2e-3, name


def test_scales_and_norms_change_alone_and_the_divergence_falls(rounded, tmp_path):
    original, source = rounded
    done = api.tune(source, original, tmp_path / "t", rows=24, max_seq_length=64)
    assert done.outcome.end < 0.9 * done.outcome.start
    assert done.outcome.scales == 14 and done.outcome.gains == 5
    assert done.report is not None and not done.report.count("error")
    before, after = Checkpoint.open(source), Checkpoint.open(done.output)
    assert before.tensors.keys() == after.tensors.keys()
    changed = {n for n in before.tensors if bytes(before.load(n)) != bytes(after.load(n))}
    assert changed and all(n.endswith(".scales") or "norm" in n for n in changed)
    assert all(before.tensors[n].dtype == after.tensors[n].dtype for n in changed)
    again = api.tune(source, original, tmp_path / "u", rows=24, max_seq_length=64)
    assert all(bytes(after.load(n)) == bytes(Checkpoint.open(again.output).load(n)) for n in changed)


def test_codes_that_are_read_again_each_time_give_the_same(rounded):
    original, source = map(Checkpoint.open, rounded)
    rows = [row[0].tolist() for row in rows_of(9)]
    said: list[str] = []
    held = tuned_values(source, original, rows, passes=1, memory=1 << 30, say=said.append)
    read = tuned_values(source, original, rows, passes=1, memory=0)
    counted = [counted_in(line) for line in said]
    assert [step for step in counted if step and step[1]] == [
        *(("tune layers", done, 2, "layers") for done in (1, 2)),
        *(("tune", done, 4, "steps") for done in (1, 2, 2, 3, 4, 4)),  # after each step, and with each look
    ]
    assert held.values.keys() == read.values.keys()
    assert all(torch.equal(held.values[n], read.values[n]) for n in held.values)
    assert held.progress.watched == read.progress.watched


@pytest.mark.parametrize("rate", [layerwise.RATE, -layerwise.RATE])
def test_each_layer_comes_closer_to_the_original_or_stays(rounded, monkeypatch, rate):
    monkeypatch.setattr(layerwise, "RATE", rate)
    original, source = map(Checkpoint.open, rounded)
    rows = rows_of(9)
    student = Student(source, rows)
    spec = build_spec(original.value("config.json"), original.tensors)
    done = layerwise.settle(student, Skeleton(original, spec), rows, list(range(8)), [8])
    assert all(torch.equal(*x) for x in zip(done.wanted, last_states(Skeleton(original, spec), rows), strict=True))
    changed = {name for name, change in student.changes.items() if change.any()}
    if rate > 0:
        assert len(done.losses) == 2 and all(0 < after < 0.97 * before for before, after in done.losses)
        assert changed == {*student.names(0), *student.names(1)} and len(changed) == 18
    else:
        assert all(after == before for before, after in done.losses) and not changed


def test_scales_of_experts_that_few_tokens_reach_are_not_tuned(tmp_path):
    recipe = tiny().recipe.with_field("method", "rtn")
    assert api.quantize(tiny("mixtral").write(tmp_path / "m"), tmp_path / "q", recipe, client=None).output
    rows = rows_of(8, vocabulary=96)
    student = Student(Checkpoint.open(tmp_path / "q"), rows)

    def found(count):
        slopes, states = {}, student.first[:count]
        student.pull_back(0, states, list(range(count)), lambda _place, output: torch.ones_like(output), slopes)
        return {("experts" in name) for name in slopes}, sum("experts" in name for name in slopes)

    assert found(1) == ({False}, 0)  # 32 tokens, of which an expert gets some 16
    kinds, experts = found(8)
    assert kinds == {True, False} and experts == 12


def test_one_token_in_so_many_is_compared(rounded):
    original, source = map(Checkpoint.open, rounded)
    rows = rows_of(1)
    student = Student(source, rows)
    teacher = Skeleton(original, build_spec(original.value("config.json"), original.tensors))
    wanted, states = last_states(teacher, rows)[0], student.first[0]
    for i in range(len(student)):
        [states] = student.run(i, [states], [0])
    every = [Ends(student, teacher).divergence(rows[0][:, [t]], wanted[:, [t]], states[:, [t]])[0] for t in range(32)]
    ends = Ends(student, teacher, 5)
    total, slope = ends.divergence(rows[0], wanted, states, {})
    assert ends.compared(LENGTH) == 7 and total == pytest.approx(sum(every[::5]), rel=1e-4)
    assert slope[0, ::5].abs().amax(-1).min() > 0 and not slope[0, 1::5].any()


@pytest.mark.parametrize("rate, lower", [(0.1, True), (2e-3, False)])
def test_steps_that_were_too_large_are_taken_back_and_the_rest_are_smaller(rounded, rate, lower):
    original, source = map(Checkpoint.open, rounded)
    rows = rows_of(24)
    student = Student(source, rows)
    teacher = Skeleton(original, build_spec(original.value("config.json"), original.tensors))
    wanted = last_states(teacher, rows)
    trainer = train.Trainer(student, Ends(student, teacher), wanted, passes=1, rate=rate, watch=list(range(16, 24)))
    assert len(trainer.schedule) == 8 and trainer.looks == {4, 8}
    best = trainer.train()
    kl = dict(trainer.progress.watched)
    assert (kl[4] > kl[0]) == lower and kl[8] < kl[4]
    assert trainer.rate == (rate * train.LOWER if lower else rate)
    assert any(change.any() for change in best.values()) == (min(kl.values()) < kl[0])


def test_fewer_bits_take_larger_steps(rounded):
    _original, source = map(Checkpoint.open, rounded)
    student = Student(source, rows_of(1))
    first, *others = (n for n, x in student.tunables.items() if isinstance(x, Scales))
    assert set(student.shares().values()) == {2.0}  # 3 bits
    student.tunables[first] = replace(student.tunables[first], bits=5)
    gain = next(n for n, x in student.tunables.items() if isinstance(x, Gain))
    shares = student.shares()
    assert (shares[first], shares[others[0]]) == (1.0, 2.0) and 1.5 < shares[gain] < 2


def test_embeddings_that_are_equal_are_held_once(rounded):
    original, source = map(Checkpoint.open, rounded)
    student = Student(source, rows_of(1))
    teacher = Skeleton(original, build_spec(original.value("config.json"), original.tensors))
    Ends(student, teacher)
    ours, theirs = (x.base.get_input_embeddings().weight for x in (student.skeleton, teacher))
    assert ours.data_ptr() == theirs.data_ptr() and ours.dtype == torch.float32
    assert torch.equal(ours, load_tensor(original, "model.embed_tokens.weight", torch.float32))


def test_codes_beyond_the_memory_are_not_held(rounded):
    _original, source = map(Checkpoint.open, rounded)

    def held(memory):
        student = Student(source, rows_of(1), memory=memory)
        gc.collect()
        kept = sum(x.numel() for x in gc.get_objects() if type(x) is torch.Tensor and x.dtype == torch.int8)
        return kept, len(student)

    everything, layers = held(1 << 30)
    assert held(0) == (0, layers) and 0 < held(1 << 14)[0] < everything


def test_what_does_not_help_is_not_written(rounded, tmp_path, monkeypatch):
    monkeypatch.setattr(train.Trainer, "_share", lambda self, step: -1.0)  # up the slope
    monkeypatch.setattr(layerwise, "RATE", -layerwise.RATE)
    original, source = rounded
    out = tmp_path / "t"
    args = ["tune", str(source), "--to", str(original), "-o", str(out), "--rows", "16", "--max-seq-length", "64"]
    done = CliRunner().invoke(cli, args)
    assert done.exit_code == 1 and "not written: tuning did not lower the divergence" in done.output
    assert not out.exists()


def test_a_model_without_codes_is_refused_by_its_headers(rounded, tmp_path):
    original, source = rounded
    with pytest.raises(NotQuantizable, match="holds no packed linears"):
        api.tune(original, original, tmp_path / "t", rows=8, max_seq_length=64)
    with pytest.raises(PlanRefused, match="given as the quantized checkpoint and as its original"):
        api.tune(source, source, tmp_path / "t", rows=8, max_seq_length=64)
    assert not (tmp_path / "t").exists()
