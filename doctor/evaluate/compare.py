"""Two checkpoints on the same text, one decoder block of each in memory at a time, and their greedy replies.

Both are read as floats (a quantized one through quant/dequant.py, as engines read it) and run by the same code in
float32, so a difference is a difference of weights. Activations of both are kept; how far they have parted is the error
after each block. That error is carried along, and late blocks amplify it, so it does not name the block it came from.
The error of one block alone does: the quantized block given what the original gives its own, for which a few rows are
enough.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import nullcontext
from functools import partial

import torch

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import NotQuantizable
from doctor.core.messages import _
from doctor.core.records import Comparison
from doctor.evaluate.fp16_range import Fp16RangeProbe
from doctor.evaluate.routing import agreement, choices_of, has_experts
from doctor.evaluate.scores import Tally, longest_run
from doctor.evaluate.served_inputs import round_inputs
from doctor.model.same_model import require_same_model
from doctor.model.spec import build_spec
from doctor.quant.dequantize import as_float
from doctor.quant.forward.passing import passed_layers
from doctor.quant.forward.skeleton import Skeleton
from doctor.quant.forward.text_model import cache_argument

REPLY_TOKENS = 24
HEAD_TOKENS = 128  # positions whose logits are held at once, of both models
# of the text; one more pass over them costs a twenty-fourth of a comparison on 24 rows, a fifth of one on a single row
ALONE_ROWS = 2


class Streamed:
    """One checkpoint run over rows of ids int64[1, length], block by block. `hidden` are the current activations, one
    per row; `chosen` the experts that the last block's tokens chose (routing.choices_of).
    """

    def __init__(self, checkpoint: Checkpoint, rows: list[torch.Tensor], device: str = "cpu"):
        self.checkpoint = as_float(checkpoint)
        self.spec = build_spec(self.checkpoint.value("config.json") or {}, self.checkpoint.tensors)
        self.skeleton = Skeleton(self.checkpoint, self.spec, device)
        self.rounded_inputs = round_inputs(checkpoint, self.skeleton)
        self.rows = rows
        self.hidden, self.calls = [], []
        self.chosen: list[torch.Tensor] = []
        for hidden, calls in self.skeleton.open_calls(rows):
            self.hidden.append(hidden)
            self.calls.append(calls)

    @torch.no_grad()
    def step(
        self, i: int, probe: Fp16RangeProbe | None = None, given: Sequence[torch.Tensor] = ()
    ) -> list[torch.Tensor]:
        """Run block i over all rows, with a probe looking on. Returns what it makes of other activations given to it
        for the first rows.
        """
        self.skeleton.load_layer(i)
        alone = [
            self.skeleton.run_layer(i, x, calls[i], carry=False) for x, calls in zip(given, self.calls, strict=False)
        ]
        with probe.watch(i) if probe else nullcontext(), choices_of(self.skeleton.layers[i]) as self.chosen:
            for r, calls in enumerate(self.calls):
                self.hidden[r] = self.skeleton.run_layer(i, self.hidden[r], calls[i])
        if probe:
            probe.leave(i, self.hidden)
            probe.round(i)
        self.skeleton.drop_layer(i)
        return alone

    def logits(
        self, rows: list[torch.Tensor] | None = None, states: list[torch.Tensor] | None = None
    ) -> Generator[torch.Tensor, None, None]:
        """Logits f32[length, vocabulary] of every row, after the last block; or of other rows with their hidden
        states.
        """
        self.skeleton.load_ends()
        model = self.skeleton.model
        yield from self._ending(lambda ids: model(input_ids=ids, use_cache=False).logits, rows, states)

    @torch.no_grad()
    def logit_parts(self) -> Generator[tuple[int, int, torch.Tensor], None, None]:
        """(row, first position, logits f32[HEAD_TOKENS or fewer, vocabulary]) of every row in order, after the last
        block: a row of 512 tokens has 0.5 GB of logits where the vocabulary has 262,144.
        """
        self.skeleton.load_ends()
        model, device = self.skeleton.model, self.skeleton.device
        with passed_layers(self.skeleton) as give:
            for row, (ids, hidden) in enumerate(zip(self.rows, self.hidden, strict=True)):
                give(hidden)
                length = ids.shape[1]
                for at in range(0, length, HEAD_TOKENS):
                    keep = torch.arange(at, min(at + HEAD_TOKENS, length), device=device)
                    found = model(input_ids=ids.to(device), use_cache=False, logits_to_keep=keep).logits[0]
                    # a model that does not know logits_to_keep gives all of them
                    yield row, at, (found if len(found) == len(keep) else found[keep]).float()

    def states(self) -> Generator[torch.Tensor, None, None]:
        """Last hidden states f32[length, hidden] of every row, after the last block and what the model does behind."""
        self.skeleton.load_base()
        base = self.skeleton.base
        yield from self._ending(lambda ids: base(input_ids=ids, use_cache=False).last_hidden_state, None, None)

    @torch.no_grad()
    def _ending(
        self,
        run: Callable[[torch.Tensor], torch.Tensor],
        rows: list[torch.Tensor] | None,
        states: list[torch.Tensor] | None,
    ) -> Generator[torch.Tensor, None, None]:
        """What a forward gives for every row, with its hidden states in the place of the blocks' outputs."""
        with passed_layers(self.skeleton) as give:
            for ids, hidden in zip(rows or self.rows, states or self.hidden, strict=True):
                give(hidden)
                yield run(ids.to(self.skeleton.device))[0].float()

    @property
    def resident_bytes(self) -> int:
        """What the whole model takes in float32."""
        return 4 * sum(info.numel for info in self.checkpoint.tensors.values())

    @torch.no_grad()
    def reply(
        self,
        prompts: list[torch.Tensor],
        tokens: int = REPLY_TOKENS,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[list[int]]:
        """Greedy continuations of prompts int64[1, length]; loads every block, so ask `resident_bytes` first.

        All in step, one position after the other: a reply begins where its own prompt ends, while longer prompts are
        still read. So nothing is padded, and a step reads the weights once for all.
        """
        if not prompts:
            return []
        self.skeleton.load_whole()
        model = self.skeleton.model
        name = cache_argument(model)
        at, cache = min(ids.shape[1] for ids in prompts), None
        first, last = at, max(ids.shape[1] for ids in prompts) + tokens
        ids = torch.cat([ids[:, :at] for ids in prompts]).to(self.skeleton.device)
        replies: list[list[int]] = [[] for _ in prompts]
        while any(len(said) < tokens for said in replies):
            out = model(input_ids=ids, use_cache=True, logits_to_keep=1, **{name: cache})
            ids, cache = out.logits[:, -1].argmax(-1, keepdim=True), getattr(out, name)
            for row, (prompt, said) in enumerate(zip(prompts, replies, strict=True)):
                if at < prompt.shape[1]:
                    ids[row, 0] = prompt[0, at]
                elif len(said) < tokens:
                    said.append(int(ids[row, 0]))
            at += 1
            progress(at - first, last - first)
        for i in range(len(self.skeleton.layers)):
            self.skeleton.drop_layer(i)
        return replies


def walk(models: Sequence[Streamed], progress: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Take models of one depth through their decoder layers, layer by layer."""
    count = len(models[0].skeleton.layers)
    for i in range(count):
        for model in models:
            model.step(i)
        progress(i + 1, count)


def streamed_pair(
    original: Checkpoint,
    quantized: Checkpoint,
    rows: list[torch.Tensor],
    device: str,
    held: Streamed | None = None,
) -> tuple[Streamed, Streamed]:
    """Both checkpoints on rows int64[1, length]; held: the original, where it is open already. Raises NotQuantizable
    where they cannot be one model, or do not have the same number of layers.
    """
    require_same_model(original, quantized)
    a, b = held or Streamed(original, rows, device), Streamed(quantized, rows, device)
    n, m = len(a.skeleton.layers), len(b.skeleton.layers)
    if n != m:
        raise NotQuantizable(
            _(
                "{original} has {n} decoder layers, {quantized} has {m}: not the same model.",
                original=original.name,
                n=n,
                quantized=quantized.name,
                m=m,
            )
        )
    return a, b


def scored(
    rows: list[torch.Tensor], *models: Streamed
) -> Generator[tuple[int, bool, tuple[torch.Tensor, ...]], None, None]:
    """(row, whether it is the row's last part, (the ids that follow int64[n], each model's logits f32[n, vocabulary]))
    of every part of every row, after the last block.
    """
    for parts in zip(*(model.logit_parts() for model in models), strict=True):
        row, at, logits = parts[0]
        follows = rows[row][0, at + 1 : at + 1 + len(logits)]  # none follows a row's last token
        last = at + len(logits) >= rows[row].shape[1]
        yield row, last, (follows, *(found[: len(follows)] for _row, _at, found in parts))


def compare(
    original: Checkpoint,
    quantized: Checkpoint,
    rows: list[torch.Tensor],
    prompts: list[torch.Tensor],
    decode: Callable[[list[int]], str],
    memory: int,
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
    device: str = "cpu",
    logprobs: list[torch.Tensor] | None = None,
) -> Comparison:
    """Comparison of two checkpoints of one model on rows int64[1, length]; replies to prompts where the model fits
    `memory` bytes of the device.

    logprobs: gets f32[length - 1] for each row, what the quantized model gives the tokens that follow. progress gets
    ("compare", blocks done, blocks), then ("score", rows done, rows), then ("reply", tokens done, tokens). Raises
    NotQuantizable where the two do not have the same number of blocks.
    """
    a, b = streamed_pair(original, quantized, rows, device)
    blocks = len(a.skeleton.layers)
    errors, own, probe = [], [], Fp16RangeProbe(a.skeleton, rows, a.hidden, a.calls)
    same: dict[int, float] = {}
    unseen = 0
    for i in range(blocks):
        first = a.hidden[:ALONE_ROWS]
        a.step(i, probe)
        alone = b.step(i, given=first)
        own.append(_own_error(first, a.hidden, alone))
        errors.append(_distance(a.hidden, b.hidden))
        if a.chosen:
            same[i] = agreement(a.chosen, b.chosen)
        unseen += not a.chosen and has_experts(a.skeleton.layers[i])
        progress("compare", i + 1, blocks)
    tally = Tally()
    given: list[list[torch.Tensor]] = [[] for _ in rows]
    for row, whole, (follows, left, right) in scored(rows, a, b):
        tally.add(left, right, follows, row)
        if logprobs is not None:
            taken = torch.log_softmax(right, 1).gather(1, follows[:, None].to(right.device))
            given[row].append(taken[:, 0].cpu())
        if whole:
            progress("score", row + 1, len(rows))
    if logprobs is not None:
        logprobs += [torch.cat(parts) for parts in given]
    half = probe.result(a.hidden[: len(probe.rows)], a.logits)
    (mean, p99), spread = tally.divergence(), tally.spread()
    fitting = [m.resident_bytes <= memory for m in (a, b)]
    said: list[list[list[int]]] = []
    for m, fits in zip((a, b), fitting, strict=True):
        before = sum(fitting[: len(said)])
        tick = partial(_reply_progress, progress, before, sum(fitting))
        said.append(m.reply(prompts, progress=tick) if fits else [])
    (_token, usual), (favourite, share) = tally.one_choice(0), tally.one_choice(1)
    zeros, runs = zip(*(_collapse(replies) for replies in said), strict=True)
    return Comparison(
        tokens=tally.tokens,
        context=max(r.shape[1] for r in rows),
        perplexity_original=tally.perplexity(0),
        perplexity_quantized=tally.perplexity(1),
        kl_mean=mean,
        kl_p99=p99,
        top1_agreement=tally.agreement(),
        nonfinite_original=tally.nonfinite[0],
        nonfinite_quantized=tally.nonfinite[1],
        token0_share=zeros[1],
        token0_share_original=zeros[0],
        longest_repeat=runs[1],
        longest_repeat_original=runs[0],
        generated=sum(map(len, said[1])),
        replies=tuple((decode(p[0].tolist()), decode(x), decode(y)) for p, x, y in zip(prompts, *said, strict=False)),
        block_errors=tuple(errors),
        own_errors=tuple(own),
        half=half,
        entropy_original=tally.entropy(0),
        entropy_quantized=tally.entropy(1),
        one_choice=share,
        one_choice_original=usual,
        one_choice_token=favourite,
        kl_median=tally.kl_at(0.5),
        kl_p999=tally.kl_at(0.999),
        kl_max=tally.kl_at(1.0),
        ratio_span=spread.ratio,
        kl_span=spread.kl,
        top1_span=spread.top1,
        same_experts=tuple(same.items()),
        experts_unseen=unseen,
        rounded_inputs=b.rounded_inputs,
    )


def _reply_progress(tell: Callable[[str, int, int], None], before: int, models: int, done: int, total: int) -> None:
    """Tokens of one of `models` replies, of which `before` are written, as a part of all."""
    tell("reply", before * total + done, models * total)


def _collapse(replies: list[list[int]]) -> tuple[float, int]:
    """(share of token 0, most times that one token stands in a row) of a model's replies; 0 without replies."""
    tokens = [t for reply in replies for t in reply]
    return tokens.count(0) / max(len(tokens), 1), max(map(longest_run, replies), default=0)


def _distance(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    """Relative root-mean-square difference of two sets of activations."""
    off = sum(float((y - x).double().square().sum()) for x, y in zip(left, right, strict=True))
    size = sum(float(x.double().square().sum()) for x in left)
    return (off / size) ** 0.5 if size > 0 else float("nan")


def _own_error(given: list[torch.Tensor], right: list[torch.Tensor], alone: list[torch.Tensor]) -> float:
    """How far what a quantized block adds to its input is from what the original adds to the same, token by token, on
    average.

    Against what the block adds, not its output: the residual stream that passes through a block hides a wrong one (with
    the down_proj of SmolLM2-135M's block 12 taken from block 20 the output is off by 1.4 percent, what is added by 74,
    and a healthy last block's output by 15). Token by token, because one token's massive activation outweighs all
    others together.
    """
    shares = []
    for x, y, z in zip(given, right, alone, strict=False):
        off, added = ((p - q).double().norm(dim=-1).flatten() for p, q in ((z, y), (y, x)))
        shares.append((off / added)[added != 0])  # a token to which the original adds nothing has no share
    found = torch.cat(shares)
    return float(found.mean()) if found.numel() else float("nan")
