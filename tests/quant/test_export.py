"""The output on disk: parts that are whole or absent, shards joined by copying, configs that every reader
understands.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from doctor.checkpoint.directory import Checkpoint
from doctor.checkpoint.safetensors import open_shard
from doctor.core.errors import DoctorError, PlanRefused
from doctor.core.recipe import Recipe
from doctor.formats.base import format_of
from doctor.lint.testing import tiny
from doctor.quant import export
from doctor.quant.export import Output
from doctor.quant.pack import pack_linear, unpack_linear
from doctor.quant.solve.rtn import round_to_nearest


@pytest.fixture
def source(tmp_path):
    return Checkpoint.open(tiny("llama").write(tmp_path / "m"))


@pytest.mark.parametrize(
    "format, bits, sym",
    [
        ("gptq", 4, True),
        ("gptq", 3, False),
        ("gptq_v2", 2, False),
        ("gptq", 8, True),
        ("compressed-tensors", 4, True),
        ("compressed-tensors", 4, False),
    ],
)
def test_what_is_packed_reads_back_as_what_was_solved(format, bits, sym):
    recipe = Recipe(bits=bits, group_size=32, sym=sym, format=format)
    W = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    solution = round_to_nearest(W, bits=bits, group_size=32, sym=sym, zero_min=1)
    parts = pack_linear("a.b", solution.codes, solution.grid, solution.g_idx, recipe)
    assert all(name.startswith("a.b.") for name in parts)
    assert torch.equal(unpack_linear("a.b", parts, recipe), solution.weight())


def test_the_gptq_config_says_what_all_readers_need():
    stated = format_of(Recipe(bits=4, group_size=64)).config(Recipe(bits=4, group_size=64))
    assert stated["quant_method"] == "gptq" and stated["checkpoint_format"] == "gptq"
    assert (stated["bits"], stated["group_size"], stated["sym"], stated["desc_act"], stated["lm_head"]) == (
        4,
        64,
        True,
        False,
        False,
    )
    assert "dynamic" not in stated


def test_kept_linears_are_named_to_the_reader():
    stated = format_of(Recipe()).config(Recipe(), ["model.layers.0.mlp.down_proj"])
    assert stated["dynamic"] == {r"-:^model\.layers\.0\.mlp\.down_proj$": {}}
    stated = format_of(Recipe(format="compressed-tensors")).config(
        Recipe(format="compressed-tensors"), ["model.layers.0.mlp.down_proj"]
    )
    assert stated["ignore"] == ["lm_head", "model.layers.0.mlp.down_proj"]


def test_compressed_tensors_states_channel_or_group():
    weights = format_of(Recipe(format="compressed-tensors", group_size=-1)).config(
        Recipe(format="compressed-tensors", group_size=-1)
    )["config_groups"]["group_0"]["weights"]
    assert (weights["strategy"], weights["group_size"]) == ("channel", None)


def test_our_shards_have_no_defect_and_the_formats_own_reader_agrees(tmp_path):
    tensors = {
        "b": torch.arange(6, dtype=torch.int32).reshape(2, 3),
        "a": torch.randn(3, dtype=torch.bfloat16),
        "s": torch.tensor([7, 9]),
    }
    with open(tmp_path / "x.safetensors", "wb") as file:
        export.write_safetensors(file, tensors)
    assert open_shard(tmp_path / "x.safetensors", "x").defects == []
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys() and all(torch.equal(read[n], t) for n, t in tensors.items())


def test_parts_join_into_shards_of_bounded_size_with_an_index(tmp_path, source, monkeypatch):
    monkeypatch.setattr(export, "MAX_SHARD_BYTES", 500)
    staged = Output.open(tmp_path / "o", {})
    want = {}
    for i in range(5):
        want |= {f"t{i}": torch.full((50,), i, dtype=torch.int32)}
        staged.write_part(f"{i:05d}", {f"t{i}": want[f"t{i}"]})
    staged.finish(source, Recipe(), [], {})
    staged.commit()
    index = json.loads((tmp_path / "o" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 1000
    assert sorted(set(index["weight_map"].values())) == [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    read = {}
    for name in set(index["weight_map"].values()):
        assert open_shard(tmp_path / "o" / name, name).defects == []
        read |= load_file(tmp_path / "o" / name)
    assert read.keys() == want.keys() and all(torch.equal(read[n], want[n]) for n in want)


def test_finishing_leaves_no_part_and_no_journal_and_carries_the_tokenizer(tmp_path, source):
    (source.root / "pytorch_model.bin").write_bytes(b"a second copy of the weights")
    source = Checkpoint.open(source.root)
    staged = Output.open(tmp_path / "o", {})
    staged.write_part("00000", {"t": torch.zeros(2)})
    staged.finish(source, Recipe(), [], {"doctor": "x"})
    assert not (tmp_path / "o").exists()
    staged.commit()
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == [
        "config.json",
        "doctor.json",
        "generation_config.json",
        "model.safetensors",
        "quantize_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert (tmp_path / "o" / "tokenizer.json").read_bytes() == (source.root / "tokenizer.json").read_bytes()
    stated = json.loads((tmp_path / "o" / "config.json").read_text())
    assert stated["quantization_config"] == json.loads((tmp_path / "o" / "quantize_config.json").read_text())
    assert stated["torch_dtype"] == "bfloat16"


def test_two_tensors_of_one_name_are_refused(tmp_path, source):
    staged = Output.open(tmp_path / "o", {})
    staged.write_part("00000", {"t": torch.zeros(2)})
    staged.write_part("00001", {"t": torch.zeros(2)})
    with pytest.raises(DoctorError, match="t: two tensors of the output have this name"):
        staged.finish(source, Recipe(), [], {})


def test_a_part_whose_writing_fails_is_absent(tmp_path, monkeypatch):
    staged = Output.open(tmp_path / "o", {})

    def cut(file, tensors):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "write_safetensors", cut)
    with pytest.raises(KeyboardInterrupt):
        staged.write_part("00000", {"t": torch.zeros(2)})
    assert not staged.has_part("00000")


def test_a_journal_line_cut_by_a_crash_does_not_count(tmp_path):
    staged = Output.open(tmp_path / "o", {"a": 1})
    staged.note({"block": 0, "records": []})
    with open(staged.stage / export.JOURNAL, "a") as file:
        file.write('{"block": 1, "rec')
    again = Output.open(tmp_path / "o", {"a": 1}, resume=True)
    again.note({"block": 1, "records": []})
    assert [n.get("block") for n in again.notes()] == [None, 0, 1]


def test_resuming_another_run_is_refused_and_says_what_differs(tmp_path):
    Output.open(tmp_path / "o", {"recipe": 1, "rows": 2})
    with pytest.raises(PlanRefused, match="the interrupted run differs in rows"):
        Output.open(tmp_path / "o", {"recipe": 1, "rows": 3}, resume=True)


def test_a_new_run_starts_with_an_empty_stage(tmp_path):
    Output.open(tmp_path / "o", {}).write_part("00000", {"t": torch.zeros(2)})
    assert not Output.open(tmp_path / "o", {}).has_part("00000")


def test_float32_is_stored_in_sixteen_bits_and_the_config_says_so(tmp_path):
    case = tiny("llama", dtype="F32")
    case.config["torch_dtype"] = "float32"
    checkpoint = Checkpoint.open(case.write(tmp_path / "m"))
    kept = dict(export.kept_tensors(["x", "y"], {"x": torch.zeros(2), "y": torch.zeros(2, dtype=torch.float16)}.get))
    assert kept["x"].dtype == torch.bfloat16 and kept["y"].dtype == torch.float16
    staged = Output.open(tmp_path / "o", {})
    staged.write_part("00000", kept)
    staged.finish(checkpoint, Recipe(), [], {})
    assert json.loads((staged.stage / "config.json").read_text())["torch_dtype"] == "bfloat16"
