"""Experts of one decoder layer as separate linears, in place of transformers' fused 3-D parameters.

Five forms are known: the plain one (gate_up_proj and down_proj without biases), the one with experts that compute
nothing (LongCat), the one without a gate (Nemotron-H), GPT-OSS, and Llama 4.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import nn

Inputs = list[tuple[nn.Module, Callable[[], torch.Tensor]]]  # (linear, function that gives its input)
Gate = Callable[..., torch.Tensor]  # the input of down, from the outputs of the linears before it


class _Route(NamedTuple):
    """The tokens int64[tokens] of one expert; given: function that gives its input [tokens, k]."""

    number: int
    expert: nn.ModuleDict
    token: torch.Tensor
    given: Callable[[], torch.Tensor]


class Experts(nn.Module):
    """The experts of one decoder layer as linears, in place of transformers' fused [experts, …] parameters.

    before: called with (linear, function that gives its input) of `at_once` experts that tokens chose: before the
    first gate of them computes, and again before the first down; then of the next ones. at_once changes no result.
    """

    at_once = 1 << 30
    before: Callable[[Inputs], None] | None = None
    first: tuple[str, ...] = ("gate", "up")  # the linears that read an expert's input

    def __init__(self, fused: Any, *, in_first: bool = False, bias: bool = False):
        super().__init__()
        _count, out, hidden = getattr(fused, "gate_up_proj" if "gate" in self.first else "up_proj").shape
        count = len(fused.down_proj)
        if in_first:
            hidden, out = out, hidden
        inner = out // len(self.first)
        self.gated = self.gate_of(fused)
        with torch.device("meta"):
            self.experts = nn.ModuleList(
                nn.ModuleDict(
                    {role: nn.Linear(hidden, inner, bias) for role in self.first}
                    | {"down": nn.Linear(inner, hidden, bias)}
                )
                for _ in range(count)
            )
        self.requires_grad_(False)

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """Whether a module of transformers is of this form."""
        raise NotImplementedError

    @staticmethod
    def gate_of(fused: Any) -> Gate:
        """The input of down from the outputs of gate and up: by the module's own function, where it has one
        (DeepSeek-V4 and MiniMax-M3 clamp both).
        """
        if callable(getattr(fused, "_apply_gate", None)):
            return lambda gate, up: fused._apply_gate(torch.cat((gate, up), -1))
        act = fused.act_fn
        return lambda gate, up: act(gate) * up

    def _sum(self, hidden: torch.Tensor, routes: list[_Route], weights: list[torch.Tensor] | None) -> torch.Tensor:
        """Outputs of experts, added up at their tokens. weights: one [tokens, 1] a route, None for sums without
        weights.
        """
        out = torch.zeros_like(hidden)
        places = list(range(len(routes)))
        for _chunk, group in groupby(places, lambda place: routes[place].number // self.at_once):
            self._add_to(out, [(routes[place], None if weights is None else weights[place]) for place in group])
        return out

    def _add_to(self, out: torch.Tensor, routes: list[tuple[_Route, torch.Tensor | None]]) -> None:
        """Add the outputs of some experts, each times its weight."""
        self._announce([(route.expert[role], route.given) for route, _weight in routes for role in self.first])
        middle = []
        for route, _weight in routes:
            x = route.given()
            middle.append(self.gated(*(route.expert[role](x) for role in self.first)))
        self._announce([(r.expert["down"], lambda y=y: y) for (r, _w), y in zip(routes, middle, strict=True)])  # type: ignore[misc]
        for (route, weight), y in zip(routes, middle, strict=True):
            y = route.expert["down"](y)
            out.index_add_(0, route.token, (y if weight is None else y * weight).to(out.dtype))

    def _announce(self, inputs: Inputs) -> None:
        if self.before is not None:
            self.before(inputs)

    def _numbered(self) -> list[tuple[int, nn.ModuleDict]]:
        return [(i, expert) for i, expert in enumerate(self.experts) if isinstance(expert, nn.ModuleDict)]


class PlainExperts(Experts):
    """The plain form.

    forward(hidden [tokens, k], top_k_index int64[tokens, top_k], top_k_weights [tokens, top_k]) -> [tokens, k], with
    the arithmetic of the fused module: act(gate(x)) * up(x), down, weighted sum over the experts that a token chose.
    """

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """gate_up_proj [E, 2I, H], down_proj [E, H, I], no biases."""
        parameters = dict(module.named_parameters(recurse=False))
        gates = callable(getattr(module, "_apply_gate", None))
        acts = gates or callable(getattr(module, "act_fn", None))
        if parameters.keys() != {"gate_up_proj", "down_proj"} or not acts:
            return False
        gate_up, down = parameters["gate_up_proj"].shape, parameters["down_proj"].shape
        own = not hasattr(module, "limit") or gates
        return len(gate_up) == 3 and down == (gate_up[0], gate_up[2], gate_up[1] // 2) and own

    def forward(self, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        routes, weights = [], []
        for number, expert in self._numbered():
            token, choice = torch.where(top_k_index == number)
            if token.numel():
                routes.append(_Route(number, expert, token, _rows(hidden, token)))
                weights.append(top_k_weights[token, choice, None])
        return self._sum(hidden, routes, weights)


class ZeroExperts(PlainExperts):
    """LongCat's: the router may choose experts behind the last one, which return their input. They have no weights,
    although the class gives them rows in gate_up_proj.
    """

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """gate_up_proj [E + zeros, 2I, H], down_proj [E, H, I], no biases."""
        parameters = dict(module.named_parameters(recurse=False))
        if parameters.keys() != {"gate_up_proj", "down_proj"} or not hasattr(module, "identity_expert"):
            return False
        gate_up, down = parameters["gate_up_proj"].shape, parameters["down_proj"].shape
        zeros = getattr(module, "zero_expert_num", 0)
        return len(gate_up) == 3 and down == (gate_up[0] - zeros, gate_up[2], gate_up[1] // 2)

    def forward(self, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        unchanged = (top_k_weights * (top_k_index >= len(self.experts))).sum(-1, keepdim=True)
        return super().forward(hidden, top_k_index, top_k_weights) + (hidden * unchanged).to(hidden.dtype)


class UngatedExperts(PlainExperts):
    """Experts without a gate, as Nemotron-H has them: down(act(up(x)))."""

    first = ("up",)

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """up_proj [E, I, H], down_proj [E, H, I], no biases."""
        parameters = dict(module.named_parameters(recurse=False))
        if parameters.keys() != {"up_proj", "down_proj"} or not callable(getattr(module, "act_fn", None)):
            return False
        up, down = parameters["up_proj"].shape, parameters["down_proj"].shape
        return len(up) == 3 and down == (up[0], up[2], up[1])

    @staticmethod
    def gate_of(fused: Any) -> Gate:
        return fused.act_fn


class GptOssExperts(PlainExperts):
    """GPT-OSS: parameters are [experts, in, out] with biases; gate and up alternate among the outputs and are clamped
    before they meet.

    The linears `gate` and `up` are the first and the second half of those outputs, as GPTQModel names them.
    """

    def __init__(self, fused: Any):
        super().__init__(fused, in_first=True, bias=True)

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return type(module).__name__ == "GptOssExperts" and callable(getattr(module, "_apply_gate", None))

    @staticmethod
    def gate_of(fused: Any) -> Gate:
        return lambda gate, up: fused._apply_gate(torch.cat((gate, up), -1))


class SortedGptOssExperts(GptOssExperts):
    """The same with linears that are gate and up, as llm-compressor writes them."""

    @staticmethod
    def gate_of(fused: Any) -> Gate:
        return lambda gate, up: fused._apply_gate(torch.stack((gate, up), -1).flatten(-2))


class Llama4Experts(Experts):
    """Llama 4's whole mixture. Its router scales what goes into an expert, not what comes out, and gives scores for all
    experts, 0 for those that a token did not choose: transformers computes all of them for every token, the zeros too.

    forward(hidden [rows, length, k]) -> ([tokens, k], the router's logits)
    """

    def __init__(self, mixture: Any):
        super().__init__(mixture.experts, in_first=True)
        self.router, self.shared_expert = mixture.router, mixture.shared_expert

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return type(module).__name__ == "Llama4TextMoe"

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = hidden.reshape(-1, hidden.shape[-1])
        scores, logits = self.router(hidden)
        routes = []
        for number, expert in self._numbered():
            token = torch.where(scores[:, number] != 0)[0]
            if token.numel():
                routes.append(_Route(number, expert, token, _rows(hidden, token, scores[token, number, None])))
        routed = self._sum(hidden, routes, None)
        return self.shared_expert(hidden) + routed, logits


def _rows(hidden: torch.Tensor, token: torch.Tensor, scale: torch.Tensor | None = None) -> Callable[[], torch.Tensor]:
    """Gives hidden's rows, times scale [tokens, 1], when called: one expert's input at a time is in memory."""
    return lambda: hidden[token] if scale is None else hidden[token] * scale


FORMS: tuple[type[Experts], ...] = (PlainExperts, ZeroExperts, UngatedExperts, GptOssExperts, Llama4Experts)
