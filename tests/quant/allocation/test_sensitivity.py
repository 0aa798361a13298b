"""What an error of each linear costs the next token, against one backward pass of the whole model."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from doctor.checkpoint.directory import Checkpoint
from doctor.core.recipe import Recipe
from doctor.lint.testing import encode, tiny
from doctor.model.fused_experts import unfuse
from doctor.model.spec import build_spec
from doctor.quant.allocation.sensitivity import Sensitivity
from doctor.quant.forward.prefetch import load_tensor


def opened(folder):
    checkpoint = Checkpoint.open(folder)
    spec = build_spec(checkpoint.value("config.json"), checkpoint.tensors)
    return unfuse(checkpoint, spec, Recipe(group_size=32))


def rows(count=3, length=80):
    return [torch.randint(3, 96, (1, length), generator=torch.Generator().manual_seed(i)) for i in range(count)]


def changed(family, folder):
    """The model with other weights in every linear, as another quantizer's floats."""
    case = tiny(family)
    generator = np.random.default_rng(1)
    for name, values in case.tensors.items():
        if values.ndim == 2 and ".layers." in name:
            floats = (values.astype("uint32") << 16).view("float32")
            noise = generator.normal(0, 0.1 * floats.std(), floats.shape)
            case.tensors[name] = encode((floats + noise).astype("float32"), "BF16")
    return Checkpoint.open(case.write(folder))


def whole(folder, other, rows, seed):
    """The same by transformers' model, all layers at once; labels are drawn as the class draws them."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    modules = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers." in name}
    outputs: dict[str, torch.Tensor] = {}
    sums: dict[str, float] = {}

    def watcher(name):
        def watch(module, args, output):
            off = args[0][0].detach() @ (module.weight.detach() - load_tensor(other, f"{name}.weight").float()).T

            def add(g):
                products = g[0].double() * off
                outputs[name] = outputs.get(name, 0) + products.square().sum(0)
                sums[name] = sums.get(name, 0) + float(products.sum(1).square().sum())

            output.register_hook(add)

        return watch

    for name, module in modules.items():
        module.register_forward_hook(watcher(name))
    labels = torch.Generator().manual_seed(seed)
    for ids in rows:
        likely = model(input_ids=ids).logits[0].log_softmax(-1)
        drawn = [torch.multinomial(part.detach().exp(), 1, generator=labels) for part in likely.split(64)]
        likely.gather(1, torch.cat(drawn)).sum().backward()
    tokens = sum(ids.numel() for ids in rows)
    return {name: found / found.sum() * sums[name] / 2 / tokens for name, found in outputs.items()}


@pytest.mark.parametrize("together", [3, 1])
def test_harms_layer_by_layer_are_those_of_the_whole_model(tmp_path, together):
    folder, text, other = tiny("llama").write(tmp_path / "m"), rows(), changed("llama", tmp_path / "n")
    checkpoint, spec = opened(folder)
    found = Sensitivity(checkpoint, spec, seed=5)
    # Labels are drawn row by row, so how many rows are held at once changes nothing.
    for begin in range(0, len(text), together):
        found.add(text[begin : begin + together], other)
    means, wanted = found.harms(), whole(folder, other, text, 5)
    assert means.keys() == wanted.keys() == {x.name for x in spec.linears if x.block is not None}
    for name, values in wanted.items():
        assert torch.allclose(means[name], values, rtol=1e-3, atol=1e-4 * float(values.max())), name


def test_an_expert_that_no_token_reaches_has_no_harm_and_others_have_one(tmp_path):
    folder = tiny("mixtral").write(tmp_path / "m")
    checkpoint, spec = opened(folder)
    found = Sensitivity(checkpoint, spec)
    found.add(rows(2, 64), changed("mixtral", tmp_path / "n"))
    experts = {x.name for x in spec.linears if x.expert is not None}
    reached = experts & found.harms().keys()
    assert reached and all(float(found.harms()[name].sum()) > 0 for name in reached)
    assert found.harms().keys() >= {x.name for x in spec.linears if x.block is not None and x.expert is None}


def test_an_error_in_a_direction_that_a_norm_takes_out_again_costs_nothing(tmp_path):
    """Gemma divides the output of down_proj by its size: 1 % more of it is no error, at tokens of any size."""
    case = tiny("gemma3_text")
    folder = case.write(tmp_path / "m")
    name = case.name("down", 0)
    for key in (name, case.name("o", 0)):
        floats = (case.tensors[key].astype("uint32") << 16).view("float32")
        case.tensors[key] = encode(floats * (1.25 if key == name else 1.0), "BF16")
    checkpoint, spec = opened(folder)
    found = Sensitivity(checkpoint, spec)
    found.add(rows(2, 64), Checkpoint.open(case.write(tmp_path / "n")))
    harms = found.harms()
    down = harms[name.removesuffix(".weight")]
    assert float(down.sum()) < 1e-6 and float(harms[case.name("o", 0).removesuffix(".weight")].sum()) == 0
