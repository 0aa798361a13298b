"""The GGUF container: read as another writer made it, and hostile headers become defects, never another exception."""

import json
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from doctor.checkpoint import gguf_writer as w
from doctor.checkpoint.directory import Checkpoint
from doctor.checkpoint.gguf import group_files, read_gguf
from doctor.lint.tiny_gguf import file_bytes, metadata

VECTORS = Path(__file__).parents[2] / "fixtures" / "vectors"


@pytest.fixture
def read(tmp_path):
    def reading(raw):
        (tmp_path / "model.gguf").write_bytes(raw)
        return read_gguf(tmp_path / "model.gguf", "model.gguf")

    return reading


def kinds(found):
    return [defect.kind for defect in found.defects]


def test_a_file_of_the_library_is_read_byte_for_byte(read):
    vector = json.loads((VECTORS / "gguf_file_tiny.json").read_text())
    found = read(bytes.fromhex(vector["hex"]))
    assert not found.defects
    assert list(found.metadata) == vector["metadata_as_read"]
    for key, _kind, value in vector["metadata_in_order"]:
        assert found.metadata[key] == pytest.approx(value) if isinstance(value, float) else found.metadata[key] == value
    assert [(t.name, t.type.name, list(t.shape[::-1]), t.begin, t.nbytes) for t in found.tensors] == [
        (t["name"], t["type"], t["ne"], t["absolute_offset"], t["bytes"]) for t in vector["tensors"]
    ]


def test_a_written_file_is_read_back(read):
    found = read(file_bytes())
    assert not found.defects and len(found.tensors) == 11
    assert found.metadata["tokenizer.ggml.tokens"][5] == "t5"


@pytest.mark.parametrize(
    ("raw", "kind", "words"),
    [
        (b"", "header", "goes on for 4 bytes"),
        (b"PK\x03\x04" + bytes(40), "header", "begins with the bytes 50 4b 03 04; must be those of GGUF"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "header", "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "header", "GGUF version 1; must be 2 or 3"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 62, 0), "header", "states 4,611,686,018,427,387,904 tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "header", "metadata keys"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 63) + bytes(30), "header", "goes on for"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"kI" + bytes(20), "header", "type 73"),
        (
            b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 8, 1 << 40),
            "header",
            "states 1,099,511,627,776 elements",
        ),
        (
            b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 9, 1) + bytes(9),
            "header",
            "type 9",
        ),
    ],
)
def test_a_broken_header_is_a_defect_that_says_what_is_wrong(read, raw, kind, words):
    found = read(raw)
    assert kinds(found) == [kind]
    assert words in found.defects[0].detail


def test_two_tensors_or_keys_of_one_name_are_defects(read):
    raw = file_bytes()
    assert kinds(read(raw.replace(b"blk.0.attn_q.weight", b"blk.0.attn_k.weight"))) == ["duplicate-tensor"]
    assert kinds(read(raw.replace(b"general.name", b"tokenizer.name", 1))) != []
    twice = raw.replace(b"tokenizer.ggml.bos_token_id", b"tokenizer.ggml.eos_token_id")
    assert kinds(read(twice)) == ["duplicate-key"]


def test_data_past_the_end_is_a_defect_with_the_bytes_that_lack(read):
    raw = file_bytes()
    found = read(raw[:-100])
    assert kinds(found) == ["past-the-end"]
    assert found.missing_bytes == 100
    assert len(found.tensors) == 10


def test_a_hole_between_tensors_is_a_defect(read):
    raw = file_bytes()
    at = raw.index(b"blk.0.attn_norm.weight") + len(b"blk.0.attn_norm.weight") + 4 + 8 + 4
    (offset,) = struct.unpack_from("<Q", raw, at)
    found = read(raw[:at] + struct.pack("<Q", offset + 32) + raw[at + 8 :])
    assert kinds(found) == ["offset"]
    assert f"must be {offset:,}" in found.defects[0].detail


def test_an_alignment_that_is_no_power_of_two_is_a_defect(read):
    assert kinds(read(file_bytes(metadata(general__alignment=w.u32(24))))) == ["alignment"]


def test_a_width_that_is_no_multiple_of_the_block_is_a_defect(read):
    raw = file_bytes()
    at = raw.index(b"blk.0.ffn_up.weight") + len(b"blk.0.ffn_up.weight") + 4 + 16
    assert "indivisible" in kinds(read(raw[:at] + struct.pack("<I", 12) + raw[at + 4 :]))
    assert "unknown-type" in kinds(read(raw[:at] + struct.pack("<I", 99) + raw[at + 4 :]))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_damage_gives_defects_or_a_file_and_no_exception(tmp_path_factory, data):
    raw = bytearray(_RAW)
    for _i in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, min(len(raw), 3500) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("g") / "x.gguf"
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    found = read_gguf(path, "x.gguf")
    for tensor in found.tensors:
        assert 0 <= tensor.begin <= tensor.begin + tensor.nbytes <= found.size


_RAW = file_bytes()


def test_shards_of_one_model_are_put_together_and_missing_ones_are_named():
    names = ["a-00001-of-00003.gguf", "a-00003-of-00003.gguf", "b.gguf"]
    assert group_files(names) == [
        ("a-of-00003.gguf", names[:2], ["a-00002-of-00003.gguf"]),
        ("b.gguf", ["b.gguf"], []),
    ]


def test_a_checkpoint_lists_the_models_of_a_directory_and_of_one_file(tmp_path):
    (tmp_path / "b.gguf").write_bytes(file_bytes())
    (tmp_path / "c.gguf").write_bytes(file_bytes())
    assert [model.name for model in Checkpoint.open(tmp_path).gguf] == ["b.gguf", "c.gguf"]
    one = Checkpoint.open(tmp_path / "c.gguf")
    assert [model.name for model in one.gguf] == ["c.gguf"]
    assert one.total_bytes == sum(t.nbytes for t in one.gguf[0].tensors.values())
