"""A model run on held-out text with its cache really quantized: perplexity and divergence of each scheme, and each
layer's error.

Block by block (quant/blocks.py): a block is loaded once, every scheme runs it on its own activations, and keys and
values pass through the cache's store and read on their way into attention. All tokens of a row are cached before they
are attended to, which is what an engine does in prefill with a quantized cache, and within rounding what it does in
decoding.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import NotQuantizable
from doctor.core.messages import _
from doctor.evaluate.compare import Streamed
from doctor.evaluate.kvcache.quantizers import Side
from doctor.evaluate.kvcache.tap import capture, logit_error
from doctor.evaluate.scores import Tally
from doctor.quant.forward.attention_tap import tapped

FP16 = Side("fp16")
# name -> (keys, values); the last one takes the key bias, turned by RoPE, off before the keys are stored and adds it on
# reading.
SCHEMES = {
    "FP16": (FP16, FP16),
    "FP8": (Side("fp8"), Side("fp8")),
    "Q8": (Side("int", 8), Side("int", 8)),
    "Q6": (Side("int", 8), Side("int", 4)),
    "Q4": (Side("int", 4), Side("int", 4)),
}
WITHOUT_BIAS = "Q4, key bias apart"


@dataclass(frozen=True)
class Measured:
    """One scheme against the 16-bit cache. nats for kl; top1: share of positions where both rank the same token
    first.
    """

    scheme: str
    perplexity: float
    kl: float
    top1: float
    layer_errors: tuple[
        float | None, ...
    ]  # rms change of a layer's attention logits by its keys; None for layers without keys


def with_widths(key_bits: int | None, value_bits: int | None) -> dict[str, tuple[Side, Side]]:
    """The usual schemes, and one more where widths were asked for."""
    if key_bits is None and value_bits is None:
        return dict(SCHEMES)
    key, value = (Side("int", bits) if bits is not None and bits < 16 else FP16 for bits in (key_bits, value_bits))
    return {**SCHEMES, f"K{key_bits or 16} V{value_bits or 16}": (key, value)}


@torch.no_grad()
def measure(
    checkpoint: Checkpoint,
    rows: list[torch.Tensor],
    schemes: dict[str, tuple[Side, Side]] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    device: str = "cpu",
) -> list[Measured]:
    """Measured of every scheme on rows int64[1, length], FP16 first; the one with the key bias apart only where there
    is a bias.

    Raises NotQuantizable for a model that cannot be run block by block, or whose attention is code of its own.
    """
    schemes = {"FP16": SCHEMES["FP16"], **(schemes or SCHEMES)}
    model = Streamed(checkpoint, rows, device)
    blocks = model.skeleton.layers
    biased = any(_key_projection(block) is not None for block in blocks)
    if biased and "Q4" in schemes:
        schemes[WITHOUT_BIAS] = schemes["Q4"]
    hidden = {name: list(model.hidden) for name in schemes}
    errors: dict[str, list[float | None]] = {name: [] for name in schemes}
    for i, block in enumerate(blocks):
        model.skeleton.load_layer(i)
        for name, (keys, values) in schemes.items():
            tap = _Tap(block, keys, values, apart=name == WITHOUT_BIAS)
            with tapped(tap):
                hidden[name] = [
                    tap.run(model, i, x, calls[i]) for x, calls in zip(hidden[name], model.calls, strict=True)
                ]
            errors[name].append(tap.error)
        model.skeleton.drop_layer(i)
        progress(i + 1, len(blocks))
    if all(e is None for e in errors["FP16"]):
        kind = type(model.skeleton.model).__name__
        raise NotQuantizable(
            _("{model} computes attention in code of its own, so its cache cannot be replaced.", model=kind)
        )
    return _score(model, rows, hidden, errors)


class _Tap:
    """Attention with a quantized cache, for one block and one scheme. error: rms over the rows seen."""

    def __init__(self, block: torch.nn.Module, keys: Side, values: Side, apart: bool):
        self.keys, self.values = keys, values
        self.projection = _key_projection(block) if apart else None
        self.offset: torch.Tensor | None = None
        self.squares: list[float] = []

    def run(self, model: Streamed, i: int, hidden: torch.Tensor, call) -> torch.Tensor:
        if self.projection is not None:
            self.offset = self._bias_as_key(self.projection, model, i, hidden, call)
        return model.skeleton.run_layer(i, hidden, call)

    def _bias_as_key(
        self, projection: torch.nn.Module, model: Streamed, i: int, hidden: torch.Tensor, call
    ) -> torch.Tensor:
        """The keys f32[1, heads, tokens, head_dim] that the bias alone makes at these positions: the block's own code,
        RoPE and all.
        """
        bias = projection.get_parameter("bias")
        projection.forward = lambda x: bias.expand(*x.shape[:-1], -1)
        try:
            seen = capture(lambda: model.skeleton.run_layer(i, hidden, call))
        finally:
            del projection.forward
        if seen is None:
            raise NotQuantizable(_("layer {layer}: its attention cannot be reached.", layer=i))
        return seen.key

    def __call__(self, sdpa, module, query, key, value, mask, scaling=None, **options):
        offset = 0 if self.offset is None else self.offset
        cached = self.keys.apply(key - offset) + offset
        by = query.shape[-1] ** -0.5 if scaling is None else scaling
        self.squares.append(logit_error(query, key, cached, by, causal=True) ** 2)
        try:
            return sdpa(module, query, cached, self.values.apply(value), mask, scaling=scaling, **options)
        except ValueError as error:  # what sdpa cannot do, as capped logits
            raise NotQuantizable(_("{module}: {error}", module=type(module).__name__, error=error)) from None

    @property
    def error(self) -> float | None:
        return (sum(self.squares) / len(self.squares)) ** 0.5 if self.squares else None


def _key_projection(block: torch.nn.Module) -> torch.nn.Module | None:
    """The linear that makes a block's keys, where it has a bias and no norm follows; None elsewhere."""
    names = dict(block.named_modules())
    for path, module in names.items():
        if path.rpartition(".")[2] in ("k_proj", "key", "wk") and getattr(module, "bias", None) is not None:
            around = path.rpartition(".")[0]
            if not any(f"{around}.{norm}" in names for norm in ("k_norm", "k_layernorm", "key_norm")):
                return module
    return None


def _score(
    model: Streamed, rows, hidden: dict[str, list[torch.Tensor]], errors: dict[str, list[float | None]]
) -> list[Measured]:
    tallies = {name: Tally() for name in hidden}
    model.rows = [ids for ids in rows for _scheme in hidden]
    model.hidden = [hidden[name][r] for r in range(len(rows)) for name in hidden]
    logits = model.logits()
    for ids in rows:
        base: torch.Tensor | None = None
        for tally in tallies.values():  # FP16 first
            current = next(logits)
            base = current if base is None else base
            tally.add(base[:-1], current[:-1], ids[0, 1:])
    logits.close()
    return [
        Measured(name, t.perplexity(1), t.divergence()[0], t.agreement(), tuple(errors[name]))
        for name, t in tallies.items()
    ]
