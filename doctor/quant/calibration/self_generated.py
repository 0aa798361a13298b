"""Text that the model itself writes, to calibrate on where none was given: it is of the languages and kinds that the
model was trained on.

Sampled at temperature 1 in short pieces, all at once with a key/value cache, with the whole model in memory; so only
where it fits there and takes seconds. The seed decides the text; another number of threads may round a probability
otherwise and write another one.

Source: Williams, Chrysostomou and Aletras, Self-calibration for Language Model Quantization and Pruning, arXiv
2410.17170.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import NotQuantizable
from doctor.core.messages import _
from doctor.model.spec import ModelSpec
from doctor.quant import budget
from doctor.quant.calibration.rows import NotSampled
from doctor.quant.forward.skeleton import Skeleton
from doctor.quant.forward.text_model import cache_argument

# tokens of a piece: a step costs one pass over the weights, so many short pieces are cheaper than a few long ones
PIECE = 64
# Most tokens x parameters, and most parameters for the one row that is always worth it. On one core of a busy server a
# step of SmolLM2-135M took 0.28 processor seconds for 16 pieces and 0.69 for 64: 2 rows of 512 tokens in about 18 s.
WORK = {"cpu": 1.5e11, "cuda": 1e14}
MOST_PARAMETERS = {"cpu": 1.5e9, "cuda": 1e11}
# Where the tokenizer has no BOS: how texts begin, in several languages and kinds. The first id of each starts a piece.
OPENINGS = (
    "The",
    "In",
    "I",
    "A",
    "How",
    "What",
    "import",
    "def",
    "#",
    "1",
    "{",
    "<",
    "这",
    "在",
    "El",
    "Le",
    "Der",
    "В",  # noqa: RUF001
    "の",
    "ال",
)


def unable(reason: str, *args) -> list[list[int]]:
    """A sampler where there can be none."""
    raise NotSampled(reason)


class Once:
    """A sampler that keeps what it gave, pieces or the reason for none: a run that is resumed takes `said`, whatever
    memory is free by then.
    """

    def __init__(self, sample: Callable, said: dict | None):
        self._sample, self.said = sample, said

    def __call__(self, tokenizer, rows: int, length: int) -> list[list[int]]:
        if self.said is None:
            try:
                self.said = {"pieces": self._sample(tokenizer, rows, length)}
            except NotSampled as error:
                self.said = {"reason": error.args[0]}
        if "reason" in self.said:
            raise NotSampled(self.said["reason"])
        return self.said["pieces"]


def sampler(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    *,
    seed: int,
    memory: int | None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Callable:
    """A function (tokenizer, rows, length) -> pieces of ids, for `rows` rows or as many as are cheap. It raises
    NotSampled.
    """

    def sample(tokenizer, rows: int, length: int) -> list[list[int]]:
        cost = forecast(checkpoint, spec, rows, length, memory=memory, device=device, dtype=dtype)
        try:
            skeleton = Skeleton(checkpoint, spec, device, dtype)
            skeleton.load_whole()
            return _pieces(
                skeleton.model, _starts(tokenizer, cost.pieces, spec.vocab), cost.size, tokenizer.eos_token_id, seed
            )
        except (
            NotQuantizable,
            RuntimeError,
            ValueError,
            IndexError,
            TypeError,
        ) as error:  # the run that follows will name the cause
            raise NotSampled(_("the model does not run: {error}", error=type(error).__name__)) from error

    return sample


class Cost(NamedTuple):
    """What sampling takes: rows that it gives, pieces of `size` tokens for them, bytes of memory."""

    rows: int
    pieces: int
    size: int
    bytes: int


def forecast(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    rows: int,
    length: int,
    *,
    memory: int | None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Cost:
    """From headers alone. Raises NotSampled where the model is too large to be run whole."""
    parameters = sum(t.numel for t in checkpoint.tensors.values())
    kind = "cuda" if torch.device(device).type == "cuda" else "cpu"
    if parameters > MOST_PARAMETERS[kind]:
        raise NotSampled(_("{count:.1f} B parameters would take minutes on this device", count=parameters / 1e9))
    rows = min(rows, max(1, int(WORK[kind] / parameters / length)))
    size = min(PIECE, length)
    pieces = -(-rows * length * 5 // (size * 4))  # a quarter more: pieces end early where the model ends its text
    need = _bytes(spec, parameters, pieces, size, dtype)
    limit = torch.cuda.mem_get_info(torch.device(device))[0] if kind == "cuda" else budget.limit(memory)
    if need > limit:
        raise NotSampled(
            _(
                "the whole model takes {need:.1f} GiB, {limit:.1f} GiB are allowed",
                need=need / 2**30,
                limit=limit / 2**30,
            )
        )
    return Cost(rows, pieces, size, need)


def _bytes(spec: ModelSpec, parameters: int, pieces: int, size: int, dtype: torch.dtype) -> int:
    """Weights, keys and values (as wide as hidden at most), logits with what sampling makes of them."""
    hidden, vocab = spec.hidden or 0, spec.vocab or 0
    cache = 2 * (spec.n_layers or 0) * hidden * pieces * size
    return budget.constant() + dtype.itemsize * (parameters + cache) + 12 * pieces * vocab


def _starts(tokenizer, count: int, vocab: int | None) -> list[int]:
    """First ids of `count` pieces: BOS, or those of OPENINGS in turn."""
    bos = tokenizer.bos_token_id
    found = (
        [bos]
        if bos is not None
        else list(
            dict.fromkeys(
                ids[0]
                for text in OPENINGS
                if (ids := tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
            )
        )
    )
    found = [token for token in found if vocab is None or token < vocab]
    if not found:
        raise NotSampled(_("the tokenizer has no token to start with"))
    return [found[i % len(found)] for i in range(count)]


@torch.no_grad()
def _pieces(model, starts: list[int], size: int, end: int | None, seed: int) -> list[list[int]]:
    """`size` sampled ids after each start, without the start, and up to the end-of-sequence token. Raises
    NotSampled.
    """
    generator = torch.Generator().manual_seed(seed)
    name = cache_argument(model)
    device = next(model.parameters()).device
    ids, cache, said = torch.tensor(starts)[:, None], None, []
    for _step in range(size):
        out = model(input_ids=ids.to(device), use_cache=True, logits_to_keep=1, **{name: cache})
        logits, cache = out.logits[:, -1].float().cpu(), getattr(out, name, None)
        if not torch.isfinite(logits).all():
            raise NotSampled(_("its logits are not finite"))
        if cache is None:
            raise NotSampled(_("{model} has no key/value cache", model=type(model).__name__))
        ids = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        said.append(ids)
    rows = torch.cat(said, 1).tolist()
    pieces = [row[: row.index(end)] if end in row else row for row in rows]
    return [piece for piece in pieces if piece]
