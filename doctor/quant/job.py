"""The loop of a run: one decoder layer in memory at a time, its linears quantized in the order in which they compute.

For each layer: load its weights; run every batch up to the linears that compute first; quantize those and replace
each weight by its dequantized value, so that the next linears and layers see the error the server will see; go on to
the next stage. At the end the layer's outputs are the next layer's inputs. So a layer is computed once
(forward/staged.py).

Memory is worked out in budget.py. What does not grow with the model's depth is always held; hidden states and
suspended forwards are spilled to disk where they exceed what the limit leaves (forward/spill.py).
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from doctor.checkpoint.directory import Checkpoint
from doctor.core.finding import Finding
from doctor.core.messages import Message, _, plural
from doctor.core.methods import METHODS, is_calibrated
from doctor.core.recipe import Recipe, is_kept
from doctor.core.records import OUTSIDE_LINEARS, STACKED_EXPERTS, damp_raised
from doctor.core.store import Store
from doctor.fixing.consent import Consent
from doctor.formats.registry import format_of
from doctor.lint.rule import Rule
from doctor.model.linears import Linear
from doctor.model.spec import ModelSpec
from doctor.quant import budget, export
from doctor.quant.activations import open_activations
from doctor.quant.distributed import Ranks
from doctor.quant.earlier import Earlier
from doctor.quant.forward.prefetch import load_tensor
from doctor.quant.layer import LayerResult, carry_layer, quantize_layer, verdict_of
from doctor.quant.records import Record, kept, record
from doctor.quant.resume import finished_records, replay_layer
from doctor.quant.selection import names_in_config, stays_unasked
from doctor.quant.setup import Progress, Setup, Survey, set_up
from doctor.quant.vision import quantize_vision

_RECENT = 8  # layers whose mean time those that follow are taken to need
_OUTSIDE = "outside"  # the part of everything that belongs to no decoder layer


@dataclass(frozen=True)
class Result:
    """What a run did. records: one dict a linear (name, block, role, outcome, solve, hessian, seconds), in order.

    stopped: findings that ended the run early; empty when every layer was written. judged: all findings of the run's
    own rules. recipe: as it is at the end, since fixes during the run change it; fixes: those, one line each.
    """

    recipe: Recipe
    records: tuple[Record, ...] = ()
    stopped: tuple[Finding, ...] = ()
    judged: tuple[Finding, ...] = ()
    fixes: tuple[str, ...] = ()

    def count(self, outcome: str) -> int:
        return sum(r["outcome"] == outcome for r in self.records)

    def with_layer(self, done: LayerResult) -> Result:
        """This result after one more layer."""
        return Result(
            done.recipe,
            (*self.records, *done.records),
            done.verdict.stopping,
            done.verdict.findings,
            (*self.fixes, *done.fixes),
        )

    def kept_in_config(self, setup: Setup) -> list[str]:
        """Names that the output's config lists as 16 bits."""
        names = [
            name
            for found in self.records
            if found["outcome"] == "kept"
            for name in names_in_config(found, setup.fused, self.recipe)
        ]
        return list(dict.fromkeys(names))


def run(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    recipe: Recipe,
    rows: list[list[int]],
    output: export.Output,
    store: Store,
    rules: Iterable[Rule],
    *,
    memory: int | None = None,
    progress: Progress = lambda text: None,
    device: str = "cpu",
    ranks: Ranks | None = None,
    consent: Consent | None = None,
    survey: Survey | None = None,
    vision: tuple[Linear, ...] = (),
    earlier: Earlier | None = None,
) -> tuple[Result, list[str]]:
    """(what was done, names that the output's config lists as 16 bits) of quantizing every decoder layer into parts
    of `output`.

    Layers whose part exists already are replayed, not solved. rows: token ids (unused by a method without
    calibration). memory: bytes that the process may take, None for a share of what is free. consent: fixes of the
    recipe that are made as soon as a layer asks for them. survey: sees every linear before its weight is replaced.
    vision: linears of vision towers that are quantized too. earlier: of its layers only the linears that fell back are
    solved, the rest is carried over. Facts go into `store`; rules of the stages calibration and run judge them after
    each layer. Raises NotQuantizable where numbers forbid it and no rule says so.
    """
    setup = set_up(
        checkpoint,
        spec,
        recipe,
        rows,
        output,
        store,
        rules,
        memory=memory,
        progress=progress,
        device=device,
        ranks=ranks or Ranks(),
        consent=consent,
        survey=survey,
        vision=vision,
        earlier=earlier,
    )
    try:
        done = _quantize_layers(setup, recipe)
        if not done.stopped:
            done = _write_outside(setup, done)
        return done, done.kept_in_config(setup)
    finally:
        setup.skeleton.stop_prefetch()


