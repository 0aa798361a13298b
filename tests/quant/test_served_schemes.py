"""Every scheme, from a model to transformers: what compressed-tensors loads computes what the model computed in memory
with the weights that were packed, bit for bit (KL 0).
"""

import json

import pytest
import torch

from doctor import api
from doctor.checkpoint.directory import Checkpoint
from doctor.core.recipe import Recipe, Scheme
from doctor.formats.registry import KNOWN, format_of
from doctor.formats.schemes import SCHEMES, fields_of

pytest.importorskip("compressed_tensors")
transformers = pytest.importorskip("transformers")

# Affine 4- and 8-bit words have float16 scales, which transformers rounds to the model's bfloat16 as it loads them.
NAMES = [
    name
    for name, scheme in SCHEMES.items()
    if scheme.fields["format"] != "compressed-tensors" and KNOWN[scheme.fields["format"]].groups_of_modules
]
IDS = torch.arange(3, 67)[None]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny Llama in bfloat16, with widths that every format takes, and rows to calibrate on."""
    folder = tmp_path_factory.mktemp("source")
    config = transformers.LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=96,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(4)
    model.to(torch.bfloat16).save_pretrained(folder / "m")
    rows = [torch.randint(3, 96, (64,)).tolist() for _ in range(24)]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps({"input_ids": row}) for row in rows))
    return folder


def in_memory(folder, output, recipe):
    """The model with the weights that an engine reads from the parts, and the library's rounding of its inputs."""
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    form, written = format_of(recipe), Checkpoint.open(output)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    args = QuantizationConfig.model_validate(form.config(recipe)).config_groups["group_0"].input_activations
    from safetensors.torch import load_file

    tensors = load_file(written.root / "model.safetensors")

    for name, parameter in model.named_parameters():
        if name in tensors and tensors[name].dtype == torch.bfloat16:  # norms that factors were folded into
            parameter.data = tensors[name]

    def rounding(parts):
        def rounded(module, given):
            (x,) = given
            scale, zero, whole = parts.get("input_scale"), None, parts.get("input_global_scale")
            if args.dynamic:
                scale, zero = compute_dynamic_scales_and_zp(x, args, module, global_scale=whole)
            return (fake_quantize(x, scale, zero, args, global_scale=whole),)

        return rounded

    for name, module in model.named_modules():
        parts = {part: tensors[f"{name}.{part}"] for part in form.part_names if f"{name}.{part}" in tensors}
        if form.scales not in parts:
            continue
        shape = (module.out_features, module.in_features)
        scheme = Scheme(recipe.bits, recipe.group_size)
        module.weight.data = form.unpack(parts, scheme, shape).to(torch.bfloat16)
        if args is not None:
            module.register_forward_pre_hook(rounding(parts))
    return model


@pytest.mark.parametrize("name, method", [*((name, SCHEMES[name].methods[0]) for name in NAMES), ("INT8", "gptq")])
def test_what_the_client_loads_computes_what_was_computed_in_memory(name, method, source, tmp_path):
    recipe = Recipe(**fields_of(name, {"method": method}))
    done = api.quantize(source / "m", tmp_path / "o", recipe, calibration=source / "rows.jsonl", max_seq_length=64)
    assert done.output, [f.message for f in done.report.findings]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "o", dtype=torch.bfloat16)
    ours = in_memory(source / "m", tmp_path / "o", recipe)
    with torch.no_grad():
        want, got = (model(IDS).logits.float().log_softmax(-1) for model in (ours, loaded))
        plain = transformers.AutoModelForCausalLM.from_pretrained(source / "m", dtype=torch.bfloat16)(IDS)
    divergence = (want.exp() * (want - got)).sum(-1)
    assert torch.isfinite(got).all() and float(divergence.abs().max()) == 0.0
    assert [f.code for f in api.check(done.output).findings] == ["C110"]  # it has no tokenizer
    lost = (plain.logits.float().log_softmax(-1) - got).abs().max()
    assert 0 < float(lost) < 4  # it is quantized, and still the model
