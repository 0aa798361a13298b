"""How far two models' next-token distributions are apart, and whether a reply has collapsed: pure functions of logits
and tokens.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

CHUNK_ROWS = 256  # rows of logits worked on at once: 256 × 152k × 4 B = 156 MB at the widest vocabulary in use


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

    def add(self, original: torch.Tensor, quantized: torch.Tensor, targets: torch.Tensor) -> None:
        """Logits [rows, vocabulary] of both models for the same positions, and the token ids [rows] that really follow.

        Where the vocabularies were padded to different widths, the columns both have are compared.
        """
        width = min(original.shape[1], quantized.shape[1])
        for at in range(0, len(targets), CHUNK_ROWS):
            part = slice(at, at + CHUNK_ROWS)
            self._add(
                original[part, :width].float(), quantized[part, :width].float(), targets[part].to(original.device)
            )

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
        self.kl.append((logs[0].exp() * (logs[0] - logs[1])).sum(1)[both])
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
        if not len(values):
            return math.nan, math.nan
        return float(values.double().mean()), float(values.double().quantile(0.99))

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


def longest_run(tokens: Sequence[int]) -> int:
    """Most times that one token stands in a row."""
    best = run = 0
    for i, token in enumerate(tokens):
        run = run + 1 if i and token == tokens[i - 1] else 1
        best = max(best, run)
    return best
