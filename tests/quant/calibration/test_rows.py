"""Calibration rows: packed without padding, the same every time, and never from the text that perplexity is measured
on.
"""

import json
import sys

import pytest

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import BadCheckpoint, DoctorError
from doctor.lint.testing import tiny
from doctor.quant.calibration import documents
from doctor.quant.calibration import rows as rows_module
from doctor.quant.calibration.rows import calibration_rows, pack


class Ids:
    """A tokenizer of numbers: `3 4 5` is the ids 3, 4, 5; BOS 1 in front where asked for, EOS 2."""

    pad_token_id, unk_token_id, eos_token_id, chat_template = 0, 0, 2, "there is one"

    def __init__(self, bos=None, adds=False):
        self.bos_token_id, self.adds = bos, adds

    def __call__(self, text, add_special_tokens=True, verbose=True):
        ids = [] if text == "a" else [int(t) for t in text.split()]
        return {"input_ids": ([self.bos_token_id] if self.adds and add_special_tokens else []) + (ids or [9])}

    def __len__(self):
        return 10

    def batch_decode(self, rows, skip_special_tokens):
        return [" ".join(map(str, row)) for row in rows]

    def apply_chat_template(self, messages, tokenize):
        return " ".join(["1", *(m["content"] for m in messages)])


@pytest.fixture
def checkpoint(tmp_path):
    return Checkpoint.open(tiny("llama").write(tmp_path / "m"))


def lines(path, *objects):
    path.write_text("\n".join(json.dumps(o) for o in objects), encoding="utf-8")
    return path


def test_rows_are_cut_at_equal_distances_without_padding():
    assert pack([list(range(10, 30))], 3, 4, Ids()) == [[10, 11, 12, 13], [16, 17, 18, 19], [22, 23, 24, 25]]


def test_a_row_starts_with_bos_once_where_the_tokenizer_starts_with_it():
    assert pack([list(range(10, 16))], 2, 4, Ids(bos=1, adds=True)) == [[1, 10, 11, 12], [1, 13, 14, 15]]
    assert pack([list(range(10, 18))], 2, 4, Ids(bos=1, adds=False))[0] == [10, 11, 12, 13]


def test_documents_are_joined_by_the_end_token():
    assert pack([[5, 6], [7], [8, 9]], 1, 7, Ids()) == [[5, 6, 2, 7, 2, 8, 9]]


