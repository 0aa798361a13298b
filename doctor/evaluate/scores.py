"""How far two models' next-token distributions are apart, and whether a reply has collapsed: pure functions of logits
and tokens.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from doctor.evaluate.ranking_report import Apart

RESAMPLES, LEAST_ROWS = 1000, 3  # of the rows, for a spread; of fewer rows than these a spread would say nothing
CHUNK_ROWS = 256  # rows of logits worked on at once: 256 × 152k × 4 B = 156 MB at the widest vocabulary in use


class TextSums(NamedTuple):
    """Of one row of text: positions, summed nll of both models in nats, summed KL and same first choices over the
    positions finite in both.
    """

    tokens: int
    nll_original: float
    nll_quantized: float
    kl: float
    compared: int
    agree: int

    def plus(self, more: TextSums) -> TextSums:
        """With what another part of the same row adds."""
        return TextSums(
            self.tokens + more.tokens,
            self.nll_original + more.nll_original,
            self.nll_quantized + more.nll_quantized,
            self.kl + more.kl,
            self.compared + more.compared,
            self.agree + more.agree,
        )

    def less(self, before: TextSums) -> TextSums:
        """What was added since."""
        return TextSums(
            self.tokens - before.tokens,
            self.nll_original - before.nll_original,
            self.nll_quantized - before.nll_quantized,
            self.kl - before.kl,
            self.compared - before.compared,
            self.agree - before.agree,
        )


class Spread(NamedTuple):
    """Spans in which 95 of 100 resamplings of the rows lie; NaN where there are too few rows."""

    ratio: tuple[float, float]  # perplexity quantized / original
    kl: tuple[float, float]
    top1: tuple[float, float]


@dataclass
class Tally:
    """Running sums over token positions. nats throughout. A row with NaN or Inf counts as non-finite and gives no
    figure.
    """

    tokens: int = 0
    nll: list[float] = field(default_factory=lambda: [0.0, 0.0])
    nonfinite: list[int] = field(default_factory=lambda: [0, 0])
    agree: int = 0
    compared: int = 0
    entropies: list[float] = field(default_factory=lambda: [0.0, 0.0])
    choices: list[Counter] = field(default_factory=lambda: [Counter(), Counter()])
    kl: list[torch.Tensor] = field(default_factory=list)
    kl_sum: float = 0.0
    texts: list[TextSums] = field(default_factory=list)
    text: int | None = None  # the row that the last of them is of

    def add(
        self, original: torch.Tensor, quantized: torch.Tensor, targets: torch.Tensor, text: int | None = None
    ) -> None:
        """Logits [rows, vocabulary] of both models for the same positions, and the token ids [rows] that really follow.

        Where the vocabularies were padded to different widths, the columns both have are compared. text: the number of
        the row of text that they are a part of; parts of one row come one after the other. None: a row of its own.
        """
        width = min(original.shape[1], quantized.shape[1])
        before = self._sums()
        for at in range(0, len(targets), CHUNK_ROWS):
            part = slice(at, at + CHUNK_ROWS)
            self._add(
                original[part, :width].float(), quantized[part, :width].float(), targets[part].to(original.device)
            )
        added = self._sums().less(before)
        if text is not None and text == self.text:
            self.texts[-1] = self.texts[-1].plus(added)
        else:
            self.texts.append(added)
        self.text = text

    def _sums(self) -> TextSums:
        return TextSums(self.tokens, self.nll[0], self.nll[1], self.kl_sum, self.compared, self.agree)

    def _add(self, a: torch.Tensor, b: torch.Tensor, targets: torch.Tensor) -> None:
        self.tokens += len(targets)
        good, logs = [torch.isfinite(x).all(1) for x in (a, b)], []
        for i, (x, ok) in enumerate(zip((a, b), good, strict=True)):
            self.nonfinite[i] += int((~ok).sum())
            logs.append(torch.log_softmax(x, 1))
            self.nll[i] -= float(logs[i].gather(1, targets[:, None])[ok].double().sum())
            self.entropies[i] += float(torch.special.entr(logs[i][ok].exp()).sum(1).double().sum())
            self.choices[i].update(x[ok].argmax(1).tolist())
        both = good[0] & good[1]
        kl = (logs[0].exp() * (logs[0] - logs[1])).sum(1)[both]
        self.kl.append(kl)
        self.kl_sum += float(kl.double().sum())
        self.agree += int((a.argmax(1) == b.argmax(1))[both].sum())
        self.compared += int(both.sum())

    def perplexity(self, which: int) -> float:
        """exp of the mean nll of model 0 (original) or 1 (quantized); NaN when any of its rows is not finite."""
        if not self.tokens or self.nonfinite[which]:
            return math.nan
        mean = self.nll[which] / self.tokens
        return math.exp(mean) if mean < 700 else math.inf

    def divergence(self) -> tuple[float, float]:
        """Mean and 99th percentile of KL(original ‖ quantized) over the rows finite in both; NaN where there are
        none.
        """
        values = torch.cat(self.kl) if self.kl else torch.zeros(0)
        return (float(values.double().mean()), self.kl_at(0.99)) if len(values) else (math.nan, math.nan)

    def kl_at(self, share: float) -> float:
        """The KL that this share of the positions does not exceed: 0.5 is the median, 1 the largest."""
        values = torch.cat(self.kl).double().sort().values if self.kl else torch.zeros(0)
        if not len(values):
            return math.nan
        place = share * (len(values) - 1)  # between two positions, as torch.quantile, which takes no more than 2^24
        low = int(place)
        high = min(low + 1, len(values) - 1)
        return float(values[low] + (values[high] - values[low]) * (place - low))

    def spread(self) -> Spread:
        """How far the figures would move with other rows: the rows drawn again with repetition, RESAMPLES times."""
        none = (math.nan, math.nan)
        texts = [t for t in self.texts if t.tokens]
        if not self.whole:
            return Spread(none, none, none)
        draw, ratios, kls, agrees = random.Random(0), [], [], []
        for _again in range(RESAMPLES):
            tokens, before, after, kl, compared, agree = map(sum, zip(*draw.choices(texts, k=len(texts)), strict=True))
            ratios.append(math.exp(min((after - before) / tokens, 700)))
            kls.append(kl / compared)
            agrees.append(agree / compared)
        return Spread(*(_middle(values) for values in (ratios, kls, agrees)))

    @property
    def whole(self) -> bool:
        """Whether there are rows enough for a spread, and none with NaN or Inf."""
        return len([t for t in self.texts if t.tokens]) >= LEAST_ROWS and not any(self.nonfinite)

    def entropy(self, which: int) -> float:
        """Mean entropy of a model's next-token distributions over its finite rows; NaN where there are none."""
        finite = self.tokens - self.nonfinite[which]
        return self.entropies[which] / finite if finite else math.nan

    def one_choice(self, which: int) -> tuple[int, float]:
        """(token, share of its finite rows) that a model ranks first most often; (0, NaN) where there are none."""
        commonest = self.choices[which].most_common(1)
        return (commonest[0][0], commonest[0][1] / self.choices[which].total()) if commonest else (0, math.nan)

    def agreement(self) -> float:
        """Share of rows in which both models rank the same token first; NaN where no row is finite in both."""
        return self.agree / self.compared if self.compared else math.nan


