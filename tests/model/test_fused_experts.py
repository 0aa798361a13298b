"""Experts that lie in one tensor: what a stack is cut into, when, and that a cut reads its own bytes only."""

import numpy as np
import pytest
from healthy_models import save, stacked
from tiny_classes import CLASSES, save_class

from doctor.api import check
from doctor.checkpoint.directory import Checkpoint
from doctor.core.recipe import Recipe
from doctor.core.tables import table
from doctor.edits.kinds import ReplaceNonfinite
from doctor.edits.overlay import EditedCheckpoint
from doctor.lint.testing import tiny
from doctor.model.fused_experts import find_fused_experts, unfuse
from doctor.model.spec import build_spec

RECIPE = Recipe(group_size=32)
FAMILIES = ("llama4_text", "gpt_oss", "granitemoe")
# (block, which expert, role) -> the linear's weight or bias as transformers' own code reads it out of the stacks
BY_HAND = {
    "llama4_text": {
        "gate": lambda t, e: t["feed_forward.experts.gate_up_proj"][e, :, :128].T,
        "up": lambda t, e: t["feed_forward.experts.gate_up_proj"][e, :, 128:].T,
        "down": lambda t, e: t["feed_forward.experts.down_proj"][e].T,
    },
    "gpt_oss": {
        "gate": lambda t, e: t["mlp.experts.gate_up_proj"][e, :, :128].T,  # halves, as GPTQModel names them
        "up": lambda t, e: t["mlp.experts.gate_up_proj"][e, :, 128:].T,
        "down": lambda t, e: t["mlp.experts.down_proj"][e].T,
    },
    "granitemoe": {
        "gate": lambda t, e: t["block_sparse_moe.input_linear.weight"][e, :128],
        "up": lambda t, e: t["block_sparse_moe.input_linear.weight"][e, 128:],
        "down": lambda t, e: t["block_sparse_moe.output_linear.weight"][e],
    },
}


def seen(folder, recipe=RECIPE, **config):
    checkpoint = Checkpoint.open(folder)
    spec = build_spec(checkpoint.value("config.json") | config, checkpoint.tensors)
    return checkpoint, spec, *unfuse(checkpoint, spec, recipe)


def why(family, **recipe):
    case = tiny(family)
    return {s.block: s.why for s in find_fused_experts(case.spec, case.infos(), Recipe(**{"group_size": 32} | recipe))}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_is_the_part_of_the_stack_that_the_models_code_takes(family, tmp_path):
    checkpoint, spec, view, apart = seen(tiny(family).write(tmp_path / "m"))
    linear = next(e["linear"] for e in table("stacks")["stack"] if family in e["models"])
    for block in range(2):
        at = f"model.layers.{block}."
        stored = {n.removeprefix(at): checkpoint.load(n) for n in checkpoint.tensors if n.startswith(at)}
        for e in range(4):
            for role, cut in BY_HAND[family].items():
                name = at + linear.format(e=e, role=role)
                got, want, info = view.load(f"{name}.weight"), cut(stored, e), view.tensors[f"{name}.weight"]
                assert np.array_equal(got, want) and got.flags.c_contiguous and got.flags.writeable
                assert (info.shape, info.nbytes, info.dtype.name) == (want.shape, want.nbytes, "BF16")
                own = next(x for x in apart.linears if x.name == name)
                assert (own.out_features, own.in_features, own.role, own.block, own.expert) == (
                    *want.shape,
                    role,
                    block,
                    e,
                )
    assert len(apart.linears) == len(spec.linears) + 2 * 4 * 3


def test_biases_come_apart_as_their_weights_do(tmp_path):
    checkpoint, _spec, view, apart = seen(tiny("gpt_oss").write(tmp_path / "m"))
    both, down = (checkpoint.load(f"model.layers.1.mlp.experts.{role}_bias") for role in ("gate_up_proj", "down_proj"))
    for e in range(4):
        for role, want in (("gate", both[e, :128]), ("up", both[e, 128:]), ("down", down[e])):
            name = f"model.layers.1.mlp.experts.{e}.{role}_proj.bias"
            assert (
                np.array_equal(view.load(name), want)
                and view.tensors[name].shape == want.shape
                and name in apart.biases
            )
    assert not any("_proj_bias" in name for name in {*view.tensors, *apart.biases})


