"""One block in memory computes what transformers' whole model computes, bit for bit, for every family."""

import pytest
import torch
from healthy_models import save, stacked
from safetensors.torch import load_file, save_file
from tiny_classes import CLASSES, save_class
from transformers import AutoConfig, AutoModelForCausalLM

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import NotQuantizable
from doctor.core.recipe import Recipe
from doctor.lint.testing import FAMILIES, tiny
from doctor.model.fused_experts import unfuse
from doctor.model.spec import build_spec
from doctor.quant.forward.prefetch import load_tensor
from doctor.quant.forward.skeleton import Skeleton

IDS = torch.stack([torch.arange(3, 35), torch.arange(34, 2, -1)])


def skeleton(folder):
    checkpoint = Checkpoint.open(folder)
    return Skeleton(checkpoint, build_spec(checkpoint.value("config.json"), checkpoint.tensors))


def outputs(built, batches):
    """Hidden states before each block and after the last, for the last batch."""
    with torch.no_grad():
        *_, (hidden, calls) = built.open_calls(batches)
        states = [hidden]
        for i in range(len(built.layers)):
            built.load_layer(i)
            hidden = built.run_layer(i, hidden, calls[i])
            built.drop_layer(i)
            states.append(hidden)
    return states


def reference(folder, attention="sdpa"):
    """The same from transformers' model, before the final norm."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()
    states = []
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 2)
    for layer in layers:
        layer.register_forward_pre_hook(
            lambda m, args, kwargs: states.append(kwargs.get("hidden_states", args[0] if args else None)),
            with_kwargs=True,
        )
    layers[-1].register_forward_hook(lambda m, args, out: states.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model(IDS, use_cache=False)
    return states


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_one_by_one_equal_the_whole_model(family, tmp_path):
    folder = tiny(family).write(tmp_path / "m")
    got, want = outputs(skeleton(folder), [IDS]), reference(folder)
    assert len(got) == len(want) == 3
    for ours, theirs in zip(got, want, strict=False):
        assert torch.isfinite(ours).all()
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("family", ["llama4_text", "gpt_oss", "granitemoe", "qwen3_5_moe_text", "Gemma4-MoE-text"])
def test_stacks_taken_apart_compute_what_transformers_own_blocks_do(family, tmp_path):
    """Every expert is chosen by some token; a clamp of GPT-OSS has something to clamp."""
    if family in CLASSES:
        row = CLASSES[family]._replace(config=CLASSES[family].config | {"num_hidden_layers": 2})
        folder = stored = save_class(row, tmp_path / "m", "float32")
    else:
        folder = stored = save(family, tmp_path / "m", dtype="float32", num_hidden_layers=2)
    if family == "qwen3_5_moe_text":
        stored = stacked(folder, tmp_path / "stacked")
    if family == "gpt_oss":
        tensors = load_file(folder / "model.safetensors")
        save_file(
            {n: t * 40 if "gate_up_proj" in n else t for n, t in tensors.items()},
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )
    checkpoint = Checkpoint.open(stored)
    view, spec = unfuse(
        checkpoint, build_spec(checkpoint.value("config.json"), checkpoint.tensors), Recipe(group_size=32)
    )
    assert view is not checkpoint
    got, want = outputs(Skeleton(view, spec), [IDS]), reference(folder, "eager" if family == "gpt_oss" else "sdpa")
    assert len(got) == len(want) == 3
    for ours, theirs in zip(got, want, strict=False):
        assert torch.isfinite(ours).all() and (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_of_a_block_has_a_module_of_its_shape(family, tmp_path):
    built = skeleton(tiny(family).write(tmp_path / "m"))
    for i in range(2):
        found = built.modules_of(i)
        assert found.keys() == built.linears[i].keys()
        for linear, module in found.values():
            assert tuple(module.weight.shape) == (linear.out_features, linear.in_features)


def test_gpt2_stores_its_linears_transposed_and_without_prefix(tmp_path):
    config = AutoConfig.for_model(
        "gpt2", n_embd=64, n_layer=2, n_head=4, n_positions=64, vocab_size=96, bos_token_id=1, eos_token_id=2
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    built = skeleton(tmp_path)
    linear, module = built.modules_of(0)[next(n for n in built.linears[0] if n.endswith("c_attn"))]
    assert linear.transposed and (linear.out_features, linear.in_features) == tuple(module.weight.shape)[::-1] == (
        192,
        64,
    )
    for ours, theirs in zip(outputs(built, [IDS]), reference(tmp_path), strict=False):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_sliding_and_full_attention_blocks_get_their_own_masks(tmp_path):
    config = AutoConfig.for_model(
        "gemma3_text",
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=96,
        sliding_window=8,
        max_position_embeddings=64,
        layer_types=["sliding_attention", "full_attention"],
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    for ours, theirs in zip(outputs(skeleton(tmp_path), [IDS]), reference(tmp_path), strict=False):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_no_weight_stays_in_memory_outside_the_loaded_block(tmp_path):
    built = skeleton(tiny("llama").write(tmp_path / "m"))
    list(built.open_calls([IDS]))
    built.load_layer(1)
    real = [n for n, p in built.base.named_parameters() if p.device.type != "meta"]
    assert real and all(n.startswith("layers.1.") for n in real)
    built.drop_layer(1)
    assert all(p.device.type == "meta" for p in built.base.parameters())


def test_calls_of_equal_batches_share_their_masks(tmp_path):
    built = skeleton(tiny("llama").write(tmp_path / "m"))
    (_, first), (_, second) = built.open_calls([IDS, IDS.flip(0)])
    assert first[1].kwargs["position_embeddings"][0] is second[1].kwargs["position_embeddings"][0]


def test_a_model_type_transformers_does_not_define_is_refused(tmp_path):
    case = tiny("llama")
    case.config["model_type"] = "llama_of_tomorrow"
    case.config["auto_map"] = {"AutoModelForCausalLM": "modeling.Evil"}
    folder = case.write(tmp_path / "m")
    (folder / "modeling.py").write_text("raise SystemExit('ran')")
    with pytest.raises(NotQuantizable, match="model_type: 'llama_of_tomorrow' is not defined"):
        skeleton(folder)


def test_a_quantized_source_is_refused(tmp_path):
    case = tiny("llama")
    case.config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(NotQuantizable, match=r"quantized already \(gptq\)"):
        skeleton(case.write(tmp_path / "m"))


def test_a_missing_tensor_is_named(tmp_path):
    case = tiny("llama")
    del case.tensors["model.layers.1.mlp.up_proj.weight"]
    built = skeleton(case.write(tmp_path / "m"))
    with pytest.raises(NotQuantizable, match=r"layers\.1\.mlp\.up_proj\.weight: LlamaForCausalLM has this parameter"):
        built.load_layer(1)


def test_tensors_are_loaded_bit_for_bit(tmp_path):
    case = tiny("llama")
    checkpoint = Checkpoint.open(case.write(tmp_path / "m"))
    name = "model.layers.0.mlp.down_proj.weight"
    tensor = load_tensor(checkpoint, name)
    assert tensor.dtype == torch.bfloat16
    assert (tensor.view(torch.int16).numpy().view("uint16") == case.tensors[name]).all()


@pytest.mark.parametrize(
    "model_type, sizes",
    [
        (
            "gemma2",
            {
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "sliding_window": 16,
            },
        ),
        (
            "gpt_oss",
            {
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
            },
        ),
        ("bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4}),
    ],
)
def test_attention_that_sdpa_does_not_know_is_computed_as_the_model_defines_it(tmp_path, model_type, sizes):
    """Softcaps, sinks and ALiBi: the whole model in its eager form gives the same perplexity."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    from doctor.evaluate.compare import compare

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        CONFIG_MAPPING[model_type](vocab_size=96, **sizes), attn_implementation="eager"
    )
    model.save_pretrained(tmp_path)
    ids = torch.randint(0, 96, (1, 32))
    checkpoint = Checkpoint.open(tmp_path)
    assert compare(checkpoint, checkpoint, [ids], [], str, 0).perplexity_original == pytest.approx(
        model.eval()(ids, labels=ids).loss.exp().item(), rel=1e-4
    )


