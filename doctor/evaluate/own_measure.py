"""Models without next-token logits against their originals, by their own measure: embeddings by cosine, scores by
correlation, and models of an encoder and a decoder by the decoder's last hidden states (encoder_decoder.py).

An embedding model's last hidden states are compared token by token, and their mean over a row: whichever way an engine
pools them (the last token, the first, the mean), it takes one of these. A reward model's scores are those of the last
token of each row, by its `score` head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial

import torch

from doctor.checkpoint.directory import Checkpoint
from doctor.core.records import OwnMeasure
from doctor.evaluate.compare import streamed_pair, walk
from doctor.evaluate.encoder_decoder import KIND, decoder_states, is_encoder_decoder
from doctor.quant.forward.prefetch import load_tensor

SCORE = "score.weight"


def kind_of(checkpoint: Checkpoint) -> str:
    """ "score", "embedding" or "sequence" for a model that is compared so, by config.json; "" for the rest."""
    config = checkpoint.value("config.json") or {}
    if is_encoder_decoder(checkpoint):
        return KIND
    name = str(next(iter(config.get("architectures") or []), ""))
    if SCORE in checkpoint.tensors and name.endswith("ForSequenceClassification"):
        return "score"
    return "embedding" if name.endswith("Model") and not name.endswith("LMHeadModel") else ""


def compare_own(
    original: Checkpoint,
    quantized: Checkpoint,
    rows: list[torch.Tensor],
    kind: str,
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
    device: str = "cpu",
) -> OwnMeasure:
    """Two checkpoints of one model on rows int64[1, length]. Raises NotQuantizable where they are not one model."""
    pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]
    if kind == KIND:
        pairs = decoder_states(original, quantized, rows, partial(progress, "compare"), device)
    else:
        a, b = streamed_pair(original, quantized, rows, device)
        walk((a, b), partial(progress, "compare"))
        pairs = zip(a.states(), b.states(), strict=True)
    tokens, pooled, scores = [], [], ([], [])  # type: ignore[var-annotated]
    nonfinite = [0, 0]
    heads = [load_tensor(c, SCORE, torch.float32).to(device) for c in (original, quantized)] if kind == "score" else []
    for left, right in pairs:
        for which, states in enumerate((left, right)):
            nonfinite[which] += int((~torch.isfinite(states).all(-1)).sum())
            if heads:
                scores[which].append(states[-1] @ heads[which].T)
        tokens.append(torch.cosine_similarity(left.double(), right.double(), dim=-1))
        pooled.append(torch.cosine_similarity(left.double().mean(0), right.double().mean(0), dim=-1))
    every = torch.cat(tokens)
    correlation, apart = _scores(*map(torch.stack, scores)) if heads else (math.nan, math.nan)
    return OwnMeasure(
        kind,
        rows=len(rows),
        tokens=every.numel(),
        cosine=float(every.mean()),
        cosine_least=float(every.min()),
        cosine_pooled=float(torch.stack(pooled).mean()),
        nonfinite_original=nonfinite[0],
        nonfinite_quantized=nonfinite[1],
        score_correlation=correlation,
        score_apart=apart,
    )


def _scores(left: torch.Tensor, right: torch.Tensor) -> tuple[float, float]:
    """(correlation of scores [rows, labels], their mean distance as a share of the original's standard deviation)."""
    x, y = left.double().flatten(), right.double().flatten()
    spread = x.std()
    dx, dy = x - x.mean(), y - y.mean()
    return float((dx @ dy) / (dx.norm() * dy.norm())), float((x - y).abs().mean() / spread)