@pytest.mark.parametrize("family", FAMILIES)
def test_the_view_has_the_bytes_of_the_checkpoint_and_is_taken_apart_once(family, tmp_path):
    checkpoint, _spec, view, apart = seen(tiny(family).write(tmp_path / "m"))
    assert sum(i.nbytes for i in view.tensors.values()) == sum(i.nbytes for i in checkpoint.tensors.values())
    assert all(view.load(n).nbytes == i.nbytes for n, i in view.tensors.items())
    assert unfuse(view, apart, RECIPE) == (view, apart)
    assert view.value("config.json") == checkpoint.value("config.json") and view.root == checkpoint.root


def test_one_linear_reads_one_experts_part(tmp_path, monkeypatch):
    _checkpoint, _, view, _ = seen(tiny("llama4_text").write(tmp_path / "m"))
    read, honest = [], Checkpoint.open_file

    def counted(self, shard):
        file = honest(self, shard)
        into = file.read_into
        file.read_into = lambda at, out: (read.append(len(out)), into(at, out))
        return file

    monkeypatch.setattr(Checkpoint, "open_file", counted)
    for role in ("gate", "up", "gate", "down"):
        view.load(f"model.layers.0.feed_forward.experts.2.{role}_proj.weight")
    assert read == [64 * 256 * 2, 128 * 64 * 2]  # gate and up lie in one part, which is read once


def test_cuts_are_read_through_edits(tmp_path):
    case = tiny("gpt_oss")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    case.tensors[name][3, 5, 131] = 0x7FC0  # NaN in up of expert 3: output 3, input 5
    checkpoint = Checkpoint.open(case.write(tmp_path / "m"))
    fixed = EditedCheckpoint(checkpoint, [ReplaceNonfinite(name)])
    spec = build_spec(fixed.value("config.json"), fixed.tensors)
    view, _ = unfuse(fixed, spec, RECIPE)
    got = view.load("model.layers.0.mlp.experts.3.up_proj.weight")
    assert got[3, 5] == 0
    got[3, 5] = 0x7FC0
    assert np.array_equal(got, case.tensors[name][3, :, 128:].T)


def test_stacks_behind_a_longer_prefix_keep_it(tmp_path):
    case = tiny("llama4_text")
    for n in list(case.tensors):
        case.tensors[f"language_model.{n}"], case.dtypes[f"language_model.{n}"] = (
            case.tensors.pop(n),
            case.dtypes.pop(n),
        )
    _, _, _view, apart = seen(case.write(tmp_path / "m"))
    assert "language_model.model.layers.1.feed_forward.experts.3.down_proj" in {x.name for x in apart.linears}


@pytest.mark.parametrize(
    "family, recipe, reason",
    [
        (
            "gpt_oss",
            {"format": "compressed-tensors"},
            "no engine is known to read gpt_oss experts as compressed-tensors linears",
        ),
        ("gpt_oss", {"runtime": "vllm"}, "vllm is not known to read gpt_oss experts as gptq linears, transformers can"),
        (
            "granitemoe",
            {"runtime": "transformers"},
            "transformers is not known to read granitemoe experts as gptq linears, vllm can",
        ),
        ("llama4_text", {"group_size": 48}, "gate of an expert: in_features 64 is not a multiple of group_size 48"),
        ("llama4_text", {"group_size": 128}, "gate of an expert: in_features 64 is not a multiple of group_size 128"),
        ("llama4_text", {"keep": ("experts",)}, "asked for with keep"),
        ("llama4_text", {"keep": ("experts.down_proj",)}, "asked for with keep"),
    ],
)
def test_a_stack_that_stays_says_why(family, recipe, reason):
    assert set(why(family, **recipe)) == {0, 1} and all(
        text.startswith(reason) for text in why(family, **recipe).values()
    )


