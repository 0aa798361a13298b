"""What a run asks tuning to do, and what that takes in memory and work: from flags and headers alone, without torch.

`auto` takes about what the layers took: first layer by layer, which gains most for its work, then from end to end on
as many rows as are left of that. It is counted in multiplications and not in seconds, so that two runs, and one that
was interrupted, train on the same rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import MachineError, NotQuantizable, PlanRefused
from doctor.core.messages import Message, _
from doctor.core.recipe import Recipe, is_kept
from doctor.core.records import CalibrationFacts
from doctor.formats.known import streams
from doctor.formats.registry import format_of
from doctor.model.spec import ModelSpec
from doctor.quant import budget

AUTO, OFF = "auto", "off"
ARGUMENTS = _("Give the quantized checkpoint first and its original with --to.")
LEAST_ROWS, LEAST_TOKENS = 16, 8192  # calibration rows and tokens of fewer are not worth it unasked
LEAST_TRAINED = 16  # rows
WATCHED = 8  # rows between the calibration rows
LOOKS = 4  # at the watched rows: before, after the layers by themselves, half way and at the end
ROWS_A_STEP = 2
LAYER_STEPS, LAYER_ROWS = 12, 4  # of the tuning layer by layer, and rows of each at most
LENGTH = 256  # tokens of a trained row: twice as many in as many steps of Adam lower the divergence hardly further
TOKENS = 64  # whose logits are made at a time
# Work in products of a token and a weight. Of the layers' run: computing their outputs, and Hessians for about half as
# much; a solved linear takes some 8 n k². Of a row: the original's outputs, and those of the tuned layers; of a row in
# a layer's step forward, and back with two products; of one that is trained on from end to end forward, forward again,
# back, and the head thrice. Measured on SmolLM2, one thread: 2.1 s a calibration row and 25 s for the solves; 9 s a row
# from end to end.
_CALIBRATING, SOLVING = 1.5, 8
_ROW, _LAYERWISE, _TRAINING, _TRAINING_HEAD = 2, 3, 4, 3
LEVEL_BITS = 8  # a code less its zero point takes one byte below, two from here on
_ABOUT = 1.25  # of the layers' work is "about what they took"


@dataclass(frozen=True)
class Wanted:
    """What is asked for. rows: to train on, 0 for none; through: so many of them from end to end as well, after each
    layer by itself; a_step: rows of a layer's step; asked: they were asked for, and must be. reason: why none.
    """

    rows: int
    through: int = 0
    a_step: int = LAYER_ROWS
    asked: bool = False
    reason: str | Message = ""


class Cost(NamedTuple):
    """What tuning takes; zeros where it would not be done. rows: that it trains on. peak: bytes, at most, under the
    limit of a run. least: bytes without codes, which are then read anew for each pass; most: with all of them held, as
    a GPU does where it can.
    """

    rows: int = 0
    peak: int = 0
    least: int = 0
    most: int = 0


def no_scales(checkpoint: Checkpoint) -> NotQuantizable:
    """Why a checkpoint of plain floats is not tuned."""
    return NotQuantizable(
        _("{checkpoint}: holds no packed linears, so there are no scales to tune.", checkpoint=checkpoint.name),
        ARGUMENTS,
    )


def refuse_tuning(tune: str | int, recipe: Recipe, rows: int) -> None:
    """Raises PlanRefused for rows that were asked for where a recipe has no scales to tune, and for more rows than
    calibrate, before any work.
    """
    if not isinstance(tune, int):
        return
    if not _has_scales(recipe):
        raise PlanRefused(
            _("--tune {rows}: {label} has no 16-bit scales of calibrated linears.", rows=tune, label=recipe.label()),
            _("GPTQ and AWQ into integer formats and GGUF can be tuned; leave --tune out."),
        )
    if tune > rows:
        raise PlanRefused(
            _("--tune {tune}: {rows} rows calibrate; must be as many at most.", tune=tune, rows=rows),
            _("Raise --rows, or lower --tune."),
        )


def require_memory(
    tune: str | int, checkpoint: Checkpoint, spec: ModelSpec, recipe: Recipe, rows: int, length: int, memory: int | None
) -> None:
    """Raises MachineError for rows that were asked for and do not fit in memory, before any work."""
    wish = wanted(tune, recipe, spec, rows, length)
    if wish.asked:
        takes, limit = need(checkpoint, spec, recipe, wish.rows, length), budget.limit(memory)
        if takes > limit:
            raise MachineError(short(wish.rows, takes, limit), _("Give --tune fewer rows or off, or more --memory."))


def short(rows: int, takes: int, limit: int) -> Message:
    """Rows that were asked for and do not fit."""
    return _(
        "--tune {rows}: it takes {need}, {limit} may be used.",
        rows=rows,
        need=budget.gib(takes),
        limit=budget.gib(limit),
    )


def _has_scales(recipe: Recipe) -> bool:
    """Whether a recipe gives linears that a calibrated method solved 16-bit scales of their own."""
    form = format_of(recipe)
    return recipe.calibrated and (form.affine or form.in_blocks) and not streams(recipe)


def require_text(tune: str | int, facts: CalibrationFacts | None) -> None:
    """Raises PlanRefused for rows that were asked for where images or sound calibrate, before the first layer."""
    if isinstance(tune, int) and facts and facts.seen_rows:
        raise PlanRefused(
            _("--tune {rows}: {n} rows with images or sound calibrate; must be text.", rows=tune, n=facts.seen_rows),
            _("Leave --tune out, or calibrate on text."),
        )


def wanted(
    tune: str | int, recipe: Recipe, spec: ModelSpec, rows: int, length: int, tokens: int = 0, seen_rows: int = 0
) -> Wanted:
    """How many of the calibration rows, of `length` tokens at most, a run trains on. tokens: of all of them, 0 where it
    is not known; seen_rows: those with images or sound.
    """
    if tune == OFF or not _has_scales(recipe):
        return Wanted(0)
    if isinstance(tune, int):
        return Wanted(min(tune, rows), min(tune, rows), asked=True)
    if seen_rows:
        return Wanted(0, reason=_("rows with images or sound calibrated it"))
    tokens = tokens or rows * length
    if rows < LEAST_ROWS or tokens < LEAST_TOKENS:
        return Wanted(
            0,
            reason=_(
                "{rows} rows of {tokens:,} tokens are too few; it takes {least} rows and {enough:,} tokens",
                rows=rows,
                tokens=tokens,
                least=LEAST_ROWS,
                enough=LEAST_TOKENS,
            ),
        )
    a_step = _rows_a_step(recipe, spec, rows, length)
    through = _affordable(recipe, spec, rows, length) if a_step == LAYER_ROWS else 0
    return Wanted(max(through, min(rows, LAYER_STEPS * a_step)), through, a_step)


def _rows_a_step(recipe: Recipe, spec: ModelSpec, rows: int, length: int) -> int:
    """Rows of a layer's step: as many as the layers' own work pays for, 1 at least."""
    work = sum(layers_work(recipe, spec, rows * length))
    sizes = (LAYER_ROWS, LAYER_ROWS // 2)
    return next(
        (n for n in sizes if sum(training_work(spec, min(rows, LAYER_STEPS * n), 0, length, n)) <= _ABOUT * work), 1
    )


def _affordable(recipe: Recipe, spec: ModelSpec, rows: int, length: int) -> int:
    """Of `rows` rows of `length` tokens, how many can be trained on from end to end in what is left of the layers' own
    work after the layers were tuned one by one; 0 below LEAST_TRAINED.
    """
    layers, one = (sum(training_work(spec, n, n, length)) for n in (0, 1))
    count = int((sum(layers_work(recipe, spec, rows * length)) - layers) / max(1, one - layers))
    return min(rows, count) if count >= LEAST_TRAINED else 0


def layers_work(recipe: Recipe, spec: ModelSpec, tokens: int) -> tuple[float, float]:
    """Products of the layers' run on so many calibration tokens: of outputs and Hessians, and of solving."""
    linears = (x for x in spec.linears if x.block is not None and not is_kept(recipe, x.name))
    solving = sum(x.out_features * x.in_features**2 for x in linears)
    return _CALIBRATING * _work(spec)[0] * tokens, SOLVING * solving


