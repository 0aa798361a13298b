"""What the layers of a model keep in the KV cache, and how many bytes that takes at a length.

bytes per token = Σ over layers of (key values × key bits + value values × value bits) / 8, bits with their scales.
"""

from collections import Counter
from dataclasses import dataclass

from doctor.core.messages import Message, _
from doctor.evaluate.kvcache.schemes import Scheme

KIB, GIB = 1 << 10, 1 << 30


@dataclass(frozen=True)
class Layer:
    """What one layer keeps. keys, values: numbers a token adds; window: tokens kept, None for all; state_bytes:
    whatever the length.
    """

    block: int
    kind: str  # full, sliding, latent, state, hybrid, none
    keys: int = 0
    values: int = 0
    window: int | None = None
    state_bytes: int = 0

    def bytes_per_token(self, scheme: Scheme) -> float:
        return (self.keys * scheme.key_bits + self.values * scheme.value_bits) / 8

    def tokens_kept(self, context: int) -> int:
        return context if self.window is None else min(context, self.window)


@dataclass(frozen=True)
class CacheLayout:
    """The layers of a model, and what a reader should know about how they were found."""

    layers: tuple[Layer, ...]
    notes: tuple[str, ...] = ()  # messages
    expanded: tuple[Layer, ...] = ()  # of latent attention: what an engine keeps that stores full heads instead

    def bytes_per_token(self, scheme: Scheme, position: int = 0) -> float:
        """Bytes that one more token of a sequence takes after `position` tokens."""
        return sum(x.bytes_per_token(scheme) for x in self.layers if x.window is None or x.window > position)

    def total_bytes(self, scheme: Scheme, context: int, batch: int = 1) -> float:
        """Bytes of `batch` sequences of `context` tokens."""
        return batch * sum(x.state_bytes + x.bytes_per_token(scheme) * x.tokens_kept(context) for x in self.layers)

    def largest_context(self, scheme: Scheme, room: float, batch: int = 1) -> int | None:
        """Most tokens per sequence whose cache fits `room` bytes; 0 where none does, None where length costs nothing
        more.
        """
        widest = max((x.window for x in self.layers if x.window is not None), default=0)
        growth = self.bytes_per_token(scheme, widest) * batch
        left = room - self.total_bytes(scheme, widest, batch)
        if left >= 0:
            return widest + int(left // growth) if growth else None
        low, high = 0, widest
        while low < high:  # the size grows with the length, so the last length that fits is found by halves
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.total_bytes(scheme, middle, batch) <= room else (low, middle - 1)
        return low

    @property
    def windows(self) -> list[int]:
        return sorted({x.window for x in self.layers if x.window is not None})

    def kinds(self) -> list[Message]:
        """One line for each kind of layer: how many there are, and what each keeps."""
        counts = Counter((x.kind, x.keys, x.values, x.window, x.state_bytes) for x in self.layers)
        return [_kind(n, *shape) for shape, n in counts.items()]


def _kind(n: int, kind: str, keys: int, values: int, window: int | None, state_bytes: int) -> Message:
    tokens, state = f"{window or 0:,}", f"{state_bytes / KIB:,.0f}"
    if kind == "full":
        return _("{n} full: {keys} + {values} numbers a token", n=n, keys=keys, values=values)
    if kind == "latent":
        return _("{n} latent: {keys} numbers a token for all heads", n=n, keys=keys)
    if kind == "sliding":
        return _(
            "{n} sliding: {keys} + {values} numbers a token, of the last {window} tokens",
            n=n, keys=keys, values=values, window=tokens,
        )  # fmt: skip
    if kind == "hybrid":
        return _(
            "{n} hybrid: {keys} + {values} numbers a token and a state of {state} KiB",
            n=n, keys=keys, values=values, state=state,
        )  # fmt: skip
    if kind == "state":
        return _("{n} state: a state of {state} KiB at any length", n=n, state=state)
    return _("{n} none: nothing of its own", n=n)