@pytest.mark.parametrize(
    "family, recipe",
    [
        ("gpt_oss", {}),
        ("gpt_oss", {"method": "awq"}),
        ("gpt_oss", {"runtime": "transformers"}),
        ("llama4_text", {"runtime": "vllm"}),
        ("llama4_text", {"format": "compressed-tensors"}),
        ("granitemoe", {"runtime": "vllm"}),
        ("llama4_text", {"keep": ("experts.3.",)}),
    ],
)
def test_what_an_engine_reads_is_taken_apart(family, recipe):
    assert why(family, **recipe) == {0: "", 1: ""}


def test_blocks_are_kept_one_by_one(tmp_path):
    assert why("granitemoe", keep=("layers.1.block_sparse_moe",)) == {0: "", 1: "asked for with keep"}


def test_an_engine_that_reads_stacks_in_all_blocks_or_none_gets_that():
    assert why("llama4_text", keep=("layers.1.feed_forward.experts",)) == {
        0: "",
        1: "",
    }  # its linears stay in 16 bits by their own names
    assert why("llama4_text", keep=("layers.1.feed_forward.experts.down_proj",)) == {
        0: "those of decoder layer 1 stay fused, and vLLM reads fused experts in all layers or in none",
        1: "asked for with keep",
    }


def test_shapes_that_are_not_the_familys_are_left_alone():
    case = tiny("granitemoe")
    name = "model.layers.0.block_sparse_moe.input_linear.weight"
    case.tensors[name] = case.tensors[name][:, :-2]
    assert [s.block for s in find_fused_experts(case.spec, case.infos(), RECIPE)] == [1]
    case = tiny("gpt_oss")
    del case.tensors["model.layers.1.mlp.experts.down_proj_bias"]
    assert [s.block for s in find_fused_experts(case.spec, case.infos(), RECIPE)] == [0]


def test_every_entry_of_the_table_names_its_linears_apart():
    for entry in table("stacks")["stack"]:
        names = {entry["linear"].format(e=e, role=role) for e in (0, 1) for role in ("gate", "up", "down")}
        assert len(names) == 6 and entry["read_by"] and entry["why_not"]


def test_experts_of_a_family_that_no_table_knows_are_numbered_when_they_are_read_back(tmp_path):
    source = Checkpoint.open(save("granitemoeshared", tmp_path / "m"))
    spec = build_spec(source.value("config.json"), source.tensors)
    view, apart = unfuse(source, spec, RECIPE)
    again = build_spec(view.value("config.json"), view.tensors)
    assert spec.family is None and len([x for x in apart.linears if x.expert is not None]) == 3 * 4 * 3
    assert {x.name: x for x in again.linears} == {x.name: x for x in apart.linears}


def test_gemma_4_experts_beside_the_dense_mlp_are_the_rows_that_transformers_takes(tmp_path):
    checkpoint, spec, view, apart = seen(save_class(CLASSES["Gemma4-MoE-text"], tmp_path / "m"))
    assert len(apart.linears) == len(spec.linears) + 4 * 4 * 3
    for block in range(4):
        at = f"model.layers.{block}.experts"
        both, down = (checkpoint.load(f"{at}.{name}") for name in ("gate_up_proj", "down_proj"))
        for e in range(4):
            assert np.array_equal(view.load(f"{at}.{e}.gate_proj.weight"), both[e, :64])
            assert np.array_equal(view.load(f"{at}.{e}.up_proj.weight"), both[e, 64:])
            assert np.array_equal(view.load(f"{at}.{e}.down_proj.weight"), down[e])


def test_qwen3_5_as_it_is_published_gets_no_finding(tmp_path):
    """Its experts lie in stacks, which the family's table knows under the names of linears: dropping them was offered
    once.
    """
    assert [
        f.code for f in check(stacked(save("qwen3_5_moe_text", tmp_path / "m"), tmp_path / "stacked"), RECIPE).findings
    ] == []