def training_work(
    spec: ModelSpec, rows: int, through: int, length: int, a_step: int = LAYER_ROWS
) -> tuple[float, float]:
    """Products of tuning on so many rows, `through` of them from end to end, cut from `length` tokens: of the rows that
    are watched, and of those that are trained on. a_step: rows of a layer's step.
    """
    body, head = _work(spec)
    length, compared = min(length, LENGTH), head / stride(spec)
    watching = WATCHED * length * ((_ROW + 1) * body + LOOKS * (body + 2 * compared))
    layers = (_ROW * rows + _LAYERWISE * LAYER_STEPS * a_step) * body
    return watching, length * (layers + through * (_TRAINING * body + _TRAINING_HEAD * compared))


def comparing_work(spec: ModelSpec, tokens: int) -> float:
    """Products of one model's outputs for so many tokens, logits included."""
    return tokens * float(sum(_work(spec)))


def stride(spec: ModelSpec) -> int:
    """The logits of one token in so many are compared: a head is not to take more work than the layers do."""
    body, head = _work(spec)
    return max(1, math.ceil(head / max(1, body)))


def _work(spec: ModelSpec) -> tuple[float, int]:
    """Products a token of the layers' linears, and of the head. An expert computes the share of the tokens that its
    router gives it on average.
    """
    linears = [x for x in spec.linears if x.block is not None]
    count, chosen = 1 + max((x.expert or 0 for x in linears), default=0), spec.lookup("num_experts_per_tok")
    share = min(1.0, chosen / count) if isinstance(chosen, int) and chosen > 0 else 1.0
    body = sum(x.in_features * x.out_features * (1.0 if x.expert is None else share) for x in linears)
    return body, (spec.vocab or 0) * (spec.hidden or 0)


