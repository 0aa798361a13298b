"""Which cache a model's keys survive, from its weights alone: no text, no run of the model, about a second a layer.

Each attention layer gets random hidden states, z ~ N(0, 1) at rms 1, at random positions. The model's own code makes
queries and keys of them: input norm, projections, biases, q and k norms, RoPE. The keys go through the exact cache, and
what counts is how far the attention logits move. On Qwen2.5-Coder-0.5B the logarithm of this figure correlates 0.97
with the error measured on text (median ratio 0.78): it names layers 0, 1, 2, 4 and 8 where text shows 0, 1, 2 and 8; on
SmolLM2-135M it names none, nor does text.

A hidden state that is always the same in some channel (massive activations) is not in this picture; --measure sees it.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import NotQuantizable
from doctor.core.messages import _
from doctor.evaluate.kvcache.layout import Layer
from doctor.evaluate.kvcache.quantizers import Side
from doctor.evaluate.kvcache.tap import capture, logit_error
from doctor.model.spec import ModelSpec
from doctor.quant.forward.recorder import returned_values
from doctor.quant.forward.skeleton import Skeleton

TOKENS, POSITIONS, SEED = 192, 1024, 0
# RMS error of the attention logits with 4-bit keys. Below FINE, perplexity rises by a few percent (SmolLM2: at most
# 0.52, 26.6 to 28.3); above BROKEN some heads attend to the wrong tokens (Qwen2.5-Coder-0.5B: up to 19, perplexity 7.4
# to 46).
FINE, BROKEN = 0.5, 1.0
KEYS = {"4-bit": Side("int", 4), "8-bit": Side("int", 8), "FP8": Side("fp8")}
FP16_MAX = 65504.0
_PLAIN = ("full", "sliding", "hybrid")  # kinds of layers that keep plain keys
_AFTER = frozenset({"gate", "up", "down", "gate_up", "o"})  # linears that the keys never meet


@dataclass(frozen=True)
class Fitness:
    """What one layer's keys suffer. errors: rms error of its attention logits by kind of key; peak: largest |q·k|
    before scaling.
    """

    block: int
    errors: dict[str, float]
    key_absmax: float
    peak: float

    @property
    def advice(self) -> str:
        return advice(self.errors["4-bit"])


def advice(error: float) -> str:
    """ "Q4", "Q6" or "never Q4" by the error that 4-bit keys make; NaN is never Q4."""
    if error < FINE:
        return "Q4"
    return "Q6" if error <= BROKEN else "never Q4"


def bytes_read(checkpoint: Checkpoint, spec: ModelSpec, layers: tuple[Layer, ...]) -> int:
    """Bytes of the linears that `predict` reads."""
    wanted = {x.block for x in layers if x.kind in _PLAIN}
    own = {x.tensor for x in spec.linears if x.block in wanted and x.role not in _AFTER and x.expert is None}
    return sum(checkpoint.tensors[name].nbytes for name in own if name in checkpoint.tensors)


class _Probe(Skeleton):
    """A skeleton whose tokens stand at given positions. Its layers get random states, so no embedding is read, and how
    a layer returns is learnt from one without weights.
    """

    positions: torch.Tensor | None = None

    def _forward(self, ids: torch.Tensor) -> None:
        if self.positions is None:
            super()._forward(ids)
        else:
            self.base(input_ids=ids.to(self.device), position_ids=self.positions, use_cache=False)

    def load_before_layers(self) -> None:
        tables = [m for m in self.base.modules() if isinstance(m, nn.Embedding) and _takes_ids_alone(m)]
        for table in tables:
            table.forward = partial(self._embedded, table.embedding_dim)  # type: ignore[method-assign]
        self._load(self.base, "", skip=nn.ModuleList([self.layers, *tables]))

    def _embedded(self, width: int, ids: torch.Tensor) -> torch.Tensor:
        """In place of an embedding."""
        return torch.zeros(*ids.shape, width, device=self.device)

    def _projected(self, width: int, x: torch.Tensor) -> torch.Tensor:
        """In place of what a linear makes of x."""
        return torch.zeros(*x.shape[:-1], width, device=self.device)

    def probe(self, ids: torch.Tensor) -> int:
        layer = self.layers[0]
        linears = [m for m in layer.modules() if isinstance(m, nn.Linear)]
        for linear in linears:
            linear.forward = partial(self._projected, linear.out_features)  # type: ignore[method-assign]
        try:
            self._load(layer, f"{self.layers_path}.0.", skip=nn.ModuleList(linears))
            return returned_values(layer, self._forward, ids[:1])
        finally:
            for linear in linears:
                del linear.forward
            self.drop_layer(0)

    def load_attention(self, i: int) -> None:
        """Weights of block i without its MLP and what follows attention, which the keys never meet. Skips modules that
        hold other modules and weights of their own.
        """
        after = {id(module) for linear, module in self.modules_of(i).values() if linear.role in _AFTER}
        for path, module in self.layers[i].named_modules():
            if not list(module.children()) and id(module) not in after:
                self._load(module, f"{self.layers_path}.{i}.{path}.")


@torch.no_grad()
def predict(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    layers: tuple[Layer, ...],
    keys: dict[str, Side] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    device: str = "cpu",
) -> list[Fitness]:
    """Fitness of every layer that keeps plain keys. Raises NotQuantizable where the model cannot be built or hides its
    attention.

    keys: other ways to store keys that are tried beside KEYS. The same weights give the same figures: seeds are fixed.
    """
    wanted = [x.block for x in layers if x.kind in _PLAIN]
    if not wanted:
        raise NotQuantizable(_("no layer caches plain keys, so there is nothing to simulate."))
    probe = _Probe(checkpoint, spec, device)
    room = min(spec.max_positions or POSITIONS, POSITIONS)
    generator = torch.Generator().manual_seed(SEED)
    where = torch.randperm(room, generator=generator)[:TOKENS].sort().values[None]
    probe.positions = where.to(device) if _takes_positions(probe.base) else None
    ids = torch.arange(where.shape[1])[None] % (spec.vocab or 1)
    ((hidden, calls),) = list(probe.open_calls([ids]))
    found = []
    for n, i in enumerate(wanted):
        z = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(SEED + i)).to(device)
        found.append(
            _fitness(probe, i, z / z.square().mean(-1, keepdim=True).sqrt(), calls[i], {**KEYS, **(keys or {})})
        )
        progress(n + 1, len(wanted))
    return found


def _fitness(probe: _Probe, i: int, z: torch.Tensor, call, keys: dict[str, Side]) -> Fitness:
    probe.load_attention(i)
    seen = capture(lambda: probe.run_layer(i, z, call))
    probe.drop_layer(i)
    if seen is None:
        raise NotQuantizable(
            _(
                "layer {layer}: {model} computes attention in code of its own, so its keys cannot be seen.",
                layer=i,
                model=type(probe.model).__name__,
            )
        )
    errors = {
        name: logit_error(seen.query, seen.key, side.apply(seen.key), seen.scaling) for name, side in keys.items()
    }
    groups = seen.query.shape[1] // seen.key.shape[1]
    peak = (seen.query @ seen.key.repeat_interleave(groups, 1).transpose(-1, -2)).abs().max()
    return Fitness(i, errors, float(seen.key.abs().max()), float(peak))


def _takes_ids_alone(table: nn.Embedding) -> bool:
    """Whether a table is looked up by ids of words, and not by positions that it works out from masks."""
    return len(inspect.signature(type(table).forward).parameters) == 2


def _takes_positions(module: torch.nn.Module) -> bool:
    return "position_ids" in inspect.signature(module.forward).parameters
