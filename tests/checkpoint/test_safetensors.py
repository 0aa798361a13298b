"""Headers of every broken kind: a fault is a Defect with its numbers, never another exception, and never hides its
neighbours.
"""

import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from doctor.checkpoint import crowd as crowds
from doctor.checkpoint.header_text import header_bytes
from doctor.checkpoint.safetensors import MAX_HEADER_BYTES, MAX_LISTED, ShardFile, open_shard, parse_header
from doctor.core.errors import BadCheckpoint


def parsed(data: bytes):
    return parse_header("x.safetensors", len(data), lambda offset, n: data[offset : offset + n])


def file_of(header, data=b"", pad=True):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8 if pad else 0)
    return struct.pack("<Q", len(raw)) + raw + data


def entry(begin, end, shape=None, dtype="U8"):
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def kinds(data):
    return [d.kind for d in parsed(data).defects]


def test_a_good_file_has_every_tensor_and_no_defect():
    data = save(
        {"b": np.ones((2, 3), np.float32), "a": np.zeros((), np.int64), "empty": np.zeros((0, 4), np.float16)},
        {"format": "pt"},
    )
    shard = parsed(data)
    assert not shard.defects and shard.metadata == {"format": "pt"}
    assert {t.name: (t.dtype.name, t.shape) for t in shard.tensors} == {
        "b": ("F32", (2, 3)),
        "a": ("I64", ()),
        "empty": ("F16", (0, 4)),
    }
    assert max(t.end for t in shard.tensors) == len(data)


@pytest.mark.parametrize(
    "data, kind, words",
    [
        (b"", "too-small", "0 bytes"),
        (b"abc", "too-small", "3 bytes"),
        (struct.pack("<Q", 0) + b"{}", "header-json", "not JSON"),
        (bytes(8), "zero-filled", "8 bytes are zero"),
        (struct.pack("<Q", 1000) + b"{}", "truncated", "1,008 bytes, the file has 10"),
        (struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}", "header-length", "100,000,000"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "lfs-pointer", "Git LFS"),
        (b"<!DOCTYPE html><html></html>", "web-page", "HTML"),
        (b"PK\x03\x04" + bytes(40), "pickle", "zip"),
        (bytes(4096), "zero-filled", "512 bytes are zero"),
        (file_of(b"[1]"), "header-json", "list"),
        (file_of(b"\xff\xfe{}"), "header-json", "UTF-8"),
        (file_of(b"[" * 5000), "header-json", "not"),
        (file_of({"a": 3}), "entry", "lacks"),
        (file_of({"a": entry(0, 4, dtype="f32")}, bytes(4)), "dtype", "'f32'"),
        (file_of({"a": entry(0, 4, [-4])}, bytes(4)), "shape", "-4"),
        (file_of({"a": entry(0, 4, [4.0])}, bytes(4)), "shape", "4.0"),
        (file_of({"a": entry(0, 4, [True])}, bytes(4)), "shape", "True"),
        (file_of({"a": entry(0, 4, [1 << 61, 1 << 61])}, bytes(4)), "size", "addressed"),
        (file_of({"a": entry(0, 4, [3])}, bytes(4)), "size", "takes 3 bytes, data_offsets span 4"),
        (file_of({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 2]}}, bytes(2)), "size", "addressed"),
        (file_of({"a": {"dtype": "U8", "shape": [4], "data_offsets": [4, 0]}}, bytes(4)), "offsets", "end before"),
        (file_of({"a": entry(0, 8)}, bytes(4)), "truncated", "the file has"),
        (file_of({"a": entry(0, 4), "b": entry(2, 6)}, bytes(6)), "overlap", "inside a"),
        (file_of({"a": entry(0, 4), "b": entry(6, 8)}, bytes(8)), "hole", "2 bytes"),
        (file_of({"a": entry(2, 4)}, bytes(4)), "hole", "2 bytes"),
        (file_of({"a": entry(0, 4)}, bytes(7)), "trailing", "3 bytes"),
        (
            file_of(
                b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
                b"x",
            ),
            "duplicate-name",
            "twice",
        ),
        (file_of({"__metadata__": {"k": 1}}), "metadata", "strings"),
    ],
)
def test_each_fault_has_its_kind_and_its_numbers(data, kind, words):
    shard = parsed(data)
    assert kind in [d.kind for d in shard.defects], shard.defects
    assert any(words in d.detail for d in shard.defects if d.kind == kind), shard.defects


