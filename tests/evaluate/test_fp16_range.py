"""Would float16 do? The probe sees where activations leave its range, and what rounding every step costs."""

import math
from dataclasses import replace

import pytest
import torch

from doctor.api import check
from doctor.checkpoint.directory import Checkpoint
from doctor.evaluate.compare import Streamed, compare
from doctor.evaluate.fp16_range import DTYPES, Fp16RangeProbe, _rounding
from doctor.lint.testing import change, compared, encode, tiny

FAMILIES = ("llama", "qwen2", "gemma", "phi3", "opt", "qwen2_moe")


def rows(count=3, length=24):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 96, (1, length), generator=generator) for _ in range(count)]


def scaled(case, role, block, factor):
    name = case.name(role, block)
    case.tensors[name] = encode(factor * (case.tensors[name].astype("uint32") << 16).view("float32"), "BF16")


def half_of(case, folder):
    checkpoint = Checkpoint.open(case.write(folder / "m"))
    return compare(checkpoint, checkpoint, rows(), [], str, 0).half


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sound_model_stays_far_from_the_end_and_float16_rounds_finer_than_bfloat16(tmp_path, family):
    half = half_of(tiny(family), tmp_path)
    assert half.first is None and half.nonfinite_float16 == half.nonfinite_bfloat16 == 0
    assert half.absmax == max(size for _, size in half.blocks) < 100 and len(half.blocks) == len(half.residual) == 2
    assert 0 < half.kl_float16 < 0.2 * half.kl_bfloat16 and half.tokens == 2 * 23


def test_the_first_place_beyond_the_range_is_named_and_float16_breaks_there_while_bfloat16_does_not(tmp_path):
    """gate * up of block 1 grows by 10^6, and down shrinks as much: the same function, but for float16."""
    case = tiny()
    scaled(case, "up", 1, 2.0**20)
    scaled(case, "down", 1, 2.0**-20)
    half, sound = half_of(case, tmp_path), half_of(tiny(), tmp_path / "sound")
    assert half.first[0] == "the output of model.layers.1.mlp.up_proj" and half.first[1] > 65520
    assert half.blocks[0] == sound.blocks[0] and half.residual == pytest.approx(sound.residual, rel=1e-4)
    assert half.nonfinite_float16 == half.tokens and half.nonfinite_bfloat16 == 0 and half.kl_bfloat16 < 0.01
    assert math.isnan(half.kl_float16)


def test_the_residual_stream_is_looked_at_too(tmp_path):
    case = tiny()
    case.tensors["model.embed_tokens.weight"][7, 3] = encode([3e5], "BF16")[0]
    checkpoint = Checkpoint.open(case.write(tmp_path / "m"))
    half = compare(checkpoint, checkpoint, [torch.full((1, 8), 7)], [], str, 0).half
    assert half.first == ("the embeddings", 299008.0)


def test_the_probe_changes_nothing_that_it_looks_at(tmp_path):
    checkpoint = Checkpoint.open(tiny().write(tmp_path / "m"))
    alone, watched = Streamed(checkpoint, rows()), Streamed(checkpoint, rows())
    probe = Fp16RangeProbe(watched.skeleton, watched.rows, watched.hidden, watched.calls)
    for i in range(2):
        alone.step(i)
        watched.step(i, probe)
    assert all(torch.equal(a, b) for a, b in zip(alone.hidden, watched.hidden, strict=True))
    block = watched.skeleton.load_layer(0)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in block.modules())


def test_rounding_is_that_of_the_type_on_weights_inputs_and_outputs():
    linear = torch.nn.Linear(8, 4, bias=False)
    block = torch.nn.Sequential(linear)
    weight, x = linear.weight.detach().clone(), torch.randn(3, 8)
    for dtype in DTYPES.values():
        with _rounding(block, dtype):
            got = block(x)
        want = (x.to(dtype).float() @ weight.to(dtype).float().T).to(dtype).float()
        assert torch.equal(got, want) and torch.equal(linear.weight, weight) and not hasattr(linear, "exact")


# the rule


def said(half, stated, folder):
    case = compared()
    case.config["torch_dtype"] = stated
    known = case.facts["checkpoint:", "comparison"].half
    change(case, "checkpoint:", "comparison", half=replace(known, **half))
    report = check(
        case.write(folder), case.recipe, facts=[(s, n, v) for (s, n), v in case.facts.items()], select=["O615"]
    )
    return [(f.severity, f.message) for f in report.findings]


def test_beyond_the_range_is_an_error_only_where_config_says_float16(tmp_path):
    beyond = {"absmax": 7e4, "place": "x", "first": ("x", 7e4), "nonfinite_float16": 9}
    assert [s for s, _ in said(beyond, "bfloat16", tmp_path / "a")] == ["warning"]
    assert [s for s, _ in said(beyond, "float16", tmp_path / "b")] == ["error"]


@pytest.mark.parametrize(("absmax", "found"), [(32752.0, []), (40000.0, ["info"]), (math.nan, ["info"])])
def test_half_of_the_range_is_where_a_word_is_due(tmp_path, absmax, found):
    assert [s for s, _ in said({"absmax": absmax, "place": "x"}, "bfloat16", tmp_path)] == found


def test_a_run_that_breaks_without_one_value_seen_beyond_the_range_is_told_all_the_same(tmp_path):
    ((severity, message),) = said({"nonfinite_float16": 3}, "bfloat16", tmp_path)
    assert severity == "warning" and "3 of 1,022 rows" in message
