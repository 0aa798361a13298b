"""Which tensor is which: places, what is missing, and the config value that makes a size come out."""

import contextlib
import re

from healthy_models import save

from doctor.checkpoint.directory import Checkpoint
from doctor.core.tables import family_names
from doctor.lint.testing import tiny
from doctor.model.solve_sizes import solve
from doctor.model.spec import build_spec
from doctor.model.tensor_map import placement
from doctor.model.unpacked import UnpackedTensors


def placed(case, folder):
    checkpoint = Checkpoint.open(case.write(folder))
    return placement(
        checkpoint,
        build_spec(checkpoint.value("config.json"), checkpoint.tensors),
        UnpackedTensors(checkpoint.tensors, {}),
    )


def test_every_tensor_of_a_tiny_model_has_a_template_and_its_size(tmp_path):
    place = placed(tiny("qwen2"), tmp_path)
    assert place.stem == "model.layers." and place.counted == [0, 1]
    assert {info.name for info, _, _ in place.sizes()} == set(tiny("qwen2").tensors)
    assert place.misfits() == [] and place.missing() == {}


def test_a_prefix_in_front_of_the_familys_names_is_understood(tmp_path):
    case = tiny("llama")
    case.tensors = {n.replace("model.", "model.language_model.", 1): a for n, a in case.tensors.items()}
    case.dtypes = dict.fromkeys(case.tensors, "BF16")
    place = placed(case, tmp_path)
    assert place.stem == "model.language_model.layers."
    assert place.missing() == {} and place.misfits() == []


def test_a_bias_that_one_block_lacks_is_missing(tmp_path):
    case = tiny("qwen2")
    del case.tensors["model.layers.1.self_attn.k_proj.bias"]
    assert placed(case, tmp_path).missing() == {"model.layers.1.self_attn.k_proj.bias": "1 of 2 blocks have it"}


def test_only_the_first_layer_of_an_unknown_family_may_lack_vectors(tmp_path):
    def lacking(layer: int, tail: str) -> list[str]:
        checkpoint = Checkpoint.open(tmp_path / "m")
        name = f"model.layers.{layer}.{tail}.weight"
        del checkpoint.tensors[name]
        spec = build_spec(
            checkpoint.value("config.json") | {"model_type": "new", "architectures": ["New"]}, checkpoint.tensors
        )
        assert spec.family is None
        found = placement(checkpoint, spec, UnpackedTensors(checkpoint.tensors, {})).missing()
        assert set(found) <= {name}
        return list(found)

    save("llama", tmp_path / "m", num_hidden_layers=4)
    assert not lacking(0, "input_layernorm")  # by design in ModernBERT and Zaya
    assert lacking(1, "input_layernorm") and lacking(0, "self_attn.q_proj") and lacking(3, "input_layernorm")


def test_a_linear_that_no_block_has_is_missing_in_each(tmp_path):
    case = tiny("llama")
    for block in (0, 1):
        del case.tensors[f"model.layers.{block}.mlp.up_proj.weight"]
    assert sorted(placed(case, tmp_path).missing()) == [f"model.layers.{b}.mlp.up_proj.weight" for b in (0, 1)]


def test_blocks_behind_the_last_one_are_not_counted(tmp_path):
    case = tiny("llama")
    case.config["num_hidden_layers"] = 1
    assert placed(case, tmp_path).counted == [0]


def test_solve_finds_the_key_behind_products_and_halves(tmp_path):
    spec = placed(tiny("llama"), tmp_path).spec
    assert solve("num_key_value_heads * head_dim", "num_key_value_heads", spec, 128) == 8
    assert solve("intermediate_size", "intermediate_size", spec, 13696) == 13696
    assert solve("intermediate_size // 2", "intermediate_size", spec, 13696) in (27392, 27393)
    assert solve("3 * hidden_size", "hidden_size", spec, 100) is None


def buildable():
    for family in family_names():
        with contextlib.suppress(TypeError):  # a table entry whose config keys have no value here
            yield family, tiny(family)


def test_what_no_block_has_any_more_is_missing_in_any_family():
    """Each kind of weight that every block of a family holds is taken out of all of them."""
    overlooked, tried = [], 0
    for family, case in buildable():
        infos = case.infos()
        spec = build_spec(case.config, infos)
        for tail in {
            t.tensor.partition("{i}.")[2]
            for t in spec.templates
            if "{i}" in t.tensor and t.every_layer and t.tensor.endswith("weight")
        }:
            place = re.compile(r"(?:.*\.)?\d+\." + re.escape(tail).replace(r"\{e\}", r"\d+") + "$")
            rest = {n: i for n, i in infos.items() if not place.match(n)}
            lost = infos.keys() - rest.keys()
            if lost:
                tried += 1
                found = placement(None, build_spec(case.config, rest), UnpackedTensors(rest, {})).missing()
                overlooked += [(family, tail)] if not lost <= found.keys() else []
    assert overlooked == [] and tried > 400


def test_a_norm_that_a_flag_switches_off_is_not_missed():
    for family, tails, flag in (
        ("glm4_moe", ("q_norm", "k_norm"), {"use_qk_norm": False}),
        ("stablelm", ("post_attention_layernorm",), {"use_parallel_residual": True}),
    ):
        case = tiny(family)
        case.config.update(flag)
        rest = {n: i for n, i in case.infos().items() if not any(f".{t}." in n for t in tails)}
        assert placement(None, build_spec(case.config, rest), UnpackedTensors(rest, {})).missing() == {}


def test_the_only_layer_of_a_kind_misses_what_config_json_makes_it_hold(tmp_path):
    """Layer 3 of four is the only one with full attention: no other layer says what it must hold, the table does."""
    for changes in ({}, {"layer_types": None, "full_attention_interval": 4}):
        checkpoint = Checkpoint.open(save("qwen3_next", tmp_path / str(len(changes))))
        config = {k: v for k, v in (checkpoint.value("config.json") | changes).items() if v is not None}
        found = missing_without(config, checkpoint.tensors, ".no tensor")
        assert found == {}
        for part in ("3.self_attn.k_proj", "3.self_attn.q_norm", "0.linear_attn.A_log", "2.mlp.experts.1.up_proj"):
            found = missing_without(config, checkpoint.tensors, part)
            assert len(found) == 1 and part in next(iter(found))
        assert len(missing_without(config, checkpoint.tensors, "3.self_attn")) == 4, "its linears: q, k, v and o"


def missing_without(config, tensors, part):
    rest = {n: i for n, i in tensors.items() if part not in n}
    return placement(None, build_spec(config, rest), UnpackedTensors(rest, {})).missing()
