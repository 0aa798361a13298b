"""The output on disk: parts that are whole or absent, shards joined by copying, configs that every reader
understands.
"""

import errno
import json

import pytest
import torch
from safetensors.torch import load_file

from doctor.checkpoint.directory import Checkpoint
from doctor.checkpoint.safetensors import open_shard
from doctor.core.errors import DoctorError, MachineError, PlanRefused
from doctor.core.recipe import Recipe
from doctor.formats.registry import format_of
from doctor.lint.testing import tiny
from doctor.quant import export, resume, stage
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


def test_packed_linears_are_named_to_the_reader_that_knows_no_dynamic():
    layers = [f"model.layers.{n}.mlp.{part}" for n in (0, 1) for part in ("up_proj", "down_proj")]
    stated = export.config_of(Recipe(), layers[:1], layers[1:], {}, {})
    assert stated["modules_in_block_to_quantize"] == [["mlp.down_proj", "model.layers.1.mlp.up_proj"]]
    assert "modules_in_block_to_quantize" not in export.config_of(Recipe(), (), layers, {}, {})


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
    with open(staged.stage / stage.JOURNAL, "a") as file:
        file.write('{"block": 1, "rec')
    again = Output.open(tmp_path / "o", {"a": 1}, resume=True)
    again.note({"block": 1, "records": []})
    assert [n.get("block") for n in again.notes()] == [None, 0, 1]


def test_resuming_another_run_is_refused_and_says_what_differs(tmp_path):
    Output.open(tmp_path / "o", {"recipe": 1, "rows": 2})
    with pytest.raises(PlanRefused, match="the interrupted run differs in rows"):
        Output.open(tmp_path / "o", {"recipe": 1, "rows": 3}, resume=True)


def test_a_new_run_over_finished_layers_is_refused_with_the_two_ways_out(tmp_path):
    staged = Output.open(tmp_path / "o", {})
    staged.write_part("00000", {"t": torch.zeros(2)})
    assert not Output.open(tmp_path / "o", {}).has_part("00000")  # a part without its layer's line is no work done
    staged.write_part("00000", {"t": torch.zeros(2)})
    staged.note({"block": 0, "records": []})
    with pytest.raises(
        PlanRefused, match=r"holds 1 finished layer of an interrupted run. Go on with --resume; to start"
    ):
        Output.open(tmp_path / "o", {})
    assert staged.has_part("00000") and Output.open(tmp_path / "o", {}, resume=True).has_part("00000")


@pytest.mark.parametrize("damage", ["a bit", "cut", "absent", "a link"])
def test_a_part_that_is_no_longer_what_was_written_is_made_again_and_said(tmp_path, damage):
    staged = Output.open(tmp_path / "o", {})
    for name in ("00000", "00001"):
        staged.write_part(name, {"t": torch.ones(100)})
        staged.note({"block": int(name), "records": [name]})
    path = staged.part("00000")
    raw = bytearray(path.read_bytes())
    if damage == "a bit":
        raw[-1] ^= 1
        path.write_bytes(raw)
    elif damage == "cut":
        path.write_bytes(raw[:-1])
    else:
        path.unlink()
    if damage == "a link":
        path.symlink_to(tmp_path / "o.safetensors")
        (tmp_path / "o.safetensors").write_bytes(raw)
    again = Output.open(tmp_path / "o", {}, resume=True)
    assert again.damaged == ["00000"] and not again.has_part("00000") and again.has_part("00001")
    assert "is damaged or absent" in stage.damage_note("00000")
    assert resume.finished_records(again, 0) is None and resume.finished_records(again, 1) == ["00001"]
    again.write_part("00000", {"t": torch.ones(100)})
    again.note({"block": 0, "records": ["again"]})
    last = Output.open(tmp_path / "o", {}, resume=True)
    assert not last.damaged and resume.finished_records(last, 0) == ["again"]


def test_a_part_that_changes_before_the_end_ends_the_run(tmp_path, source):
    staged = Output.open(tmp_path / "o", {})
    staged.write_part("00000", {"t": torch.zeros(100)})
    raw = bytearray(staged.part("00000").read_bytes())
    raw[-1] ^= 1
    staged.part("00000").write_bytes(raw)
    with pytest.raises(MachineError, match=r"part-00000.safetensors: changed since it was written.* --resume"):
        staged.finish(source, Recipe(), [], {})


def test_a_full_disk_is_said_with_path_and_numbers_wherever_it_happens(tmp_path, source, monkeypatch):
    staged = Output.open(tmp_path / "o", {})
    staged.write_part("00000", {"t": torch.zeros(100)})
    real = stage.free_bytes
    monkeypatch.setattr(stage, "free_bytes", lambda _folder: 5)
    with pytest.raises(MachineError, match=r"doctor-quantize: 5 bytes are free; 400 will be written next. .* --resume"):
        staged.write_part("00001", {"t": torch.zeros(100)})
    with pytest.raises(MachineError, match=r"5 bytes are free; \d+ will be written next"):
        staged.finish(source, Recipe(), [], {})
    monkeypatch.setattr(stage, "free_bytes", real)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("write_safetensors", "copy_hashed"):
        with monkeypatch.context() as patch:
            patch.setattr(export, name, full)
            with pytest.raises(MachineError, match=r"doctor-quantize.*: No space left on device. Free space there"):
                if name == "copy_hashed":
                    staged.finish(source, Recipe(), [], {})
                else:
                    staged.write_part("00001", {"t": torch.zeros(100)})
    staged.finish(source, Recipe(), [], {})
    with monkeypatch.context() as patch:
        patch.setattr(export, "_sync", full)
        with pytest.raises(MachineError, match=r"doctor-quantize: No space left on device"):
            staged.commit()


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


@pytest.mark.parametrize("format, listed", [("compressed-tensors", True), ("gptq", False)])
def test_routers_are_named_where_readers_take_every_linear_that_no_list_names(format, listed):
    """vLLM builds some routers as linears, which transformers does not have among its own."""
    layer = "model.layers.0.mlp"
    names = [
        f"{layer}.gate.weight",
        f"{layer}.experts.0.gate_proj.weight_packed",
        f"{layer}.experts.0.gate_proj.qweight",
    ]
    stated = Output.stated(Recipe(format=format), [], [*names, f"{layer}.shared_expert.gate_proj.weight"], {})
    said = json.dumps(stated)
    assert (f'"{layer}.gate"' in said) == listed
    assert "shared_expert" not in said
