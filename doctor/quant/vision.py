"""`--vision`: the linears of a vision tower's numbered layers, quantized like those of the decoder.

The tower is that of the class which config.json names (forward/whole_model.py). It runs on the calibration rows with
images, up to the first decoder layer; what each linear gets is its Hessian. Where not all Hessians fit in memory, the
tower runs once for each share of them, and later shares see the error of linears before them. Projectors, mergers and
embeddings of patches stay in 16 bits: they are few, and everything that the model sees goes through them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from doctor.checkpoint.safetensors import TensorInfo
from doctor.core.errors import DoctorError, NotQuantizable
from doctor.core.messages import _
from doctor.core.recipe import Recipe
from doctor.formats.registry import format_of
from doctor.model.linears import Linear
from doctor.quant import budget
from doctor.quant.client import Linears
from doctor.quant.forward.class_names import loaded_into
from doctor.quant.forward.layer_input import LayerInput
from doctor.quant.forward.linear_groups import Modules
from doctor.quant.forward.whole_model import WholeModel
from doctor.quant.layer import finish_linear, verdict_of
from doctor.quant.linear import divisors, solve_linear
from doctor.quant.records import Record, hessian_of, kept, put_facts, record, solve_of
from doctor.quant.selection import why_kept
from doctor.quant.setup import Setup
from doctor.quant.solve.hessian import Hessian

ROLE = "vision"  # of these linears in a record
PART = "vision"  # their part of the output

_TOWER = re.compile(r"(?:^|\.)(?:visual|vision\w*|vit|image\w*)(?:\.|$)")
_BETWEEN = re.compile(r"merger|projector|resampler|connector|pooling|embed")
_LAYER = re.compile(r"\.\d+\.")


def vision_linears(recipe: Recipe, linears: Linears, tensors: Mapping[str, TensorInfo]) -> tuple[Linear, ...]:
    """The linears of vision towers' layers, where the recipe asks for them. linears: the client's (client.Client).

    Raises DoctorError where there are none, or the format holds no tower.
    """
    if not recipe.vision:
        return ()
    if format_of(recipe).in_blocks:
        raise DoctorError(
            _("--vision: a GGUF file holds the decoder alone; its tower is a file of its own (mmproj)."),
            _("Leave --vision out, and convert the tower with llama.cpp."),
        )
    loaded = Counter(source for sources in linears.values() for source in sources)
    found = []
    for source, times in loaded.items():
        info = tensors.get(f"{source}.weight")
        if times > 1 or info is None or len(info.shape) != 2 or not info.dtype.is_float:
            continue
        if _TOWER.search(source) and _LAYER.search(source) and not _BETWEEN.search(source):
            found.append(Linear(source, info.name, ROLE, None, info.shape[1], info.shape[0]))
    if not found:
        raise DoctorError(
            _("--vision: transformers names no linears in layers of a vision tower for this checkpoint."),
            _("Leave --vision out."),
        )
    return tuple(found)


def require_images(recipe: Recipe, rows: Iterable[Any]) -> None:
    """Raises DoctorError where a calibrated method would quantize a tower that no calibration row reaches."""
    rows = list(rows)
    if recipe.vision and recipe.calibrated and not any(hasattr(row, "inputs") for row in rows):
        raise DoctorError(
            _("--vision: none of the {n} calibration rows has an image.", n=len(rows)),
            _("Give conversations with images as --calibration FILE.jsonl, or a method without calibration."),
        )


def quantize_vision(setup: Setup, recipe: Recipe) -> tuple[Record, ...]:
    """Records of the linears in `setup.vision`, whose part of the output is written; () where there are none.

    What an interrupted run finished is not solved again. Raises NotQuantizable where a linear fails.
    """
    if not setup.vision:
        return ()
    before = next((entry[PART] for entry in setup.output.notes() if PART in entry), None)
    if before is not None and setup.output.has_part(PART):
        for found in before:
            put_facts(setup.store, found["name"], solve_of(found), hessian_of(found))
        return tuple(before)
    setup.progress(_("vision: {n} linears", n=len(setup.vision)))
    records: list[Record] = []
    packed: dict[str, torch.Tensor] = {}
    whole = WholeModel(setup.checkpoint, setup.skeleton.layers, setup.skeleton.model.config, setup.skeleton.device)
    with torch.no_grad():
        modules = _modules(setup, recipe, whole, records)
        scaled = divisors(modules, recipe)
        for names in _shares(modules, budget.left(setup.need, setup.memory) // 2):
            given = _inputs(setup, recipe, whole, {name: modules[name] for name in names})
            for name in names:
                own = given.get(name)
                solved = solve_linear(*modules[name], own, recipe, None, scaled.get(name, 1.0))
                records.append(finish_linear(setup, recipe, modules, name, solved, own, packed, scaled))
    bad = next((found for found in records if found["outcome"] == "failed"), None)
    if bad is not None and not verdict_of(setup).stopping:
        raise NotQuantizable(_("{name}: {why}", name=bad["name"], why=bad["solve"]["note"]))
    setup.output.write_part(PART, packed)
    setup.output.note({PART: records})
    return tuple(records)


def _modules(setup: Setup, recipe: Recipe, whole: WholeModel, records: list[Record]) -> Modules:
    """The linears to quantize with their modules; those that stay in 16 bits go to `records`."""
    targets = dict(loaded_into(whole.model, (linear.tensor for linear in setup.vision)))
    modules: Modules = {}
    for linear in setup.vision:
        reason = why_kept(recipe, linear)
        if reason:
            staying = kept(recipe, reason)
            put_facts(setup.store, linear.name, staying, None)
            records.append(record(linear, staying, None, 0.0))
        else:
            modules[linear.name] = linear, whole.model.get_submodule(targets[linear.tensor].removesuffix(".weight"))
    return modules


def _shares(modules: Modules, limit: int) -> Iterable[list[str]]:
    """Names of linears, in order, whose Hessians take `limit` bytes together; one at least."""
    share: list[str] = []
    taken = 0
    for name, (linear, _module) in modules.items():
        size = 4 * linear.in_features**2
        if share and taken + size > limit:
            yield share
            share, taken = [], 0
        share.append(name)
        taken += size
    if share:
        yield share


def _inputs(setup: Setup, recipe: Recipe, whole: WholeModel, modules: Modules) -> dict[str, LayerInput]:
    """The input of each linear over all rows with images; {} without calibration."""
    if not recipe.calibrated:
        return {}
    device = setup.skeleton.device
    sums = {name: Hessian(linear.in_features, device=device) for name, (linear, _module) in modules.items()}

    def adds(total: Hessian):
        return lambda module, args: total.add(args[0].reshape(-1, args[0].shape[-1]))

    hooks = [module.register_forward_pre_hook(adds(sums[name])) for name, (_linear, module) in modules.items()]
    try:
        for row in setup.seen.values():
            whole.run_towers(row)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: LayerInput(total, recipe) for name, total in sums.items()}