def apart(one: Tally, other: Tally) -> Apart:
    """`other` minus `one`, perplexity divided; both against one original on the same rows.

    The rows are drawn once for both (a paired bootstrap): a hard row is hard for both models, so what they share drops
    out, and a difference far below the spread of either can be seen.
    """
    pairs = [(a, b) for a, b in zip(one.texts, other.texts, strict=True) if a.tokens]
    none = (math.nan, math.nan)
    if any(one.nonfinite) or any(other.nonfinite) or not pairs:
        return Apart(math.nan, none, math.nan, none, math.nan, none)
    found = _apart(pairs)
    if len(pairs) < LEAST_ROWS:
        return Apart(found[0], none, found[1], none, found[2], none)
    draw = random.Random(0)
    drawn = [_apart(draw.choices(pairs, k=len(pairs))) for _again in range(RESAMPLES)]
    kl, ratio, top1 = (_middle(list(values)) for values in zip(*drawn, strict=True))
    return Apart(found[0], kl, found[1], ratio, found[2], top1)


def _apart(pairs: list[tuple[TextSums, TextSums]]) -> tuple[float, float, float]:
    tokens, compared = sum(a.tokens for a, _b in pairs), sum(a.compared for a, _b in pairs)
    worse = sum(b.nll_quantized - a.nll_quantized for a, b in pairs) / tokens
    return (
        sum(b.kl - a.kl for a, b in pairs) / compared,
        math.exp(max(min(worse, 700), -700)),
        sum(b.agree - a.agree for a, b in pairs) / compared,
    )


def _middle(values: list[float]) -> tuple[float, float]:
    """The span that leaves out 2.5 % at either end."""
    values = sorted(values)
    cut = round(0.025 * len(values))
    return values[cut], values[-1 - cut]


def longest_run(tokens: Sequence[int]) -> int:
    """Most times that one token stands in a row."""
    best = run = 0
    for i, token in enumerate(tokens):
        run = run + 1 if i and token == tokens[i - 1] else 1
        best = max(best, run)
    return best
