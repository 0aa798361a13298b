"""One decoder layer: take the inputs of each stage, solve and pack its linears, judge the layer, write it.

Linears that read the same tensor share a Hessian. Experts of a mixture each have their own; one that no calibration
row reached is rounded to nearest, and its record says so.

Every linear's facts go into the store and are judged by the same rules as everything else. A finding of severity
error stops the run at that layer, unless its fix of the recipe is allowed: then the layer is quantized again under
the changed recipe.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch

from doctor.core.errors import NotQuantizable
from doctor.core.finding import Finding, Fix
from doctor.core.messages import _
from doctor.core.recipe import Recipe
from doctor.fixing.plan import with_fields
from doctor.formats.registry import format_of
from doctor.lint.engine import judge
from doctor.quant import budget, export
from doctor.quant.activations import Activations
from doctor.quant.earlier import Earlier
from doctor.quant.forward.attention_tap import CacheRange
from doctor.quant.forward.layer_input import LayerInput
from doctor.quant.forward.linear_groups import Modules, Stages
from doctor.quant.forward.prefetch import load_tensor
from doctor.quant.forward.staged import StagedForward
from doctor.quant.gguf_output import IMPORTANCE
from doctor.quant.linear import Solved, divisors, outcome, pack_linear, put_weight, solve_linear, weight_of
from doctor.quant.records import Record, failed, put_facts, record
from doctor.quant.selection import Selection, select_linears
from doctor.quant.setup import Setup
from doctor.quant.solve.awq_fold import Find, Folds, ScaleFolding
from doctor.quant.solve.awq_search import find_scales
from doctor.quant.solve.awq_source import Source
from doctor.quant.solve.smooth import smooth_scales
from doctor.quant.solve.solution import Solution
from doctor.scan.header import RECIPE

# An exact fold moves float32 results by rounding only; a fold into something that is not linear moves them by percents.
_FOLD_TOLERANCE = 1e-3

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Verdict:
    """What the rules say. findings: all of the run so far; stopping: errors among them; fixable: those whose fix of
    the recipe is allowed and changes it.
    """

    findings: tuple[Finding, ...]
    stopping: tuple[Finding, ...]
    fixable: tuple[tuple[Finding, Fix], ...] = ()


@dataclass(frozen=True)
class Attempt:
    """One quantization of a layer under one recipe. packed: tensors that replace the checkpoint's in the output."""

    records: tuple[Record, ...]
    packed: Tensors
    verdict: Verdict


@dataclass(frozen=True)
class LayerResult:
    """A finished layer, or the one that stopped the run. fixes: what was changed in the recipe, one line each."""

    recipe: Recipe
    records: tuple[Record, ...]
    verdict: Verdict
    fixes: tuple[str, ...] = ()


def part_name(i: int) -> str:
    """The name of layer i's part of the output."""
    return f"{i:05d}"


def quantize_layer(
    setup: Setup, activations: Activations | None, i: int, recipe: Recipe, *, prefetch: bool = True
) -> LayerResult:
    """Quantize layer i and write its part, after the fixes that it asks for. prefetch: read the next layer meanwhile.

    A recipe moves one way, so a layer is tried again no more often than it has fixes. Raises NotQuantizable where a
    linear fails and no rule says so (--select).
    """
    fixes: list[str] = []
    while True:
        load(setup, i, prefetch)
        selection = select_linears(setup.skeleton, setup.checkpoint, setup.fused, recipe, i)
        tried = _attempt(setup, activations, i, recipe, selection)
        if not tried.verdict.fixable:
            break
        recipe = _apply_fixes(setup, i, recipe, tried.verdict, fixes)
    if not tried.verdict.stopping:
        _write(setup, i, recipe, selection, tried)
        setup.skeleton.drop_layer(i)
    return LayerResult(recipe, tried.records, tried.verdict, tuple(fixes))


def load(setup: Setup, i: int, prefetch: bool = True) -> None:
    """Layer i's weights, and the next layer's on their way."""
    setup.skeleton.load_layer(i)
    if prefetch and setup.reads_ahead:
        setup.skeleton.prefetch(i + 1)


