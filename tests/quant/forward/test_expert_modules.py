"""Unfused experts compute what transformers' fused ones do."""

import torch
from transformers import LongcatFlashConfig
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts

from doctor.quant.forward.expert_modules import FORMS


def test_experts_that_compute_nothing_return_their_input():
    config = LongcatFlashConfig(hidden_size=16, expert_ffn_hidden_size=8, n_routed_experts=3, zero_expert_num=2)
    torch.manual_seed(0)
    fused = LongcatFlashExperts(config)
    for parameter in fused.parameters():
        torch.nn.init.normal_(parameter)
    form = next(form for form in FORMS if form.fits(fused))
    unfused = form(fused)
    assert len(unfused.experts) == 3  # those behind have no weights
    for i, expert in enumerate(unfused.experts):
        gate, up = fused.gate_up_proj[i].chunk(2)
        for role, weight in (("gate", gate), ("up", up), ("down", fused.down_proj[i])):
            expert[role].weight = torch.nn.Parameter(weight.detach())
    hidden = torch.randn(10, 16)
    chosen = torch.stack([torch.randperm(5)[:2] for _ in range(10)])
    assert (chosen >= 3).any() and (chosen < 3).any()
    weights = torch.rand(10, 2)
    with torch.no_grad():
        torch.testing.assert_close(unfused(hidden, chosen, weights), fused(hidden, chosen, weights))
