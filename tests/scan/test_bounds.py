"""Shapes that make a row huge or smaller than a byte: memory stays at one chunk, and what is not looked for is said."""

import json
import struct
import tracemalloc

import pytest

from doctor.api import check
from doctor.checkpoint.directory import Checkpoint
from doctor.core.recipe import Recipe
from doctor.lint.testing import tiny
from doctor.report import render
from doctor.scan.scan import MAX_ROW_BYTES

DOWN = "model.layers.0.mlp.down_proj.weight"
PLAN = Recipe(group_size=32)


def with_down(folder, dtype, shape, bits):
    """A tiny model, all zeros, whose first down_proj is of this type and shape; a sparse file."""
    file = tiny().write(folder) / "model.safetensors"
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    old = json.loads(raw[8 : 8 + length])
    header, end = {}, 0
    for name, entry in old.items():
        if name == "__metadata__":
            continue
        begin, (first, last) = end, entry["data_offsets"]
        end += shape[0] * shape[1] * bits // 8 if name == DOWN else last - first
        header[name] = {"dtype": entry["dtype"], "shape": entry["shape"], "data_offsets": [begin, end]}
    header[DOWN].update(dtype=dtype, shape=shape)
    text = json.dumps(header).encode()
    with open(file, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        out.truncate(8 + len(text) + end)
    return folder


def test_a_row_above_the_cap_takes_one_chunk_of_memory_and_its_missing_facts_are_said(tmp_path):
    columns = MAX_ROW_BYTES // 4 + 4
    folder = with_down(tmp_path, "F32", [1, columns], 32)
    with open(folder / "model.safetensors", "r+b") as file:
        file.seek(Checkpoint.open(folder).tensors[DOWN].end - 4)
        file.write(struct.pack("<f", float("nan")))
    tracemalloc.start()
    try:
        report = check(folder, PLAN)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 24 << 20, f"{peak:,} bytes for a row of {4 * columns:,}"
    assert not report.crashed and report.bytes_read > MAX_ROW_BYTES
    assert list(report.skipped_tensors) == [DOWN]
    assert report.skipped_tensors[DOWN] == (
        "its rows have 67,108,880 bytes, more than 67,108,864: zero rows, columns and groups are not looked for"
    )
    assert [f.where.tensor for f in report.findings if f.code == "W201"] == [DOWN], "its values are counted"
    shown = json.loads(render("json", [report]))
    assert shown["skipped_tensors"] == report.skipped_tensors


@pytest.mark.parametrize(
    ("dtype", "bits", "shape"),
    [("F4", 4, [4096, 1]), ("F6_E2M3", 6, [4096, 1]), ("F6_E3M2", 6, [4, 3]), ("F4", 4, [4, 3]), ("F4", 4, [64, 128])],
)
def test_a_row_of_less_than_a_byte_is_read_and_its_type_is_named(tmp_path, dtype, bits, shape):
    report = check(with_down(tmp_path, dtype, shape, bits), PLAN)
    assert not report.crashed
    assert report.skipped_tensors == {DOWN: f"{dtype} values are not judged"}