def test_one_bad_entry_does_not_hide_the_others():
    shard = parsed(file_of({"a": entry(0, 4), "bad": entry(4, 8, [3]), "c": entry(8, 12)}, bytes(12)))
    assert [t.name for t in shard.tensors] == ["a", "c"]
    assert [(d.kind, d.tensor) for d in shard.defects] == [("size", "bad")]


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_judged_without_an_exception(data, framed):
    parsed(file_of(data) if framed else data)


OFFSETS = st.integers(-2, 12)
ENTRIES = st.dictionaries(
    st.sampled_from("abcd"),
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["U8", "F16", "F32", "x"]),
            "shape": st.lists(st.integers(-1, 4), max_size=3),
            "data_offsets": st.tuples(OFFSETS, OFFSETS),
        }
    ),
    max_size=4,
)


@settings(max_examples=400, deadline=None)
@given(ENTRIES, st.integers(0, 12))
def test_judges_as_the_formats_own_reader_does(tmp_path_factory, entries, size):
    """Whatever the reference reader opens has no defect, and whatever it refuses has one."""
    path = tmp_path_factory.mktemp("s") / "x.safetensors"
    path.write_bytes(
        file_of({k: {**v, "data_offsets": list(v["data_offsets"])} for k, v in entries.items()}, bytes(size))
    )
    try:
        with safe_open(path, "np"):
            accepted = True
    except SafetensorError:
        accepted = False
    assert (not open_shard(path, path.name).defects) == accepted


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(bytes(1000))
    with ShardFile(path, path.name) as file:
        path.write_bytes(bytes(500))
        with pytest.raises(BadCheckpoint, match=r"x.safetensors: ends at byte 500"):
            list(file.blocks(0, 1000, 300))


def test_an_unreadable_file_is_a_defect(tmp_path):
    assert [d.kind for d in open_shard(tmp_path, "folder").defects] == ["unreadable"]
    assert [d.kind for d in open_shard(tmp_path / "none", "none").defects] == ["unreadable"]


def test_a_header_whose_length_reads_like_a_pickle_is_still_a_header():
    """640 as eight bytes begins with 80 02, which is how a pickle begins."""
    text = json.dumps({"w": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}).encode().ljust(640)
    raw = struct.pack("<Q", 640) + text + b"\1\2"
    shard = parse_header("s", len(raw), lambda at, n: raw[at : at + n])
    assert raw[:2] == b"\x80\x02" and not shard.defects and [t.name for t in shard.tensors] == ["w"]


def test_of_a_million_faulty_entries_a_thousand_are_described():
    shard = parsed(file_of({str(i): 0 for i in range(5000)}))
    assert shard.counts == {"entry": 5000}
    assert len(shard.defects) == MAX_LISTED


def test_all_tensors_that_a_cut_file_lost_are_counted():
    header = header_bytes((f"t{i}", "BF16", (1,), 2) for i in range(3000))
    shard = parsed(header + bytes(2))
    assert shard.counts["truncated"] == 2999
    assert shard.cut_at == len(header) + 6000


def crowd(count, length, data):
    tensors = {f"{i:x}": entry(i * length, (i + 1) * length, [length]) for i in range(count)}
    return file_of(tensors, bytes(data))


def test_a_crowd_of_tensors_over_next_to_no_data_is_named_and_not_read(monkeypatch):
    monkeypatch.setattr(crowds, "CROWD", 50)
    for count, length, data, found in (
        (51, 63, 51 * 63, {"crowd"}),
        (50, 63, 50 * 63, set()),
        (51, 64, 51 * 64, set()),
        (51, 64, 1000, {"truncated"}),  # cut short: what the header promises counts
    ):
        shard = parsed(crowd(count, length, data))
        assert {d.kind for d in shard.defects} == found
        assert bool(shard.tensors) == (found != {"crowd"})