def _quantize_layers(setup: Setup, recipe: Recipe) -> Result:
    """Layer after layer, until the last one or the first that stops the run."""
    activations = open_activations(setup)
    done = Result(recipe)
    spent: list[float] = []
    known = [finished_records(setup.output, i) for i in range(len(setup.skeleton.layers))]
    unsolved = max((i for i, records in enumerate(known) if records is None), default=-1)
    for i, finished in enumerate(known):
        started = time.perf_counter()
        with torch.no_grad():
            if finished is not None:  # its outputs are for layers that follow
                layer = replay_layer(setup, activations if i < unsolved else None, i, done.recipe, finished)
            elif setup.earlier is not None and not setup.earlier.fails_in(setup.skeleton.linears.get(i, {})):
                layer = carry_layer(setup, setup.earlier, activations, i, done.recipe)
            else:
                layer = quantize_layer(setup, activations, i, done.recipe)
        done = done.with_layer(layer)
        if done.stopped:
            return done
        budget.give_back()
        spent.append(time.perf_counter() - started)
        _say(setup, i, layer, spent)
    return done


def _write_outside(setup: Setup, done: Result) -> Result:
    """Everything that belongs to no decoder layer, unchanged but for the linears of vision towers that were asked for;
    other linears among it stay in 16 bits and are recorded.
    """
    seeing = quantize_vision(setup, done.recipe)
    records, outside = [*done.records, *seeing], setup.skeleton.outside
    packed = {found["name"] for found in seeing if found["outcome"] != "kept"}
    staying = kept(done.recipe, _("not in a decoder layer that calibration runs through"))
    records += [record(linear, staying, None, 0.0) for linear in outside]
    unasked = tuple(linear.name for linear in outside if not is_kept(done.recipe, linear.name))
    setup.store.put(OUTSIDE_LINEARS, unasked)
    if not setup.output.has_part(_OUTSIDE):
        outer = [n for n in setup.skeleton.outer_tensors() if n.removesuffix(".weight") not in packed]
        setup.output.write_part(_OUTSIDE, _outside_tensors(setup, done.recipe, outer))
    fused = {r["name"]: r["solve"]["note"] for r in records if stays_unasked(r, setup.fused)}
    setup.store.put(STACKED_EXPERTS, tuple(fused.items()))
    verdict = verdict_of(setup)
    return replace(done, records=tuple(records), stopped=verdict.stopping, judged=verdict.findings)


def _outside_tensors(setup: Setup, recipe: Recipe, names: list[str]) -> dict[str, torch.Tensor]:
    if setup.earlier is not None:
        return setup.earlier.outside(names)
    exact = format_of(recipe).in_blocks
    return dict(export.kept_tensors(names, lambda name: load_tensor(setup.checkpoint, name), exact))


def try_layers(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    recipe: Recipe,
    rows: list[list[int]],
    output: export.Output,
    store: Store,
    rules: Iterable[Rule],
    layers: Iterable[int],
    *,
    memory: int | None = None,
    progress: Progress = lambda text: None,
    device: str = "cpu",
) -> tuple[Result, list[float]]:
    """(result, seconds of each) of quantizing only these layers, each on the outputs of the one before it."""
    setup = set_up(
        checkpoint,
        spec,
        recipe,
        rows,
        output,
        store,
        rules,
        memory=memory,
        progress=progress,
        device=device,
        ranks=Ranks(),
        consent=None,
    )
    activations, done = open_activations(setup), Result(recipe)
    seconds: list[float] = []
    for i in layers:
        started = time.perf_counter()
        with torch.no_grad():
            layer = quantize_layer(setup, activations, i, done.recipe, prefetch=False)
        seconds.append(time.perf_counter() - started)
        done = done.with_layer(layer)
        if done.stopped:
            break
        _say(setup, i, layer, seconds, to_go=False)
    return done, seconds


def _say(setup: Setup, i: int, layer: LayerResult, spent: list[float], to_go: bool = True) -> None:
    """The progress line of a finished layer. spent: seconds of each so far; to_go: all that follow are done too."""
    losses = [r["solve"]["loss"] for r in layer.records if is_calibrated(r["outcome"])]
    raised = [r["name"] for r in layer.records if damp_raised(r["solve"])]
    quantized = sum(r["outcome"] in METHODS for r in layer.records)
    done = plural(
        "layer {i} of {count}: {n} linear in {seconds:.1f} s",
        "layer {i} of {count}: {n} linears in {seconds:.1f} s",
        quantized,
        i=i + 1,
        count=len(setup.skeleton.layers),
        seconds=spent[-1],
    )
    left = len(setup.skeleton.layers) - i - 1
    if to_go and left:
        recent = spent[-_RECENT:]
        done = _("{done}, about {clock} left", done=done, clock=clock(left * sum(recent) / len(recent)))
    if losses:
        done = _("{done}, largest relative error {worst:.2%}", done=done, worst=max(losses))
    if raised:
        done = _("{done}; damp raised: {names}", done=done, names=", ".join(raised))
    setup.progress(done)


def clock(seconds: float) -> Message:
    """Seconds, minutes or hours, for a person."""
    minutes = seconds / 60
    if minutes < 2:
        return _("{seconds:.0f} s", seconds=seconds)
    return _("{minutes:.0f} min", minutes=minutes) if minutes < 120 else _("{hours:.1f} h", hours=minutes / 60)