def _attempt(setup: Setup, activations: Activations | None, i: int, recipe: Recipe, selection: Selection) -> Attempt:
    records, packed = _kept_records(setup, selection), Tensors()
    scaled = divisors(selection.modules, recipe)
    modules = selection.modules
    if setup.earlier is not None:
        modules = setup.earlier.carry(setup.skeleton, setup.store, i, recipe, modules, records, packed)
    if activations is None:
        for linear, module in modules.values():
            solved = solve_linear(linear, module, None, recipe, None, scaled.get(linear.name, 1.0))
            records.append(finish_linear(setup, recipe, modules, linear.name, solved, None, packed, scaled))
        return Attempt(tuple(records), packed, _settle(setup, recipe, records))
    return _attempt_in_stages(setup, activations, i, recipe, modules, records, packed, scaled)


def carry_layer(setup: Setup, earlier: Earlier, activations: Activations | None, i: int, recipe: Recipe) -> LayerResult:
    """A layer of which no linear fell back: its tensors as they were written, and its outputs from them."""
    load(setup, i)
    selection = select_linears(setup.skeleton, setup.checkpoint, setup.fused, recipe, i)
    records, packed = _kept_records(setup, selection), Tensors()
    earlier.carry(setup.skeleton, setup.store, i, recipe, selection.modules, records, packed)
    verdict = verdict_of(setup)
    _write(setup, i, recipe, selection, Attempt(tuple(records), packed, verdict))
    if activations is not None:
        activations.advance(i)
    setup.skeleton.drop_layer(i)
    return LayerResult(recipe, tuple(records), verdict)


def _kept_records(setup: Setup, selection: Selection) -> list[Record]:
    """Of what stays in 16 bits, with its facts in the store."""
    for kept in selection.kept:
        put_facts(setup.store, kept.linear.name, kept.solved, None)
    return [kept.record for kept in (*selection.kept, *selection.fused)]


def _attempt_in_stages(
    setup: Setup,
    activations: Activations,
    i: int,
    recipe: Recipe,
    modules: Modules,
    records: list[Record],
    packed: Tensors,
    scaled: dict[str, float],
) -> Attempt:
    """Stage after stage: take the inputs, then quantize. At the end the layer's outputs are the next layer's inputs."""
    groups = activations.linear_groups(i, modules)
    stages = activations.stages(i, modules, groups)
    folding = _fold_scales(setup, activations, i, recipe, stages, modules, groups.suspended_bytes)
    if folding:
        packed |= folding.tensors()
    cache = CacheRange()
    with (
        activations.staged_forward(i, stages, modules, groups.suspended_bytes, forgets=True) as forward,
        cache.watched() if recipe.kv_cache else nullcontext(),
    ):
        for number, stage in enumerate(stages):
            inputs = _stage_inputs(setup, forward, number, recipe)
            names = [name for group in stage for name in group]
            for name, solved in _solve_stage(setup, recipe, modules, names, inputs, folding, scaled):
                given = inputs[name]
                records.append(finish_linear(setup, recipe, modules, name, solved, given, packed, scaled, folding))
            if any(r["outcome"] == "failed" for r in records):
                break
        verdict = _settle(setup, recipe, records)
        if not verdict.stopping and not verdict.fixable:
            forward.finish()
            packed |= _cache_scales(setup, i, recipe, cache)
    # In one order, however many experts are solved at a time.
    place = {name: n for n, name in enumerate(x for stage in groups.names(list(modules)) for g in stage for x in g)}
    return Attempt(tuple(sorted(records, key=lambda r: place.get(r["name"], -1))), packed, verdict)


def _cache_scales(setup: Setup, i: int, recipe: Recipe, cache: CacheRange) -> Tensors:
    """The scales of an FP8 cache under the names that engines look for, beside the layer's key projection. {} for
    a layer without keys of its own.
    """
    keys = [x.name for x in setup.skeleton.linears.get(i, {}).values() if x.role in ("k", "qkv")]
    if not recipe.kv_cache or not keys:
        return {}
    attention = keys[0].rpartition(".")[0]
    scales = cache.scales(attention, setup.spec.n_kv_heads, recipe.kv_cache == "fp8-head")
    return {f"{attention}.{part}": scale for part, scale in scales.items()}


