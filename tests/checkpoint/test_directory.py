import json
import os

import numpy as np
import pytest

from doctor.checkpoint.directory import FORGOTTEN_BYTES, Checkpoint, JsonFile
from doctor.core.errors import BadCheckpoint
from doctor.lint.testing import tiny


def test_opens_a_directory_or_one_file(tmp_path):
    case = tiny()
    case.write(tmp_path)
    whole = Checkpoint.open(tmp_path)
    assert whole.tensors.keys() == case.tensors.keys() and whole.value("config.json") == case.config
    one = Checkpoint.open(tmp_path / "model.safetensors")
    assert one.tensors.keys() == case.tensors.keys() and one.value("config.json") is None


def test_load_gives_the_codes_that_were_written(tmp_path):
    case = tiny()
    case.shards = 3
    checkpoint = Checkpoint.open(case.write(tmp_path))
    for name, codes in case.tensors.items():
        assert np.array_equal(checkpoint.load(name), codes)
        assert np.array_equal(np.concatenate([s.copy() for s in checkpoint.rows(name, 300)]), codes)


@pytest.mark.parametrize("path", ["none", "model.bin"])
def test_nothing_to_look_at_is_an_error_that_says_what_to_give(tmp_path, path):
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(BadCheckpoint) as error:
        Checkpoint.open(tmp_path / path)
    assert path in error.value.message and "Give" in error.value.hint


def test_a_link_out_of_the_directory_is_not_followed(tmp_path):
    secret = tmp_path / "secret.json"
    secret.write_text('{"key": "hidden"}')
    folder = tiny().write(tmp_path / "model")
    (folder / "extra.json").symlink_to(secret)
    (folder / "loop.json").symlink_to(folder / "loop.json")
    (folder / "inside.json").symlink_to("config.json")
    checkpoint = Checkpoint.open(folder)
    assert {(p.kind, p.tensor) for p in checkpoint.problems} == {
        ("link-leads-out", "extra.json"),
        ("unreadable", "loop.json"),
    }
    assert "extra.json" not in checkpoint.json and checkpoint.value("inside.json") is not None


def test_a_hub_cache_snapshot_is_followed_into_its_blobs(tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "rev"
    tiny().write(blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(os.path.relpath(file, snapshot))
    checkpoint = Checkpoint.open(snapshot)
    assert not checkpoint.problems and len(checkpoint.tensors) == len(tiny().tensors)


def test_index_names_are_never_paths(tmp_path):
    folder = tiny().write(tmp_path / "model")
    (tmp_path / "x.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    names = ["../x.safetensors", str(tmp_path / "x.safetensors"), "a/b.safetensors", "", "."]
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {f"t{i}": n for i, n in enumerate(names)}})
    )
    checkpoint = Checkpoint.open(folder)
    assert sorted(checkpoint.missing_shards) == sorted(names) and not checkpoint.shards
    with pytest.raises(BadCheckpoint, match="not a file of"):
        checkpoint.path("../x.safetensors")


def test_special_files_are_named_and_not_opened(tmp_path):
    folder = tiny().write(tmp_path)
    os.mkfifo(folder / "pipe.safetensors")
    checkpoint = Checkpoint.open(folder)
    assert [(p.kind, p.tensor) for p in checkpoint.problems] == [("special-file", "pipe.safetensors")]


@pytest.mark.parametrize(
    "raw, words", [(b"{", "line 1"), (b"\xff", "not UTF-8"), (b"", "line 1"), (b"[" * 200_000, "not readable")]
)
def test_a_broken_document_keeps_its_reason(raw, words):
    file = JsonFile("config.json", raw)
    assert file.value is None and words in str(file.broken) and file.doc is None


def test_a_document_notes_what_the_standard_forbids():
    file = JsonFile("config.json", b'\xef\xbb\xbf{"a": NaN, "b": {"c": 1, "c": 2}}')
    assert file.value["b"] == {"c": 2} and file.bom and file.duplicates == ["c"] and file.non_standard == ["NaN"]
    assert file.place("/b/c") == (1, 32, 1)


def test_large_documents_that_were_forgotten_are_parsed_again(tmp_path):
    folder = tiny("llama").write(tmp_path / "m")
    text = (
        '{"version": "1.0", "version": "2.0", "model": {"vocab": {'
        + ", ".join(f'"token{i}": {i}' for i in range(60_000))
        + "}}}"
    )
    (folder / "tokenizer.json").write_text(text)
    checkpoint = Checkpoint.open(folder)
    file = checkpoint.json["tokenizer.json"]
    first, config = file.value, checkpoint.value("config.json")
    assert len(text) > FORGOTTEN_BYTES and file.value is first
    checkpoint.forget_parsed()
    assert "value" not in vars(file) and checkpoint.value("config.json") is config
    assert file.value == first and file.value is not first and file.duplicates == ["version"]


def test_json_nested_deeper_than_places_are_worked_out_is_read_all_the_same(tmp_path):
    """Python reads 300 levels, our reader of places 200: findings then carry no line."""
    deep = '{"a":' * 300 + "1" + "}" * 300
    (tmp_path / "config.json").write_text(f'{{"model_type": "llama", "x": {deep}}}')
    file = Checkpoint.open(tmp_path).json["config.json"]
    assert file.value["model_type"] == "llama" and file.doc is None
    assert file.place("/model_type") == (1, 16, 7)