def need(checkpoint: Checkpoint, spec: ModelSpec, recipe: Recipe, rows: int, length: int) -> int:
    """Bytes that tuning on so many rows takes besides the codes, which are read again where memory ends."""
    length = min(length, LENGTH)
    hidden, vocabulary = spec.hidden or 0, spec.vocab or 0
    layers: dict[int, int] = {}
    scales = 0
    for x in (x for x in spec.linears if x.block is not None and not is_kept(recipe, x.name)):
        layers[x.block or 0] = layers.get(x.block or 0, 0) + x.in_features * x.out_features
        scales += x.out_features * max(1, x.in_features // recipe.group_size if recipe.group_size > 0 else 1)
    # of a row: what the first layer reads, and both models' present states; later the original's last, and what each
    # layer of a step's rows reads
    held = max(3 * (rows + WATCHED) + LAYER_ROWS, 2 * (rows + WATCHED) + ROWS_A_STEP * (len(layers) + 1))
    states = 4 * length * hidden * held
    # In float32: the embedding, held once and beside its stored bytes while it is read; and an own head, read twice.
    ends = 4 * vocabulary * hidden * (1.5 if spec.tied else 3)
    # of a layer, in float32: weights, their slopes, and half of each for the codes, all of each for those of blocks; of
    # a row: what it computes, kept
    of_weight = 12 if format_of(recipe).in_blocks else 10
    computing = of_weight * max(layers.values(), default=0) + 4 * budget.row_bytes(checkpoint, spec, recipe, length)
    logits = 6 * 4 * TOKENS * vocabulary
    return budget.constant() + states + int(ends) + max(computing, logits) + 7 * 4 * scales


def forecast(
    tune: str | int, checkpoint: Checkpoint, spec: ModelSpec, recipe: Recipe, rows: int, length: int, memory: int | None
) -> Cost:
    """Of the tuning of a run with these rows of text."""
    wish = wanted(tune, recipe, spec, rows, length)
    if not wish.rows:
        return Cost()
    takes, limit = need(checkpoint, spec, recipe, wish.rows, length), budget.limit(memory)
    if takes > limit and not wish.asked:
        return Cost()
    of_one = 1 if recipe.bits < LEVEL_BITS and not recipe.bits_for else 2
    of_one = 4 if format_of(recipe).in_blocks else of_one
    codes = of_one * sum(x.in_features * x.out_features for x in spec.linears if not is_kept(recipe, x.name))
    return Cost(wish.rows, max(takes, min(limit, takes + codes)), takes, takes + codes)