def _stage_inputs(setup: Setup, forward: StagedForward, number: int, recipe: Recipe) -> dict[str, LayerInput]:
    """The input of each linear of a stage, by name; linears of one group share one object."""
    budget.give_back()
    hessians, found = forward.hessians(number), {}
    for group in forward.stages[number]:
        setup.ranks.sum_hessians(hessians[0])
        given = LayerInput(hessians.pop(0), recipe)  # popped: sums and matrix of one group at a time
        found.update(dict.fromkeys(group, given))
    return found


def _solve_stage(
    setup: Setup,
    recipe: Recipe,
    modules: Modules,
    names: Sequence[str],
    inputs: dict[str, LayerInput],
    folding: ScaleFolding | None,
    scaled: dict[str, float],
):
    """(name, Solved) of every linear of a stage, in order. With several ranks each solves its own first, then all get
    the others'.
    """
    ranks = setup.ranks

    def solved(name: str) -> Solved:
        linear, module = modules[name]
        columns = folding.columns.get(name) if folding else None
        found = solve_linear(linear, module, inputs[name], recipe, columns, scaled.get(name, 1.0))
        if setup.survey is not None:
            setup.survey.see(linear, weight_of(linear, module), inputs[name], found.solution)
        return found

    if ranks.size == 1:
        for name in names:
            yield name, solved(name)
        return
    own = {name: solved(name) for place, name in enumerate(names) if ranks.owner(place) == ranks.rank}
    for place, name in enumerate(names):
        linear, mine = modules[name][0], own.pop(name, None)
        found = ranks.broadcast_solution(
            ranks.owner(place),
            mine.solution if mine and isinstance(mine.solution, Solution) else None,
            mine.failure if mine else "",
            mine.seconds if mine else 0.0,
            (linear.out_features, linear.in_features),
            setup.skeleton.device,
        )
        yield name, Solved(*found)


def finish_linear(
    setup: Setup,
    recipe: Recipe,
    modules: Modules,
    name: str,
    solved: Solved,
    given: LayerInput | None,
    packed: Tensors,
    scaled: dict[str, float],
    folding: ScaleFolding | None = None,
) -> Record:
    """Pack a solved linear into `packed`, replace its weight by the dequantized one, so that later linears see the
    error the server will see, and put its facts into the store. Returns its record.
    """
    linear, module = modules[name]
    started = time.perf_counter()
    try:
        found = pack_linear(linear, solved, recipe, scaled.get(name, 1.0), given)
    except NotQuantizable as error:
        fact, seconds = failed(recipe, error.message), solved.seconds
    else:
        packed |= found.parts
        if given is not None and given.usable and format_of(recipe).in_blocks:
            packed[f"{name}.{IMPORTANCE}"] = (given.H.diagonal() / 2).to("cpu", torch.float32)
        put_weight(module, found.weight, linear.transposed)
        fact = outcome(solved, given, recipe.for_linear(name), folding.notes.get(name, "") if folding else "")
        seconds = solved.seconds + time.perf_counter() - started
    hessian = given.fact if given else None
    put_facts(setup.store, name, fact, hessian)
    return record(linear, fact, hessian, seconds)


def _fold_scales(
    setup: Setup,
    activations: Activations,
    i: int,
    recipe: Recipe,
    stages: Stages,
    modules: Modules,
    suspended_bytes: float,
) -> ScaleFolding | None:
    """Scales of AWQ or SmoothQuant, found on the float layer and folded into it; taken back where the layer's output
    moves. None for other methods.
    """
    if not recipe.folds_scales:
        return None
    folding = ScaleFolding(modules, setup.skeleton.by_tensor(i), lambda name: load_tensor(setup.checkpoint, name).dtype)
    before = activations.run_first(i)
    found: list[Folds] = []  # all of them before the first is folded: each is found on the float layer
    with activations.staged_forward(i, stages, modules, suspended_bytes) as forward:
        for number, stage in enumerate(stages):
            inputs = _stage_inputs(setup, forward, number, recipe)
            for group in stage:
                given = inputs[group[0]]
                if given.usable and given.fact.finite:
                    found += folding.find(setup.spec, group, _search(recipe, given))
            inputs.clear()
    for scales in found:
        folding.fold(scales)
    moved = float((activations.run_first(i) - before).norm() / before.norm())
    if setup.ranks.any(bool(folding.columns) and not moved <= _FOLD_TOLERANCE):
        folding.take_back(_("not scaled: folding moved the layer's output by {moved:.2e}", moved=moved))
    return folding


