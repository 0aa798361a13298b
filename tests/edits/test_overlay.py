"""A checkpoint read through edits gives what the writer would put on disk."""

import json

import numpy as np
import pytest
from safetensors import safe_open

from doctor.checkpoint.directory import INDEX_NAME, Checkpoint
from doctor.checkpoint.safetensors import parse_header
from doctor.core.errors import BadCheckpoint, PlanRefused
from doctor.edits.arithmetic import apply
from doctor.edits.kinds import DropTensor, PadTensor, RebuildIndex, RemoveJson, ReplaceNonfinite, SetJson
from doctor.edits.overlay import EditedCheckpoint
from doctor.lint.testing import tiny


def source_of(case, tmp_path):
    return Checkpoint.open(case.write(tmp_path / "source"))


def whole(view, shard):
    with view.open_file(shard) as file:
        return file.read(0, file.size())


def test_view_without_edits_is_the_source(tmp_path):
    source = source_of(tiny(), tmp_path)
    view = EditedCheckpoint(source)
    assert not view.changed and view.tensors == source.tensors and view.entries == source.entries
    assert whole(view, "model.safetensors") == (source.root / "model.safetensors").read_bytes()


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("spread", [True, False])
def test_padded_tensor_reads_alike_by_load_rows_chunks_and_file(tmp_path, axis, spread):
    case = tiny()
    name = case.name("down")
    source = source_of(case, tmp_path)
    edit = PadTensor(name, axis, source.tensors[name].shape[axis] + 32, spread=spread)
    view = EditedCheckpoint(source, [edit])
    want = apply(source.load(name), source.tensors[name], [edit])
    info = view.tensors[name]
    assert (view.load(name) == want).all()
    assert (np.concatenate([r.copy() for r in view.rows(name, 1000)]) == want).all()
    with view.open_file(info.shard) as file:
        for step in (7, 64, 1000, 1 << 20):
            assert b"".join(bytes(c) for c in view.chunks(file, info, step)) == want.tobytes()


def test_edited_shard_is_a_valid_file_whose_other_tensors_are_unchanged(tmp_path):
    case = tiny()
    source = source_of(case, tmp_path)
    name = case.name("gate")
    view = EditedCheckpoint(source, [PadTensor(name, 0, 160)])
    raw = whole(view, "model.safetensors")
    assert len(raw) == view.entries["model.safetensors"].size == view.shards["model.safetensors"].size
    shard = parse_header("model.safetensors", len(raw), lambda at, n: raw[at : at + n])
    assert not shard.defects and shard.tensors == view.shards["model.safetensors"].tensors and shard.data_begin % 8 == 0
    (tmp_path / "copy.safetensors").write_bytes(raw)
    with safe_open(tmp_path / "copy.safetensors", "np") as file:
        assert set(file.keys()) == set(source.tensors) and file.metadata() == {"format": "pt"}
        assert file.get_slice(name).get_shape() == [160, 64]
    for other in source.tensors:
        if other != name:
            assert (view.load(other) == source.load(other)).all()


def test_neighbours_that_no_edit_touches_are_one_run(tmp_path):
    case = tiny()
    source = source_of(case, tmp_path)
    pieces = EditedCheckpoint(source, [PadTensor(case.name("gate"), 0, 160)]).pieces["model.safetensors"]
    assert [p.data is not None or p.tensor is not None for p in pieces] == [True, False, True, False]


def test_metadata_names_the_format_and_keeps_the_rest(tmp_path):
    case = tiny()
    folder = case.write(tmp_path / "source")
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["__metadata__"] = {"origin": "a merge"}
    new = json.dumps(header).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + raw[8 + length :])
    view = EditedCheckpoint(Checkpoint.open(folder), [PadTensor(case.name("down"), 1, 160)])
    assert view.shards["model.safetensors"].metadata == {"format": "pt", "origin": "a merge"}


def test_nonfinite_values_are_replaced_and_only_they(tmp_path):
    case = tiny()
    case.down()[3, 5] = 0x7FC0
    before = case.down().copy()
    view = EditedCheckpoint(source_of(case, tmp_path), [ReplaceNonfinite(case.name("down"))])
    after = view.load(case.name("down"))
    assert after[3, 5] == 0 and np.count_nonzero(after != before) == 1


def test_json_changes_one_value_and_keeps_the_users_text(tmp_path):
    case = tiny()
    case.files["config.json"] = (
        json.dumps(case.config, indent=1).replace('"bos_token_id": 1,', '"bos_token_id":   null,').encode()
    )
    view = EditedCheckpoint(source_of(case, tmp_path), [SetJson("config.json", "/bos_token_id", 1, expect=None)])
    assert view.json["config.json"].raw == case.files["config.json"].replace(b":   null,", b":   1,")
    assert view.value("config.json")["bos_token_id"] == 1 and view.changed == {"config.json"}
    assert view.read_file("config.json") == view.json["config.json"].raw
    assert view.entries["config.json"].size == len(view.json["config.json"].raw)
    with pytest.raises(
        BadCheckpoint, match="its edits are not on disk; read it through the checkpoint, not by its path"
    ):
        view.path("config.json")


