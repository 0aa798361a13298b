"""One linear as a run solves it: what its width changes."""

import pytest
import torch
from torch import nn

from doctor.core.recipe import Recipe
from doctor.model.linears import Linear
from doctor.quant import linear
from doctor.quant.forward.layer_input import LayerInput
from doctor.quant.solve.hessian import Hessian

N, K = 64, 128


def solved(recipe):
    generator = torch.Generator().manual_seed(0)
    module = nn.Linear(K, N, bias=False)
    module.weight.data = torch.randn(N, K, generator=generator)
    hessian = Hessian(K)
    hessian.add(torch.randn(4 * K, K, generator=generator) @ torch.randn(K, K, generator=generator))
    one = Linear("x", "x.weight", "down", 0, K, N)
    found = linear.solve_linear(one, module, LayerInput(hessian, recipe), recipe)
    return found.solution, linear.pack_linear(one, found, recipe), module.weight.detach()


@pytest.mark.parametrize("form", ["gptq", "gptq_v2", "compressed-tensors"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_scales_have_a_sign_below_4_bits_and_read_back(form, bits):
    recipe = Recipe(bits=bits, group_size=32, sym=True, format=form)
    solution, packed, weight = solved(recipe)
    assert bool((solution.grid.scale < 0).any()) == (bits < 4)
    read = linear.pack.unpack_linear("x", packed.parts, recipe, (N, K))
    assert torch.equal(read, solution.weight())
    sizes = solution.grid._replace(scale=solution.grid.scale.abs())  # what a reader makes of it that drops the sign
    turned = linear.gptq.dequantize(solution.codes, sizes, solution.g_idx)
    off = [float((x - weight).square().sum()) for x in (read, turned)]
    assert off[1] > 2 * off[0] if bits < 4 else off[1] == off[0]


@pytest.mark.parametrize("bits, gains", [(2, True), (3, True), (4, False)])
def test_more_passes_below_4_bits_lower_the_loss(monkeypatch, bits, gains):
    recipe = Recipe(bits=bits, group_size=32)
    after = solved(recipe)[0].loss
    monkeypatch.setattr(linear, "PASSES_BELOW_4_BITS", 1)
    before = solved(recipe)[0].loss
    assert after < before if gains else after == before
