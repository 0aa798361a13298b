"""`--kv-cache`: scales of an FP8 cache in the output, measured on the keys and values that will be served."""

import json
import random

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.initialize import initialize_qparams
from transformers import AutoModelForCausalLM

from doctor import api
from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import DoctorError, NotQuantizable
from doctor.core.recipe import Recipe
from doctor.lint.testing import encode, tiny
from doctor.quant.forward.attention_tap import CacheRange, tapped
from doctor.quant.forward.prefetch import load_tensor


@pytest.fixture
def text(tmp_path):
    """Four rows of 64 ids."""
    rng = random.Random(0)
    rows = [[1] + [rng.randrange(3, 96) for _ in range(63)] for _ in range(4)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"input_ids": r}) for r in rows))
    return path


def largest(folder, text):
    """Largest |key| and |value| f32[kv_heads] of each layer on the calibration rows, as transformers computes them."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found: dict[int, list[torch.Tensor]] = {}

    def look(sdpa, module, query, key, value, mask, **options):
        now = [x.abs().amax(dim=(0, 2, 3)) for x in (key, value)]
        before = found.get(module.layer_idx, now)
        found[module.layer_idx] = [torch.maximum(a, b) for a, b in zip(before, now, strict=True)]
        return sdpa(module, query, key, value, mask, **options)

    with torch.no_grad(), tapped(look):
        for line in text.read_text().splitlines():
            model(torch.tensor([json.loads(line)["input_ids"]]), use_cache=False)
    return model, found


@pytest.mark.parametrize(("cache", "strategy"), [("fp8", "tensor"), ("fp8-head", "attn_head")])
def test_scales_are_those_of_the_keys_and_values_that_are_served(tmp_path, text, cache, strategy):
    folder = tiny("llama").write(tmp_path / "m")
    recipe = Recipe(group_size=32, format="compressed-tensors", kv_cache=cache)
    found = api.quantize(folder, tmp_path / "o", recipe, calibration=text, max_seq_length=64)
    assert found.output and found.report.ok, [f.message for f in found.report.findings]
    checkpoint = Checkpoint.open(found.output)
    stated = checkpoint.value("config.json")["quantization_config"]["kv_cache_scheme"]
    assert stated == {"num_bits": 8, "type": "float", "strategy": strategy, "dynamic": False, "symmetric": True}
    without = Recipe(group_size=32, format="compressed-tensors")
    plain = api.quantize(folder, tmp_path / "p", without, calibration=text, max_seq_length=64)
    _model, ranges = largest(plain.output, text)
    for i, pair in ranges.items():
        for part, most in zip(("k_scale", "v_scale"), pair, strict=True):
            stored = load_tensor(checkpoint, f"model.layers.{i}.self_attn.{part}")
            wanted = most / 448 if strategy == "attn_head" else most.max()[None] / 448
            assert stored.shape == ((len(most), 1, 1) if strategy == "attn_head" else (1,))
            assert torch.allclose(stored.flatten(), wanted, rtol=1e-4)
            assert stored.shape == library_shape(stated, part[0], len(most))


def library_shape(stated, name, heads):
    """The shape that compressed-tensors gives the scale, of keys [heads, tokens, 16]."""
    holder = torch.nn.Module()
    args = QuantizationArgs.model_validate(stated)
    initialize_qparams(
        holder, name, args, observed_shape=(heads, None, 16), observed_dtype=torch.float32, force_zero_point=False
    )
    return getattr(holder, f"{name}_scale").shape


def test_a_recipe_that_rounds_runs_the_model_for_the_cache_alone(tmp_path, text):
    folder = tiny("llama").write(tmp_path / "m")
    recipe = Recipe(method="rtn", bits=8, group_size=-1, format="float-quantized", activations="fp8", kv_cache="fp8")
    found = api.quantize(folder, tmp_path / "o", recipe, calibration=text, max_seq_length=64)
    names = Checkpoint.open(found.output).tensors
    assert {n for n in names if n.endswith("_scale") and "proj" not in n} == {
        f"model.layers.{i}.self_attn.{part}" for i in (0, 1) for part in ("k_scale", "v_scale")
    }


def test_a_large_key_bias_refuses_an_fp8_cache_before_any_layer(tmp_path, text):
    case = tiny("qwen2")
    case.tensors[case.name("k").replace(".weight", ".bias")][5] = encode([214.0], "BF16")[0]
    recipe = Recipe(group_size=32, format="compressed-tensors", kv_cache="fp8")
    found = api.quantize(case.write(tmp_path / "m"), tmp_path / "o", recipe, calibration=text, max_seq_length=64)
    assert found.output is None and [f.code for f in found.report.findings if f.severity == "error"] == ["K504"]


def test_formats_without_room_for_the_scales_refuse_the_recipe():
    with pytest.raises(DoctorError, match="KV cache 'fp8' in the gptq format; must be left out"):
        Recipe(kv_cache="fp8")
    with pytest.raises(DoctorError, match=r"KV cache 'int4'.*must be one of fp8, fp8-head"):
        Recipe(format="compressed-tensors", kv_cache="int4")


def test_ranges_that_give_no_scale_are_refused_by_name():
    seen = CacheRange()
    with pytest.raises(NotQuantizable, match=r"layer\.3: 0 attentions of this layer were seen"):
        seen.scales("layer.3", 2, False)
    module, key = torch.nn.Identity(), torch.ones(1, 2, 4, 8)
    with seen.watched():
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as FUNCTIONS

        FUNCTIONS["sdpa"](module, key, key, key, None)
    assert torch.equal(seen.scales("a", 2, True)["k_scale"], torch.full((2, 1, 1), 1 / 448))
    with pytest.raises(NotQuantizable, match=r"a: has 2 key heads, config\.json says 4"):
        seen.scales("a", 4, True)
    assert seen.values is not None
    seen.values[1] = float("nan")
    with pytest.raises(NotQuantizable, match="keys or values are not finite"):
        seen.scales("a", 2, True)