def test_an_absent_json_file_is_made_and_a_key_removed(tmp_path):
    case = tiny()
    del case.json["generation_config.json"]
    view = EditedCheckpoint(
        source_of(case, tmp_path),
        [SetJson("generation_config.json", "/eos_token_id", 2), RemoveJson("config.json", "/torch_dtype")],
    )
    assert view.value("generation_config.json") == {"eos_token_id": 2}
    assert "torch_dtype" not in view.value("config.json") and "generation_config.json" in view.entries


@pytest.mark.parametrize(
    "edit, message",
    [
        (SetJson("config.json", "/bos_token_id", 5, expect=7), r"config.json#/bos_token_id: 1; the edit expects 7"),
        (SetJson("config.json", "/bos_token_id", 5), r"config.json#/bos_token_id: 1; the edit expects no value"),
        (SetJson("config.json", "/bos_token_id", 5, expect=True), r"1; the edit expects true"),
        (
            SetJson("config.json", "/nothing/there", 5),
            r"config.json#/nothing/there: /nothing is not an object, so it cannot hold the key",
        ),
        (RemoveJson("config.json", "/nothing"), r"config.json#/nothing: no value; the edit expects a value"),
        (SetJson("../config.json", "/a", 5), r"not a JSON file of this checkpoint"),
        (PadTensor("nobody", 0, 8), r"nobody: the checkpoint has no such tensor"),
        (PadTensor("model.norm.weight", 0, 8), r"axis 0 of \[64\] cannot grow to 8"),
        (PadTensor("model.norm.weight", 1, 80), r"axis 1 of \[64\] cannot grow to 80"),
        (PadTensor("model.norm.weight", 0, 66, blocks=4), r"cannot grow to 66 in 4 equal parts"),
    ],
)
def test_edits_for_another_state_of_the_files_are_refused(tmp_path, edit, message):
    with pytest.raises(PlanRefused, match=message):
        EditedCheckpoint(source_of(tiny(), tmp_path), [edit])


def test_broken_json_and_damaged_shards_are_not_edited(tmp_path):
    case = tiny()
    case.files["generation_config.json"] = b"{"
    source = source_of(case, tmp_path)
    with pytest.raises(PlanRefused, match=r"generation_config\.json: Expecting .* only in valid JSON"):
        EditedCheckpoint(source, [SetJson("generation_config.json", "/a", 1)])
    with open(source.root / "model.safetensors", "ab") as file:
        file.write(b"more")
    with pytest.raises(PlanRefused, match="4 bytes after the last tensor"):
        EditedCheckpoint(Checkpoint.open(source.root), [PadTensor(case.name("down"), 1, 160)])


def test_index_sizes_follow_the_tensors_and_keep_their_text(tmp_path):
    case = tiny()
    case.shards = 3
    source = source_of(case, tmp_path)
    name = case.name("down")
    view = EditedCheckpoint(source, [PadTensor(name, 1, 160)])
    assert (
        view.index["metadata"]["total_size"]
        == sum(t.nbytes for t in view.tensors.values())
        == source.index["metadata"]["total_size"] + 64 * 32 * 2
    )
    assert view.changed == {INDEX_NAME, source.tensors[name].shard}
    old, new = source.json[INDEX_NAME].raw.split(b"\n"), view.json[INDEX_NAME].raw.split(b"\n")
    assert sum(a != b for a, b in zip(old, new, strict=True)) == 1


def test_dropped_tensor_leaves_the_shard_and_the_index(tmp_path):
    case = tiny()
    case.shards = 2
    source = source_of(case, tmp_path)
    name = case.name("up", 1)
    view = EditedCheckpoint(source, [DropTensor(name)])
    assert name not in view.tensors and name not in view.weight_map
    assert view.index["metadata"]["total_size"] == source.index["metadata"]["total_size"] - source.tensors[name].nbytes


def test_rebuilt_index_names_every_tensor_of_every_shard(tmp_path):
    case = tiny()
    case.shards = 3
    folder = case.write(tmp_path / "source")
    good = json.loads((folder / INDEX_NAME).read_text())
    bad = {
        "metadata": {"total_size": 5},
        "weight_map": {"a": "missing.safetensors", "b": "model-00001-of-00003.safetensors"},
    }
    (folder / INDEX_NAME).write_text(json.dumps(bad))
    view = EditedCheckpoint(Checkpoint.open(folder), [RebuildIndex()])
    assert view.index == good and not view.missing_shards and len(view.shards) == 3
    (folder / INDEX_NAME).unlink()
    assert EditedCheckpoint(Checkpoint.open(folder), [RebuildIndex()]).index == good


def test_an_edit_of_the_index_decides_which_shards_are_read(tmp_path):
    case = tiny()
    case.shards = 2
    folder = case.write(tmp_path / "source")
    index = json.loads((folder / INDEX_NAME).read_text())
    moved = next(n for n, f in index["weight_map"].items() if f.startswith("model-00002"))
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if f.startswith("model-00001")}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2))
    source = Checkpoint.open(folder)
    view = EditedCheckpoint(source, [SetJson(INDEX_NAME, f"/weight_map/{moved}", "model-00002-of-00002.safetensors")])
    assert len(source.shards) == 1 and len(view.shards) == 2 and moved in view.tensors
    assert view.load(moved).shape == view.tensors[moved].shape
