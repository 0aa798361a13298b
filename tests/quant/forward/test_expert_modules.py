"""Unfused experts compute what transformers' fused ones do."""

import pytest
import torch
from torch import nn
from transformers import LongcatFlashConfig, MiniMaxM3VLTextConfig
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLExperts

from doctor.quant.forward.expert_modules import FORMS


def longcat():
    """The router may choose two experts more, which return their input and have no weights."""
    config = LongcatFlashConfig(hidden_size=16, expert_ffn_hidden_size=8, n_routed_experts=3, zero_expert_num=2)
    return LongcatFlashExperts(config), 5


def minimax():
    """Gate and up are clamped by the module's own function; it has no act_fn."""
    config = MiniMaxM3VLTextConfig(hidden_size=16, intermediate_size=8, num_local_experts=3, swiglu_limit=2.0)
    return MiniMaxM3VLExperts(config), 3


@pytest.mark.parametrize("make", [longcat, minimax])
def test_unfused_experts_compute_what_the_fused_ones_do(make):
    torch.manual_seed(0)
    fused, choices = make()
    for parameter in fused.parameters():
        nn.init.normal_(parameter)
    form = next(form for form in FORMS if form.fits(fused))
    unfused = form(fused)
    assert len(unfused.experts) == 3
    for i, expert in enumerate(unfused.experts):
        gate, up = fused.gate_up_proj[i].chunk(2)
        for role, weight in (("gate", gate), ("up", up), ("down", fused.down_proj[i])):
            expert[role].weight = nn.Parameter(weight.detach())
    hidden = torch.randn(10, 16)
    chosen = torch.stack([torch.randperm(choices)[:2] for _ in range(10)])
    assert set(chosen.flatten().tolist()) == set(range(choices))
    weights = torch.rand(10, 2)
    with torch.no_grad():
        torch.testing.assert_close(unfused(hidden, chosen, weights), fused(hidden, chosen, weights))