def test_a_prefetched_layer_is_the_same_and_is_read_once(tmp_path, monkeypatch):
    from doctor.quant.forward import skeleton as module

    built = skeleton(tiny("llama").write(tmp_path / "m"))
    want = [p.clone() for p in built.load_layer(1).parameters()]
    built.drop_layer(1)
    built.prefetch(1)
    built._prefetch[1]._thread.join()
    monkeypatch.setattr(module, "load_tensor", lambda *a: pytest.fail("read twice"))
    got = list(built.load_layer(1).parameters())
    assert len(got) == 9 and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert built._prefetch is None and not built._prefetched


def test_an_error_of_prefetching_is_raised_where_the_layer_is_loaded(tmp_path, monkeypatch):
    from doctor.quant.forward import prefetch as module

    built = skeleton(tiny("llama").write(tmp_path / "m"))

    def broken(*args):
        raise NotQuantizable("the disk went away")

    monkeypatch.setattr(module, "load_tensor", broken)
    built.prefetch(1)
    with pytest.raises(NotQuantizable, match="the disk went away"):
        built.load_layer(1)


def test_nothing_is_prefetched_behind_the_last_layer(tmp_path):
    built = skeleton(tiny("llama").write(tmp_path / "m"))
    built.prefetch(2)
    assert built._prefetch is None


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_the_embedding_and_no_second_matrix(tied, tmp_path):
    folder = save("qwen2", tmp_path / "m", tie=tied, num_hidden_layers=2)
    built = skeleton(folder)
    built.load_whole()
    table, head = built.base.get_input_embeddings().weight, built.model.get_output_embeddings().weight
    assert (table.data_ptr() == head.data_ptr()) == tied
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(built.model(input_ids=IDS, use_cache=False).logits, model(input_ids=IDS).logits)
