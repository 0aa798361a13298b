"""Several quantized models against the one they were made from: which is closest to it, and by more than chance?

All run over the same rows, one decoder layer of each in memory at a time, and the original once for all. Differences
come from the same resamplings of the rows for both (a paired bootstrap), so they are seen long before the spreads of
the two models part.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import DoctorError
from doctor.core.host import describe
from doctor.core.messages import _
from doctor.core.recipe import Recipe
from doctor.evaluate.compare import Streamed, scored, streamed_pair, walk
from doctor.evaluate.inputs import fitting, quiet, text_rows
from doctor.evaluate.own_measure import kind_of
from doctor.evaluate.ranking_report import Contender, Difference, Ranking
from doctor.evaluate.scores import Tally, apart
from doctor.evaluate.verify import CONTEXT, ROWS
from doctor.model.quantization_config import stored_recipe
from doctor.quant.device import device_memory, device_of
from doctor.quant.ending import run_figures
from doctor.scan.header import header_facts
from doctor.scan.summary import summary


def rank(
    quantized: Sequence[str | os.PathLike[str] | Checkpoint],
    original: str | os.PathLike[str] | Checkpoint,
    *,
    text: str | os.PathLike[str] | None = None,
    context: int = CONTEXT,
    rows: int = ROWS,
    device: str = "auto",
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> Ranking:
    """Compare quantized models of one original on rows of `context` tokens; they do not overlap.

    text: a .txt, .jsonl or .parquet file; None takes the text of `verify`. progress gets a phase ("compare", "score"),
    how much of it is done and how much there is. Raises DoctorError, BadCheckpoint, NotQuantizable, MachineError.
    """
    started = time.perf_counter()
    device = device_of(device)
    source = original if isinstance(original, Checkpoint) else Checkpoint.open(original)
    others = [q if isinstance(q, Checkpoint) else Checkpoint.open(q) for q in quantized]
    paths = [str(q.root if isinstance(q, Checkpoint) else q) for q in quantized]
    if kind_of(source):
        raise DoctorError(
            _("{name}: has no next-token logits to compare.", name=source.name),
            _("`doctor verify` compares embeddings and scores, one model at a time."),
        )
    context = fitting(source, context)
    ids, _tokenizer, said = text_rows(source, text, rows, context)
    with quiet(), device_memory(device):
        first, *rest = _streams(source, others, ids, device)
        walk((first, *rest), partial(progress, "compare"))
        tallies = [Tally() for _model in rest]
        for row, last, (follows, before, *after) in scored(ids, first, *rest):
            for tally, logits in zip(tallies, after, strict=True):
                tally.add(before, logits, follows, row)
            if last:
                progress("score", row + 1, len(ids))
    names = _told_apart(paths)
    found = [_contender(*x, source) for x in zip(names, paths, others, tallies, strict=True)]
    order = sorted(range(len(found)), key=lambda i: (not math.isfinite(found[i].kl), found[i].kl))
    best = order[0]
    pairs = [(found[i].name, apart(tallies[best], tallies[i])) for i in order[1:]]
    return Ranking(
        source.name,
        run_figures(source, source)["source_bytes"],
        tallies[best].perplexity(0),
        said,
        len(ids),
        context,
        tallies[best].tokens,
        [found[i] for i in order],
        [Difference(name, d, d.kl_span[0] > 0 or d.kl_span[1] < 0) for name, d in pairs],
        time.perf_counter() - started,
        describe(),
    )


def _streams(source: Checkpoint, others: list[Checkpoint], ids: list[Any], device: str) -> list[Streamed]:
    """The original and each model, held once."""
    first, second = streamed_pair(source, others[0], ids, device)
    return [first, second, *(streamed_pair(source, other, ids, device, first)[1] for other in others[1:])]


def _contender(name: str, path: str, checkpoint: Checkpoint, tally: Tally, source: Checkpoint) -> Contender:
    recipe = stored_recipe(checkpoint, Recipe())
    kept, sizes = summary(checkpoint, header_facts(checkpoint, recipe)), run_figures(source, checkpoint)
    spread = tally.spread()
    mean, p99 = tally.divergence()
    before, after = tally.perplexity(0), tally.perplexity(1)
    broken = bool(tally.nonfinite[1])  # what is not finite is not left out of a mean
    return Contender(
        name,
        path,
        kept["stored"] or str(kept["dtype"]).lower(),
        sizes["output_bytes"],
        sizes["bits"],
        math.nan if broken else mean,
        spread.kl,
        math.nan if broken else p99,
        after,
        after / before if before > 0 else math.nan,
        spread.ratio,
        math.nan if broken else tally.agreement(),
        spread.top1,
        tally.nonfinite[1],
    )


def _told_apart(paths: Sequence[str]) -> list[str]:
    """The last part of each path, or the whole where two are the same."""
    short = [os.path.basename(os.path.normpath(path)) for path in paths]
    return short if len(set(short)) == len(short) else list(paths)
