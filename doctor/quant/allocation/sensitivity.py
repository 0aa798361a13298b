"""How much the model's next token depends on each linear's output: what makes errors of different linears comparable.

With E the error of a linear's weights and g the slope of the log-likelihood at its output, a label being drawn from
the model itself, KL(model || quantized model) is near half the mean of (g^T E x)^2 over tokens. Output by output, with
g taken as independent of x, that is half of the sum over outputs o of s_o e_o: s_o the mean of g_o^2, e_o the mean of
(E x)_o^2, which the Hessian gives (measure.py). An expert's means count tokens that did not reach it as 0.

One forward and one backward pass over a few rows, one decoder layer in memory at a time: the inputs of every layer are
kept for as many rows as memory allows, and each layer is computed again from its inputs on the way back.

Source: Martens 2020, New insights and perspectives on the natural gradient method, JMLR 21 (146), for the Fisher with
labels of the model's own and for KL as its quadratic form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import NotQuantizable
from doctor.core.messages import _
from doctor.model.spec import ModelSpec
from doctor.quant.forward.layer_call import LayerCall
from doctor.quant.forward.passing import logits, passed_layers
from doctor.quant.forward.skeleton import Skeleton

ROWS = 16  # of calibration text; the means of 8,192 tokens are within a few percent
_TOKENS = 64  # whose logits are made at a time

Sensitivities = dict[str, torch.Tensor]  # name of a linear -> s f64[out_features]


class Sensitivity:
    """The sums so far of a checkpoint whose fused experts are linears of their own.

    Raises NotQuantizable for a model whose layers hand on more than hidden states.
    """

    def __init__(self, checkpoint: Checkpoint, spec: ModelSpec, device: str = "cpu", seed: int = 0):
        self.skeleton = Skeleton(checkpoint, spec, device)
        self.tokens = 0
        self._sums: Sensitivities = {}
        self._random = torch.Generator().manual_seed(seed)

    def add(self, rows: Sequence[torch.Tensor], progress: Callable[[str], None] = lambda text: None) -> None:
        """Rows of ids int64[1, length], whose inputs of every layer are held at once."""
        states, calls = self._opened(list(rows))
        inputs = [states]
        with torch.no_grad():
            for i in range(len(self.skeleton.layers)):
                self.skeleton.load_layer(i)
                states = [self.skeleton.run_layer(i, x, c[i]) for x, c in zip(states, calls, strict=True)]
                inputs.append(states)
                self.skeleton.drop_layer(i)
        slopes = self._slopes(rows, inputs.pop())
        for i in reversed(range(len(self.skeleton.layers))):
            self.skeleton.load_layer(i)
            with self._watched(i), torch.enable_grad():
                slopes = [
                    self._back(i, x, c[i], slope) for x, c, slope in zip(inputs.pop(), calls, slopes, strict=True)
                ]
            self.skeleton.drop_layer(i)
        self.tokens += sum(ids.numel() for ids in rows)
        progress(_("sensitivity: {tokens:,} tokens", tokens=self.tokens))

    def means(self) -> Sensitivities:
        """s of every linear that a token reached. Raises NotQuantizable where one is not finite."""
        found = {name: sums / self.tokens for name, sums in self._sums.items()}
        for name, values in found.items():
            if not math.isfinite(float(values.sum())):
                raise NotQuantizable(
                    _("{name}: the slope of the next token's likelihood is not finite at its output.", name=name),
                    _("`doctor check` finds weights that are not finite."),
                )
        return found

    def _opened(self, rows: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[list[LayerCall]]]:
        """(inputs of the first layer, each row's calls)."""
        states, calls = [], []
        for hidden, found in self.skeleton.open_calls(rows):
            if any(call.carried for call in found):
                raise NotQuantizable(
                    _(
                        "{model}: its layers hand on more than hidden states, which slopes do not follow.",
                        model=type(self.skeleton.model).__name__,
                    ),
                    _("Name the bits of single linears by --override."),
                )
            states.append(hidden)
            calls.append(found)
        return states, calls

    def _slopes(self, rows: Sequence[torch.Tensor], states: list[torch.Tensor]) -> list[torch.Tensor]:
        """Slopes of the log-likelihood of labels drawn from the model, for the last layer's outputs of each row."""
        skeleton, found = self.skeleton, []
        skeleton.load_ends()
        with passed_layers(skeleton) as give, torch.enable_grad():
            for ids, hidden in zip(rows, states, strict=True):
                slope = torch.zeros_like(hidden)
                for begin in range(0, ids.shape[1], _TOKENS):
                    part = slice(begin, begin + _TOKENS)
                    given = hidden[:, part].detach().requires_grad_(True)
                    give(given)
                    likely = logits(skeleton, ids[:, part]).log_softmax(-1)
                    labels = torch.multinomial(likely.detach().exp().cpu(), 1, generator=self._random)
                    likely.gather(1, labels.to(likely.device)).sum().backward()
                    assert given.grad is not None
                    slope[:, part] = given.grad
                found.append(slope)
        return found

    def _back(self, i: int, hidden: torch.Tensor, call: LayerCall, slope: torch.Tensor) -> torch.Tensor:
        """Slopes of layer i's input, from those of its output."""
        x = hidden.detach().requires_grad_(True)
        self.skeleton.run_layer(i, x, call, carry=False).backward(slope)
        assert x.grad is not None
        return x.grad

    @contextmanager
    def _watched(self, i: int) -> Iterator[None]:
        """Within it, backward passes of layer i add the squares of slopes at its linears' outputs."""
        hooks = [
            module.register_forward_hook(self._watcher(name))
            for name, (_linear, module) in self.skeleton.modules_of(i).items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _watcher(self, name: str) -> Callable[[nn.Module, tuple, torch.Tensor], None]:
        def add(slope: torch.Tensor) -> None:
            squares = slope.detach().reshape(-1, slope.shape[-1]).double().square().sum(0).cpu()
            self._sums[name] = self._sums[name] + squares if name in self._sums else squares

        def watch(_module: nn.Module, _args: tuple, output: torch.Tensor) -> None:
            if output.requires_grad:
                output.register_hook(add)

        return watch
