"""What the error of each linear of a quantized model costs the next token: what makes errors of different linears
comparable.

With E the error of a linear's weights and g the slope of the log-likelihood at its output, a label being drawn from
the model itself, KL(model || quantized model) is near half the mean of (g^T E x)^2 over tokens, g and E x of the same
token. They must not be averaged apart: a norm behind a linear divides slopes by the size of its output, so tokens with
large inputs, as the first of a row, have small slopes. In Gemma 3 270M in 4 bits the product of the means is 27 times
the mean of the products for down_proj (0.468 against 0.017 nats a token), and near it for gate and up.

Outputs share the cost as the means of g_o^2 (E x)_o^2 do, since a width changes the error of each by its own factor
(measure.py). An expert's means count tokens that did not reach it as 0.

One forward and one backward pass over a few rows, one decoder layer of each model in memory at a time: the inputs of
every layer are kept for as many rows as memory allows, and each layer is computed again from them on the way back.

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
from doctor.core.errors import BadCheckpoint, NotQuantizable
from doctor.core.messages import _
from doctor.model.linears import Linear
from doctor.model.spec import ModelSpec
from doctor.quant.forward.layer_call import LayerCall
from doctor.quant.forward.passing import logits, passed_layers
from doctor.quant.forward.prefetch import load_tensor
from doctor.quant.forward.skeleton import Skeleton
from doctor.quant.linear import weight_of

ROWS = 16  # of calibration text; the means of 8,192 tokens are within a few percent
_TOKENS = 64  # whose logits are made at a time

Harms = dict[str, torch.Tensor]  # name of a linear -> what its outputs' errors cost, f64[out_features] nats a token


class Sensitivity:
    """The sums so far of a checkpoint whose fused experts are linears of their own."""

    def __init__(self, checkpoint: Checkpoint, spec: ModelSpec, device: str = "cpu", seed: int = 0):
        self.skeleton = Skeleton(checkpoint, spec, device)
        self.tokens = 0
        self._outputs: Harms = {}
        self._whole: dict[str, float] = {}
        self._random = torch.Generator().manual_seed(seed)

    def require_followed(self, ids: torch.Tensor) -> None:
        """Raises NotQuantizable for a model whose layers hand on more than hidden states. ids int64[1, length]."""
        self._opened([ids])

    def add(
        self, rows: Sequence[torch.Tensor], changed: Checkpoint, progress: Callable[[str], None] = lambda text: None
    ) -> None:
        """Rows of ids int64[1, length], whose inputs of every layer are held at once. changed: the model with other
        weights, as floats and under the same names.
        """
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
            with self._watched(i, changed), torch.enable_grad():
                slopes = [
                    self._back(i, x, c[i], slope) for x, c, slope in zip(inputs.pop(), calls, slopes, strict=True)
                ]
            self.skeleton.drop_layer(i)
        self.tokens += sum(ids.numel() for ids in rows)
        progress(_("sensitivity: {tokens:,} tokens", tokens=self.tokens))

    def harms(self) -> Harms:
        """Of every linear that a token reached. Raises NotQuantizable where one is not finite."""
        found = {}
        for name, outputs in self._outputs.items():
            total = float(outputs.sum())
            found[name] = outputs * (self._whole[name] / total if total else 0.0) / (2 * self.tokens)
            if not math.isfinite(float(found[name].sum())):
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
    def _watched(self, i: int, changed: Checkpoint) -> Iterator[None]:
        """Within it, backward passes of layer i add what errors at its linears' outputs cost."""
        found = self.skeleton.modules_of(i)
        kept = {name: pair for name, pair in found.items() if pair[0].expert is None}
        errors = {name: self._error(pair, changed) for name, pair in kept.items()}
        hooks = [
            module.register_forward_hook(self._watcher(name, (linear, module), errors.get(name), changed))
            for name, (linear, module) in found.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _error(self, pair: tuple[Linear, nn.Module], changed: Checkpoint) -> torch.Tensor:
        """W - Q f32[n, k] of a linear."""
        linear, module = pair
        W, name = weight_of(linear, module), f"{linear.name}.weight"
        if name not in changed.tensors:
            raise BadCheckpoint(_("{name}: the quantized model has no such weight.", name=name))
        Q = load_tensor(changed, name).to(W.device, torch.float32)
        return W.to(torch.float32) - Q

    def _watcher(
        self, name: str, pair: tuple[Linear, nn.Module], error: torch.Tensor | None, changed: Checkpoint
    ) -> Callable[[nn.Module, tuple, torch.Tensor], None]:
        """error: None for an expert, whose weights are decoded when it is reached and not held."""

        def watch(_module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            if not output.requires_grad:
                return
            with torch.no_grad():
                E = self._error(pair, changed) if error is None else error
                off = args[0].detach().reshape(-1, args[0].shape[-1]).to(torch.float32) @ E.T

            def add(slope: torch.Tensor) -> None:
                products = slope.detach().reshape(off.shape).double() * off
                outputs, whole = products.square().sum(0).cpu(), float(products.sum(1).square().sum())
                self._outputs[name] = self._outputs[name] + outputs if name in self._outputs else outputs
                self._whole[name] = self._whole.get(name, 0.0) + whole

            output.register_hook(add)

        return watch