def test_less_text_than_a_row_gives_one_short_row_and_says_so(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(rows_module, "load_tokenizer", lambda c, name: Ids())
    (tmp_path / "t.txt").write_text("5 6 7 8")
    rows, facts, notes = calibration_rows(checkpoint, tmp_path / "t.txt", rows=8, length=16)
    assert rows == [[5, 6, 7, 8]] and facts.tokens == 4
    assert notes == ["1 rows instead of 8: t.txt has no more text"]


def test_rows_never_pass_the_models_positions(checkpoint, tmp_path):
    file = lines(tmp_path / "c.jsonl", {"input_ids": list(range(3, 90))})
    rows, _, notes = calibration_rows(checkpoint, file, rows=1, length=64, max_positions=16)
    assert [len(r) for r in rows] == [16]
    assert notes == ["rows have 16 tokens instead of 64: the model has no more positions"]


def test_conversations_go_through_the_chat_template_and_keep_one_bos(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(rows_module, "load_tokenizer", lambda c, name: Ids(bos=1, adds=True))
    file = lines(tmp_path / "c.jsonl", {"messages": [{"role": "user", "content": "5 6 7"}]})
    rows, facts, _ = calibration_rows(checkpoint, file, rows=1, length=4)
    assert rows == [[1, 5, 6, 7]] and facts.bos_doubled == 0


def test_messages_without_a_chat_template_are_refused(checkpoint, tmp_path, monkeypatch):
    tokenizer = Ids()
    tokenizer.chat_template = None
    monkeypatch.setattr(rows_module, "load_tokenizer", lambda c, name: tokenizer)
    with pytest.raises(DoctorError, match='has "messages", and the tokenizer has no chat template'):
        calibration_rows(checkpoint, lines(tmp_path / "c.jsonl", {"messages": []}), rows=1, length=4)


def test_the_checkpoints_own_tokenizer_is_used(checkpoint, tmp_path):
    (tmp_path / "t.txt").write_text('"#$%&')
    rows, facts, _ = calibration_rows(checkpoint, tmp_path / "t.txt", rows=1, length=5)
    ids = checkpoint.value("tokenizer.json")["model"]["vocab"]
    assert rows == [[ids[c] for c in '"#$%&']]
    assert facts.distinct_tokens == 5 and not facts.builtin


def test_without_a_tokenizer_ids_are_enough_and_text_is_refused(tmp_path):
    case = tiny("llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        del case.json[name]
    checkpoint = Checkpoint.open(case.write(tmp_path / "m"))
    rows, _, _ = calibration_rows(checkpoint, lines(tmp_path / "c.jsonl", {"input_ids": [3, 4, 5]}), rows=1, length=8)
    assert rows == [[3, 4, 5]]
    (tmp_path / "t.txt").write_text("text")
    with pytest.raises(BadCheckpoint, match=r"the tokenizer cannot be loaded for t\.txt"):
        calibration_rows(checkpoint, tmp_path / "t.txt", rows=1, length=8)


def test_ids_outside_the_vocabulary_are_refused(checkpoint, tmp_path):
    file = lines(tmp_path / "c.jsonl", {"input_ids": [3, 4]}, {"input_ids": [5, 96]})
    with pytest.raises(DoctorError, match="row 1 has token id 96; ids must be below vocab_size 96"):
        calibration_rows(checkpoint, file, rows=2, length=8, vocab=96)


@pytest.mark.parametrize(
    "line, message",
    [
        ("{broken", r"c.jsonl:1: not JSON"),
        ('{"prompt": "x"}', r"c.jsonl:1: has prompt; must have"),
        ("[1, 2]", r"c.jsonl:1: has list; must have"),
        ('{"input_ids": [1, "2"]}', "c.jsonl:1: input_ids must be a list of whole numbers"),
        ('{"input_ids": [-1, 2]}', "whole numbers, 0 or more"),
    ],
)
def test_a_line_of_another_form_is_named(checkpoint, tmp_path, line, message):
    (tmp_path / "c.jsonl").write_text(line)
    with pytest.raises(DoctorError, match=message):
        calibration_rows(checkpoint, tmp_path / "c.jsonl", rows=1, length=8)


def test_other_kinds_of_files_are_refused(checkpoint, tmp_path):
    with pytest.raises(DoctorError, match=r"with the suffix '\.csv'; must be \.txt, \.jsonl or \.parquet"):
        calibration_rows(checkpoint, tmp_path / "c.csv", rows=1, length=8)


def test_parquet_without_pyarrow_says_what_to_install(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "c.parquet").touch()
    with pytest.raises(DoctorError, match="needs pyarrow, which is not installed"):
        calibration_rows(checkpoint, tmp_path / "c.parquet", rows=1, length=8)


def test_duplicates_and_padding_are_counted(checkpoint, tmp_path):
    file = lines(tmp_path / "c.jsonl", {"input_ids": [3, 4]}, {"input_ids": [3, 4]}, {"input_ids": [5, 6, 7]})
    _, facts, _ = calibration_rows(checkpoint, file, rows=3, length=8)
    assert (facts.rows, facts.tokens, facts.duplicate_rows, facts.shortest, facts.median, facts.longest) == (
        3,
        7,
        1,
        2,
        2,
        3,
    )


def test_another_seed_takes_documents_in_another_order(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(rows_module, "load_tokenizer", lambda c, name: Ids())
    file = lines(tmp_path / "c.jsonl", *({"text": f"{i} {i}"} for i in range(10, 30)))
    first, again, other = (calibration_rows(checkpoint, file, rows=4, length=6, seed=s)[0] for s in (0, 0, 1))
    assert first == again != other


def test_the_built_in_text_leaves_out_what_perplexity_is_measured_on():
    from pydoc_data.topics import topics

    seen, reference = set(), []
    for paragraph in (p for name in sorted(topics) for p in topics[name].split("\n\n")):
        key = " ".join(paragraph.split())
        if key and key not in seen:
            seen.add(key)
            reference.append(key)
    held_out = set(reference[len(reference) // 2 :])
    ours = {" ".join(p.split()) for p in documents.builtin_paragraphs()}
    assert len(held_out) > 1000 and not held_out & ours


def test_a_dataset_on_the_hub_gives_its_training_file(checkpoint, tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def download(repo, name, repo_type):
        asked.append((repo, name, repo_type))
        return str(lines(tmp_path / "got.jsonl", {"input_ids": [3, 4, 5]}))

    monkeypatch.setattr(
        huggingface_hub,
        "list_repo_files",
        lambda repo, repo_type: ["README.md", "a/test.jsonl", "a/train.parquet", "b/train.jsonl"],
    )
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    rows, _facts, _ = calibration_rows(checkpoint, "org/texts", rows=1, length=8)
    assert rows == [[3, 4, 5]] and asked == [("org/texts", "b/train.jsonl", "dataset")]
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repo, repo_type: ["README.md", "data.csv"])
    with pytest.raises(DoctorError, match=r"org/texts: none of its 2 files ends with \.jsonl, \.parquet, \.txt"):
        calibration_rows(checkpoint, "hf://datasets/org/texts", rows=1, length=8)


def test_a_name_that_is_neither_file_nor_dataset_is_said_so(checkpoint, monkeypatch):
    import huggingface_hub

    def absent(repo, repo_type):
        raise OSError("404 Client Error: not found")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", absent)
    with pytest.raises(DoctorError, match="org/nothing: neither a file nor a dataset on the Hub: 404"):
        calibration_rows(checkpoint, "org/nothing", rows=1, length=8)


def test_parquet_rows_are_read_like_lines(checkpoint, tmp_path, monkeypatch):
    import types

    table = types.SimpleNamespace(to_pylist=lambda: [{"input_ids": [3, 4, 5], "text": None}])
    reader = types.ModuleType("pyarrow.parquet")
    reader.read_table = lambda path: table
    package = types.ModuleType("pyarrow")
    package.parquet = reader
    monkeypatch.setitem(sys.modules, "pyarrow", package)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", reader)
    (tmp_path / "c.parquet").touch()
    assert calibration_rows(checkpoint, tmp_path / "c.parquet", rows=1, length=8)[0] == [[3, 4, 5]]


def test_rows_without_a_token_of_context_are_left_out_and_counted(checkpoint, tmp_path):
    path = lines(tmp_path / "c.jsonl", {"input_ids": []}, {"input_ids": [5]}, {"input_ids": [5, 6, 7]})
    rows, _, notes = calibration_rows(checkpoint, path, rows=4, length=8)
    assert rows == [[5, 6, 7]] and notes[0] == "2 rows of fewer than 2 tokens are left out"


def byte_level():
    """A byte-level tokenizer whose vocabulary was made for English and Chinese."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.train_from_iterator(
        ["the quick brown fox jumps over the lazy dog " * 4, "模型量化之前先看一看文件里有没有坏的数字 " * 4] * 3,
        trainers.BpeTrainer(vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.mark.parametrize(
    ("text", "scripts", "unused"),
    [
        ("The quick brown fox, and 3 dogs.", ("Latin",), ("CJK",)),
        ("模型 is a model", ("Latin", "CJK"), ()),
        ("Ещё слово " + "the fox " * 2, ("Latin", "Cyrillic"), ("CJK",)),
        ("12 34 + 56", (), ("CJK", "Latin")),
    ],
)
def test_scripts_of_a_text_and_those_that_it_leaves_out(text, scripts, unused):
    from doctor.quant.calibration.text_scripts import of_rows

    tokenizer = byte_level()
    found, lacking = of_rows([tokenizer(text)["input_ids"]], tokenizer)
    assert sorted(found) == sorted(scripts) and sorted(lacking) == sorted(unused)
