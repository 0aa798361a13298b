"""How much the next token depends on each linear's output, against one backward pass of the whole model."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from doctor.checkpoint.directory import Checkpoint
from doctor.core.recipe import Recipe
from doctor.lint.testing import tiny
from doctor.model.fused_experts import unfuse
from doctor.model.spec import build_spec
from doctor.quant.allocation.sensitivity import Sensitivity


def opened(folder):
    checkpoint = Checkpoint.open(folder)
    spec = build_spec(checkpoint.value("config.json"), checkpoint.tensors)
    return unfuse(checkpoint, spec, Recipe(group_size=32))


def rows(count=3, length=80):
    return [torch.randint(3, 96, (1, length), generator=torch.Generator().manual_seed(i)) for i in range(count)]


def whole(folder, rows, seed):
    """The same by transformers' model, all layers at once; labels are drawn as the class draws them."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    modules = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers." in name}
    sums: dict[str, torch.Tensor] = {}

    def watcher(name):
        def watch(_module, _args, output):
            output.register_hook(lambda g: sums.__setitem__(name, sums.get(name, 0) + g[0].double().square().sum(0)))

        return watch

    for name, module in modules.items():
        module.register_forward_hook(watcher(name))
    labels = torch.Generator().manual_seed(seed)
    for ids in rows:
        likely = model(input_ids=ids).logits[0].log_softmax(-1)
        drawn = [torch.multinomial(part.detach().exp(), 1, generator=labels) for part in likely.split(64)]
        likely.gather(1, torch.cat(drawn)).sum().backward()
    return {name: found / sum(ids.numel() for ids in rows) for name, found in sums.items()}


@pytest.mark.parametrize("together", [3, 1])
def test_slopes_layer_by_layer_are_those_of_the_whole_model(tmp_path, together):
    folder, text = tiny("llama").write(tmp_path / "m"), rows()
    checkpoint, spec = opened(folder)
    found = Sensitivity(checkpoint, spec, seed=5)
    # Labels are drawn row by row, so how many rows are held at once changes nothing.
    for begin in range(0, len(text), together):
        found.add(text[begin : begin + together])
    means, wanted = found.means(), whole(folder, text, 5)
    assert means.keys() == wanted.keys() == {x.name for x in spec.linears if x.block is not None}
    for name, values in wanted.items():
        assert torch.allclose(means[name], values, rtol=1e-3, atol=1e-9 + 1e-4 * float(values.max())), name


def test_an_expert_that_no_token_reaches_has_no_slope_and_others_have_one(tmp_path):
    folder = tiny("mixtral").write(tmp_path / "m")
    checkpoint, spec = opened(folder)
    found = Sensitivity(checkpoint, spec)
    found.add(rows(2, 64))
    experts = {x.name for x in spec.linears if x.expert is not None}
    reached = experts & found.means().keys()
    assert reached and all(float(found.means()[name].sum()) > 0 for name in reached)
    assert found.means().keys() >= {x.name for x in spec.linears if x.block is not None and x.expert is None}
