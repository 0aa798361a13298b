"""Resuming an interrupted run: what must be equal for two runs to write the same bytes, and layers finished before.

A part that the journal names is whole (stage.py), so a layer whose part and line exist is not solved again: its facts
come from the journal, and its outputs from the weights that were written.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version

import torch

from doctor.checkpoint.directory import Checkpoint
from doctor.core.recipe import Recipe
from doctor.core.version import __version__
from doctor.quant import export, pack
from doctor.quant.activations import Activations
from doctor.quant.layer import LayerResult, Verdict, load, part_name
from doctor.quant.linear import put_weight
from doctor.quant.records import FUSED_EXPERTS, Record, hessian_of, put_facts, solve_of
from doctor.quant.setup import Setup


def fingerprint(checkpoint: Checkpoint, recipe: Recipe, rows: list[list[int]], device: str = "cpu") -> dict:
    """What must be equal for two runs to write the same bytes."""
    headers = [(t.name, t.dtype.name, t.shape) for t in checkpoint.tensors.values()]
    files = [
        (e.name, e.size, _modified(checkpoint, e.name))
        for e in checkpoint.entries.values()
        if e.name.endswith(".safetensors")
    ]
    source = repr(
        (sorted(headers), sorted(files), checkpoint.json["config.json"].raw, getattr(checkpoint, "edits", ()))
    )
    return {
        "doctor": __version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "threads": torch.get_num_threads(),
        "recipe": {**asdict(recipe), "format": recipe.output_format},
        "rows": hashlib.sha256(repr(rows).encode()).hexdigest(),
        "checkpoint": hashlib.sha256(source.encode()).hexdigest(),
        "device": torch.device(device).type,
    }


def _modified(checkpoint: Checkpoint, name: str) -> int:
    try:
        return os.stat(checkpoint.root / name).st_mtime_ns
    except OSError:
        return 0


def finished_records(output: export.Output, i: int) -> list[Record] | None:
    """The records of a layer that an earlier run finished; None where it must be solved.

    Where the part was written and the journal line was not, solving again writes the same part.
    """
    if not output.has_part(part_name(i)):
        return None
    return next((entry["records"] for entry in reversed(output.notes()) if entry.get("block") == i), None)


def replay_layer(
    setup: Setup, activations: Activations | None, i: int, recipe: Recipe, records: Sequence[Record]
) -> LayerResult:
    """A layer that an earlier run finished: its facts again, and its outputs from the weights that were written."""
    for found in records:
        if found["solve"]["damp_asked"] > recipe.damp:  # a fix raised it in the run that is resumed
            recipe = recipe.with_field("damp", found["solve"]["damp_asked"])
        if found["role"] != FUSED_EXPERTS:
            put_facts(setup.store, found["name"], solve_of(found), hessian_of(found))
    if activations is not None:
        load(setup, i)
        _put_written(setup, i, recipe, {found["name"]: found["outcome"] for found in records})
        activations.advance(i)
        setup.skeleton.drop_layer(i)
    return LayerResult(recipe, tuple(records), Verdict((), ()))  # the run that wrote it has judged it


def _put_written(setup: Setup, i: int, recipe: Recipe, outcomes: Mapping[str, str]) -> None:
    """The weights of an earlier run's part into the modules of layer i."""
    skeleton = setup.skeleton
    tensors = {name: t.to(skeleton.device) for name, t in setup.output.read_part(part_name(i)).items()}
    for name, (linear, module) in skeleton.modules_of(i).items():
        if outcomes.get(name) != "kept":
            give = partial(pack.unpack_linear, name, tensors, recipe.for_linear(name))
            put_weight(module, give, linear.transposed)
    if not recipe.folds_scales and setup.earlier is None:
        return
    for name, module in skeleton.by_tensor(i).items():  # norms and biases that scales were folded into, or tuned
        for kind, tensor in (("weight", name), ("bias", name.removesuffix("weight") + "bias")):
            if tensor in tensors:
                old = module.get_parameter(kind)
                old.data = tensors[tensor].to(old.device, old.dtype)
