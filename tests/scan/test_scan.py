"""One pass: every byte once, whatever the number of shards and workers, and the facts are those of the whole tensor."""

import os
from collections import Counter

import numpy as np
import pytest

from doctor.api import check
from doctor.checkpoint.codecs import from_codes
from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import BadCheckpoint
from doctor.core.recipe import Recipe
from doctor.lint.testing import FAMILIES, encode, tiny
from doctor.scan import counters
from doctor.scan import scan as scan_module
from doctor.scan.header import header_facts
from doctor.scan.scan import scan
from doctor.scan.value_facts import HEAD_EQUALS_EMBED, STATS

PLAN = Recipe(group_size=32)


def scanned(folder, recipe=PLAN, **options):
    checkpoint = Checkpoint.open(folder)
    store = header_facts(checkpoint, recipe)
    return store, scan(checkpoint, store, **options), checkpoint


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("chunk", [256, 1 << 20])
def test_every_byte_of_every_tensor_is_read_once(tmp_path, monkeypatch, shards, workers, chunk):
    monkeypatch.setattr(scan_module, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(scan_module, "SPAN_BYTES", 4096)
    seen = {}
    read_and_scan = counters.read_and_scan

    def counting(file, at, buffer, *more):
        seen.setdefault(file.name, Counter()).update(range(at, at + len(buffer)))
        return read_and_scan(file, at, buffer, *more)

    monkeypatch.setattr(counters, "read_and_scan", counting)
    case = tiny()
    case.shards = shards
    told = []
    _, run, checkpoint = scanned(case.write(tmp_path), progress=told.append, workers=workers)
    assert run.bytes_read == sum(told) == checkpoint.total_bytes
    for name, shard in checkpoint.shards.items():
        assert seen[name] == Counter(range(shard.data_begin, shard.size)), f"{name}: some byte was not read once"


@pytest.mark.parametrize("chunk", [64, 4096])
def test_zero_rows_columns_and_groups_are_those_of_the_whole_matrix(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(scan_module, "CHUNK_BYTES", chunk)
    rng = np.random.default_rng(5)
    case = tiny()
    for name in list(case.tensors):
        codes = case.tensors[name]
        if codes.ndim == 2 and "proj" in name:
            values = from_codes(codes, "BF16").copy()
            values[rng.random(values.shape[0]) < 0.1] = 0
            values[:, rng.random(values.shape[1]) < 0.1] = 0
            for _ in range(6):
                row, group = rng.integers(values.shape[0]), rng.integers(values.shape[1] // 32)
                values[row, group * 32 : group * 32 + 32] = rng.choice([0.0, 1e-9])
            case.tensors[name] = encode(values, "BF16")
    store, _, checkpoint = scanned(case.write(tmp_path))
    for subject, linear in store.subjects("linear").items():
        W = np.abs(from_codes(checkpoint.load(linear.tensor), "BF16"))
        groups = W.reshape(W.shape[0], -1, 32).max(2)
        want = {
            "zero_rows": (W.max(1) == 0).sum(),
            "zero_columns": (W.max(0) == 0).sum(),
            "zero_groups": (groups == 0).sum(),
            "zero_groups_fp16": (groups <= 2**-25).sum(),
        }
        assert {name: store.value(name, subject) for name in want} == want, linear.name


def test_counters_of_a_cut_tensor_are_those_of_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(scan_module, "CHUNK_BYTES", 130)
    case = tiny()
    case.down()[5, 7], case.down()[9, 1] = 0x7FC0, 0xFF80
    store, *_ = scanned(case.write(tmp_path))
    found = store.get(STATS, f"tensor:{case.name('down')}")
    assert (found.n_nan, found.n_inf, found.first_nonfinite, found.numel) == (1, 1, 5 * 128 + 7, 64 * 128)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_float_tensor_of_a_family_is_judged(tmp_path, family):
    store, run, checkpoint = scanned(tiny(family).write(tmp_path))
    assert not run.skipped and all(store.has(STATS, f"tensor:{n}") for n in checkpoint.tensors)


def test_a_file_that_is_cut_under_the_scan_is_an_error_that_names_it(tmp_path):
    folder = tiny().write(tmp_path)
    checkpoint = Checkpoint.open(folder)
    store = header_facts(checkpoint, Recipe())
    os.truncate(folder / "model.safetensors", 5000)
    with pytest.raises(BadCheckpoint, match=r"model.safetensors: ends at byte 5,000"):
        scan(checkpoint, store)


def test_head_and_embedding_are_told_tied_from_copied(tmp_path):
    case = tiny()
    store, *_ = scanned(case.write(tmp_path / "a"))
    assert store.get(HEAD_EQUALS_EMBED) is False
    case.tensors["lm_head.weight"] = case.tensors["model.embed_tokens.weight"].copy()
    store, *_ = scanned(case.write(tmp_path / "b"))
    assert store.get(HEAD_EQUALS_EMBED) is True
    case.tensors["lm_head.weight"].reshape(-1)[-1] ^= 1
    store, *_ = scanned(case.write(tmp_path / "c"))
    assert store.get(HEAD_EQUALS_EMBED) is False
    case.tensors["lm_head.weight"] = case.tensors["model.embed_tokens.weight"][:-1].copy()
    store, *_ = scanned(case.write(tmp_path / "d"))
    assert store.get(HEAD_EQUALS_EMBED) is False


def test_a_head_is_compared_with_the_embedding_up_to_the_first_difference(tmp_path, monkeypatch):
    monkeypatch.setattr(scan_module, "CHUNK_BYTES", 256)
    case = tiny()
    folder = case.write(tmp_path)
    compared = []
    compare = scan_module.Twin.compare

    def watching(self, part):
        compared.extend([len(part)] if self.same else [])
        compare(self, part)

    monkeypatch.setattr(scan_module.Twin, "compare", watching)
    scanned(folder)
    assert len(compared) == 1 and compared[0] <= 256


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_groups_of_one_sign_are_counted_in_samples_and_zeros_are_no_sign(dtype):
    rng = np.random.default_rng(3)
    for values, want in (
        (rng.normal(size=(8, 64)), 0),
        (np.abs(rng.normal(size=(8, 64))), 16),
        (-np.abs(rng.normal(size=(8, 64))), 16),
    ):
        values[0, :32] = -0.0
        values[1, 0] = 0.0
        counted = counters.one_signed_groups(encode(values, dtype).tobytes(), dtype, 64, 32)
        assert counted == (15, max(want - 1, 0))


def test_random_weights_have_no_group_of_one_sign(tmp_path):
    for group in (32, 64, 128):
        case = tiny(mlp=1024)
        case.recipe = case.recipe.with_field("group_size", group)
        report = check(case.write(tmp_path / str(group)), case.recipe, select=["W210"])
        assert not report.findings and report.runs[0].judged