def _search(recipe: Recipe, given: LayerInput) -> Find:
    """What finds the factors of the channels of an input."""
    if not recipe.solver.folds_scales:
        return partial(smooth_scales, H=given.H.matrix(), channels=given.channels)
    grid = format_of(recipe).grid(recipe.scheme)

    def find(weights: list[torch.Tensor], source: Source) -> tuple[torch.Tensor, str]:
        return find_scales(
            weights,
            given.H.matrix(),
            source,
            bits=grid.bits,
            group_size=grid.group_size,
            sym=grid.sym,
            zero_min=grid.zero_min,
        )

    return find


def verdict_of(setup: Setup) -> Verdict:
    """Judge everything known so far by the run's rules."""
    findings, _runs = judge(setup.store, setup.rules)
    return Verdict(tuple(findings), tuple(f for f in findings if f.severity == "error"))


def _settle(setup: Setup, recipe: Recipe, records: Sequence[Record]) -> Verdict:
    """Judge a layer's linears. Raises NotQuantizable where one failed and no rule says so."""
    verdict, consent = verdict_of(setup), setup.consent
    here = {f"linear:{r['name']}" for r in records}
    fixable = tuple(
        (f, f.fix)
        for f in verdict.findings
        if f.subject in here
        and consent
        and f.fix is not None
        and consent.can_carry_out(f.fix)
        and consent.allows(f.code, f.fix)
        and with_fields(recipe, f.fix.edits) != recipe
        and not f.consequence_of
    )
    if fixable:
        return Verdict(verdict.findings, (), fixable)
    failure = next((r for r in records if r["outcome"] == "failed"), None)
    if failure and not verdict.stopping:
        raise NotQuantizable(
            _("{name}: {why}", name=failure["name"], why=failure["solve"]["note"]),
            _("Run `doctor check` on the checkpoint."),
        )
    return verdict


def _apply_fixes(setup: Setup, i: int, recipe: Recipe, verdict: Verdict, made: list[str]) -> Recipe:
    """The recipe after the fixes that the layer asks for; their lines are added to `made`."""
    for finding, fix in verdict.fixable:
        recipe = with_fields(recipe, fix.edits)
        made.append(
            _("{code} {title}: {name}", code=finding.code, title=fix.title, name=finding.subject.partition(":")[2])
        )
        setup.progress(_("fix: {title}", title=made[-1]))
    setup.store.put(RECIPE, recipe)
    setup.progress(_("layer {i} is quantized again", i=i + 1))
    return recipe


def _write(setup: Setup, i: int, recipe: Recipe, selection: Selection, tried: Attempt) -> None:
    """The layer's part of the output, then its journal line."""
    replaced = {linear.tensor for linear, _module in selection.modules.values()}
    names = [n for n in setup.skeleton.tensors_of(i) if n not in replaced and n not in tried.packed]
    form = format_of(recipe)
    stored = dict(export.kept_tensors(names, lambda name: load_tensor(setup.checkpoint, name), form.in_blocks))
    for linear, _module in selection.modules.values():
        if (name := f"{linear.name}.bias") in stored:
            stored[name] = form.bias(stored[name])
    # By linear, whatever the order in which they were solved: the same bytes however many experts were in memory.
    place = {name: number for number, name in enumerate(selection.modules)}
    own = sorted(tried.packed, key=lambda name: place.get(name.rpartition(".")[0], -1))
    setup.output.write_part(part_name(i), {**{name: tried.packed[name] for name in own}, **stored})
    setup.output.note({"block": i, "records": list(tried.records)})
