"""Text that the model writes to calibrate on: the same from the same seed, whole rows, and left out with a reason where
it is dear or broken.
"""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from doctor.checkpoint.directory import Checkpoint
from doctor.core.recipe import Recipe
from doctor.lint.testing import tiny
from doctor.model.spec import build_spec
from doctor.quant import job
from doctor.quant.calibration import documents, self_generated
from doctor.quant.calibration.documents import BUILTIN
from doctor.quant.calibration.rows import NotSampled, calibration_rows
from doctor.quant.calibration.self_generated import sampler
from doctor.quant.quantize import quantize

SOURCE = f"{BUILTIN} and text sampled from the model"


@pytest.fixture(autouse=True)
def short_text(monkeypatch):
    """Two pages instead of megabytes: the tiny model's tokenizer has a token a letter."""
    monkeypatch.setattr(documents, "builtin_paragraphs", lambda: ("".join(chr(33 + i * i % 89) for i in range(4000)),))


def model(folder, case=None):
    checkpoint = Checkpoint.open((case or tiny("llama")).write(folder))
    return checkpoint, build_spec(checkpoint.value("config.json"), checkpoint.tensors)


def rows_of(folder, rows=8, memory=None, seed=0, case=None):
    checkpoint, spec = model(folder, case)
    return calibration_rows(
        checkpoint,
        None,
        rows=rows,
        length=16,
        vocab=spec.vocab,
        sample=sampler(checkpoint, spec, seed=seed, memory=memory),
    )


def test_a_quarter_of_the_rows_is_written_by_the_model(tmp_path):
    rows, facts, notes = rows_of(tmp_path / "m")
    plain, _, _ = calibration_rows(model(tmp_path / "n")[0], None, rows=6, length=16)
    assert rows[:6] == plain and [len(r) for r in rows] == [16] * 8 and not notes
    assert (facts.sampled_rows, facts.source, facts.builtin, facts.not_sampled) == (2, SOURCE, True, "")
    assert not any(r in plain for r in rows[6:])


def test_the_seed_decides_the_text(tmp_path):
    first, again, other = (rows_of(tmp_path / str(i), seed=seed)[0][6:] for i, seed in enumerate((5, 5, 6)))
    assert first == again != other


def test_text_is_sampled_with_the_models_probabilities():
    """A model whose next token is 3 three times in four, whatever came before, and 5 else."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.anything = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, use_cache, logits_to_keep, cache):
            logits = torch.full((len(input_ids), 1, 8), -1e9)
            logits[..., 3], logits[..., 5] = torch.tensor(0.75).log(), torch.tensor(0.25).log()
            return SimpleNamespace(logits=logits, cache="kept")

    counts = Counter(t for piece in self_generated._pieces(Model(), [1] * 64, 128, None, 0) for t in piece)
    assert set(counts) == {3, 5} and abs(counts[3] / 8192 - 0.75) < 0.03


def test_a_piece_ends_where_the_model_ends_its_text():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.anything = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, use_cache, logits_to_keep, cache):
            logits = torch.full((len(input_ids), 1, 8), -1e9)
            logits[torch.arange(len(input_ids)), 0, (input_ids[:, 0] + 1) % 8] = 0
            return SimpleNamespace(logits=logits, cache="kept")

    assert self_generated._pieces(Model(), [1, 3, 5], 6, 6, 0) == [[2, 3, 4, 5], [4, 5]]


def test_pieces_start_with_bos_or_with_openings_where_there_is_none():
    class Tokenizer:
        bos_token_id = 7

        def __call__(self, text, **options):
            return {"input_ids": [ord(text[0])]}

    assert self_generated._starts(Tokenizer(), 2, 90) == [7, 7]
    Tokenizer.bos_token_id = None
    assert [chr(i) for i in self_generated._starts(Tokenizer(), 5, 90)] == [
        "T",
        "I",
        "A",
        "H",
        "W",
    ]  # the others are at 90 or above, or come again


@pytest.mark.parametrize(
    "memory, work, reason",
    [(10, None, "the whole model takes"), (None, 1e4, "parameters would take minutes on this device")],
)
def test_what_is_too_large_is_left_out_with_a_reason(tmp_path, monkeypatch, memory, work, reason):
    if work:
        monkeypatch.setitem(self_generated.MOST_PARAMETERS, "cpu", work)
    rows, facts, notes = rows_of(tmp_path / "m", memory=memory)
    assert len(rows) == 8 and facts.source == BUILTIN and facts.sampled_rows == 0
    assert reason in facts.not_sampled and notes == [f"no text is sampled from the model: {facts.not_sampled}"]


def test_a_dear_model_writes_fewer_rows(tmp_path, monkeypatch):
    monkeypatch.setitem(self_generated.WORK, "cpu", 1)
    rows, facts, _ = rows_of(tmp_path / "m", rows=16)
    assert len(rows) == 16 and facts.sampled_rows == 1


def test_logits_that_are_not_finite_leave_it_out(tmp_path):
    case = tiny("llama")
    case.tensors["model.norm.weight"][0] = 0x7FC0
    rows, facts, _ = rows_of(tmp_path / "m", case=case)
    assert len(rows) == 8 and facts.not_sampled == "its logits are not finite"


def test_only_the_default_samples(tmp_path):
    checkpoint, _spec = model(tmp_path / "m")
    (tmp_path / "t.txt").write_text('"#$%&' * 40)

    def sample(*args):
        raise AssertionError("text was given")

    _, facts, notes = calibration_rows(checkpoint, tmp_path / "t.txt", rows=8, length=16, sample=sample)
    assert facts.sampled_rows == 0 and facts.not_sampled == "" and not notes


def test_a_run_says_what_it_was_calibrated_on(tmp_path):
    checkpoint, _ = model(tmp_path / "m")
    result = quantize(checkpoint, tmp_path / "q", Recipe(group_size=32), rows=8, max_seq_length=16)
    said = next(f for f in result.report.findings if f.code == "Q414")
    assert said.message.startswith(f"calibrated on {SOURCE}") and said.evidence["sampled_rows"] == 2 and result.output
    few = quantize(checkpoint, tmp_path / "few", Recipe(group_size=32), rows=2, max_seq_length=16)
    said = next(f for f in few.report.findings if f.code == "Q414")
    assert said.evidence["not_sampled"] == "fewer than 4 rows"


def test_several_processes_leave_it_out():
    with pytest.raises(NotSampled, match="several processes"):
        self_generated.unable("several processes would each have to hold it", None, 1, 8)


@pytest.mark.parametrize("at_first", ["sampled", "not sampled"])
def test_a_resumed_run_takes_the_rows_of_the_first_whatever_memory_is_free_by_then(tmp_path, monkeypatch, at_first):
    checkpoint, _ = model(tmp_path / "m")
    options = dict(recipe=Recipe(group_size=32), rows=8, max_seq_length=16)
    monkeypatch.setitem(self_generated.MOST_PARAMETERS, "cpu", 1e9 if at_first == "sampled" else 1)
    quantize(checkpoint, tmp_path / "whole", **options)

    def dies(setup, activations, i, *args, real=job.quantize_layer, **more):
        if i == 1:
            raise KeyboardInterrupt
        return real(setup, activations, i, *args, **more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(job, "quantize_layer", dies)
        quantize(checkpoint, tmp_path / "out", **options)
    monkeypatch.setitem(self_generated.MOST_PARAMETERS, "cpu", 1 if at_first == "sampled" else 1e9)
    result = quantize(checkpoint, tmp_path / "out", **options, resume=True)
    assert result.calibration.sampled_rows == (2 if at_first == "sampled" else 0)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
