"""verify tells apart: the same model, a slightly wrong one, one wrong block, a collapsed one."""

import math

import numpy as np
import pytest
import torch

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import NotQuantizable
from doctor.evaluate import compare as module
from doctor.evaluate import routing
from doctor.evaluate.compare import Streamed, compare
from doctor.lint.testing import encode, tiny

FAMILIES = ("llama", "qwen2", "gemma", "phi3", "opt", "qwen2_moe")


def rows(count=3, length=24):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 96, (1, length), generator=generator) for _ in range(count)]


def compared(folder, spoil=lambda case: None, family="llama"):
    good, bad = tiny(family), tiny(family)
    spoil(bad)
    first, second = (Checkpoint.open(c.write(folder / n)) for c, n in ((good, "a"), (bad, "b")))
    return compare(first, second, rows(), [rows(1, 8)[0]], str, 1 << 30)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_against_itself_is_the_same(tmp_path, family):
    result = compared(tmp_path, family=family)
    assert result.kl_mean == 0 and result.top1_agreement == 1 and set(result.block_errors) == {0.0}
    assert result.perplexity_original == result.perplexity_quantized < 300 and result.generated == 24
    assert result.tokens == 3 * 23 and result.context == 24
    assert result.same_experts == (((0, 1.0), (1, 1.0)) if family == "qwen2_moe" else ()) and not result.experts_unseen


def test_choices_of_experts_are_compared_with_those_of_transformers(tmp_path):
    from transformers import AutoModelForCausalLM

    def spoil(case):
        name = next(name for name in case.tensors if name.endswith("layers.1.mlp.gate.weight"))
        noise = np.random.default_rng(0).normal(0, 0.5, case.tensors[name].shape)
        case.tensors[name][:] = encode(noise, "BF16")

    result = compared(tmp_path, spoil, "qwen2_moe")
    chosen = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            told = [model(ids, output_router_logits=True).router_logits for ids in rows()]
        top = model.config.num_experts_per_tok
        chosen.append([torch.cat(layer).topk(top).indices.tolist() for layer in zip(*told, strict=True)])
    shares = [
        sum(len(set(x) & set(y)) for x, y in zip(*layer, strict=True)) / sum(map(len, layer[0]))
        for layer in zip(*chosen, strict=True)
    ]
    assert shares[0] == 1 and 0 < shares[1] < 1, "layer 0 is the same, layer 1 has another router"
    assert result.same_experts == tuple(enumerate(map(pytest.approx, shares))) and not result.experts_unseen


def test_layers_whose_choices_were_not_seen_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(routing, "CHOICES", ())
    result = compared(tmp_path, family="qwen2_moe")
    assert result.same_experts == () and result.experts_unseen == 2


@pytest.mark.parametrize("key, value", [("model_type", "qwen2"), ("hidden_size", 128), ("num_hidden_layers", 1)])
def test_two_that_are_not_one_model_are_refused_by_the_key_that_differs(key, value, tmp_path):
    other = tiny("llama")
    other.config[key] = value
    with pytest.raises(NotQuantizable, match=rf"a and b are not one model: {key} is \w+ there and {value} here"):
        compare(
            *(Checkpoint.open(c.write(tmp_path / n)) for c, n in ((tiny("llama"), "a"), (other, "b"))), [], [], str, 0
        )


def test_logits_are_those_of_the_whole_model(tmp_path):
    """Block by block gives what transformers gives when it loads the checkpoint itself."""
    from transformers import AutoModelForCausalLM

    folder = tiny().write(tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    losses = [model(ids, labels=ids).loss.item() for ids in rows()]
    result = compare(Checkpoint.open(folder), Checkpoint.open(folder), rows(), [], str, 0)
    assert result.perplexity_original == pytest.approx(math.exp(sum(losses) / 3), rel=1e-5)
    assert result.generated == 0 and result.replies == ()


def test_the_block_where_it_goes_wrong_is_seen(tmp_path):
    def spoil(case):
        case.down(1)[:] = encode(np.random.default_rng(0).normal(0, 0.08, case.down(1).shape), "BF16")

    result = compared(tmp_path, spoil)
    assert result.block_errors[0] == 0 and result.block_errors[1] > 0.1 and result.kl_mean > 0.01


def test_a_collapsed_model_is_counted_and_its_perplexity_is_no_number(tmp_path):
    result = compared(tmp_path, lambda case: case.down(0).__setitem__((0, 0), 0x7FC0))
    assert result.nonfinite_quantized == result.tokens and result.nonfinite_original == 0
    assert math.isnan(result.perplexity_quantized) and math.isnan(result.kl_mean)
    assert result.token0_share == 1.0 and result.longest_repeat == 24, "NaN logits rank token 0 first"


@pytest.mark.parametrize("family", ("llama", "gemma", "qwen2"))
def test_prompts_of_any_length_are_answered_together_as_each_alone(family, tmp_path):
    checkpoint = Checkpoint.open(tiny(family).write(tmp_path / "m"))
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 90, (1, n), generator=draw) for n in (5, 2, 9, 5)]
    model = Streamed(checkpoint, prompts)
    assert model.reply(prompts, 6) == [model.reply([prompt], 6)[0] for prompt in prompts]
    assert model.reply([]) == []


def test_logits_in_parts_are_those_of_whole_rows(tmp_path, monkeypatch):
    checkpoint = Checkpoint.open(tiny("llama").write(tmp_path / "m"))
    rows = [torch.arange(3, 3 + n)[None] for n in (7, 4)]
    model = Streamed(checkpoint, rows)
    for i in range(len(model.skeleton.layers)):
        model.step(i)
    whole = list(model.logits())
    monkeypatch.setattr(module, "HEAD_TOKENS", 3)
    parts = [[], []]
    for row, at, logits in model.logit_parts():
        assert at == 3 * len(parts[row]) and len(logits) <= 3
        parts[row].append(logits)
    for got, want in zip(parts, whole, strict=True):
        torch.testing.assert_close(torch.cat(got), want)
