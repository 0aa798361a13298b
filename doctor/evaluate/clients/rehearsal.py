"""What quantizing would end with, before any work: a run's own steps from headers, and the client's loader on files
without data. In a process of its own (rehearsal_child.py), which takes seconds whatever the model's size.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from doctor.checkpoint.directory import Checkpoint
from doctor.core.messages import from_data
from doctor.core.recipe import Recipe
from doctor.core.rehearsal import Rehearsal
from doctor.evaluate.clients.load_proof import SECONDS, as_record, ask_child, linears_of_class, prove_loading
from doctor.formats.registry import format_of
from doctor.quant.client import Client


def rehearse(folder: Path, recipe: Recipe, *, seconds: float = SECONDS) -> Rehearsal:
    """What a run of this recipe on the checkpoint in `folder` would end with."""
    with tempfile.TemporaryDirectory(prefix="doctor-rehearsal-") as place:
        answer = ask_child(
            "rehearsal_child", [str(Path(folder).resolve()), json.dumps(asdict(recipe)), place], place, seconds
        )
    if isinstance(answer, str):
        return Rehearsal(reason=answer)
    if "refused" in answer:
        return Rehearsal(
            from_data(answer["refused"]), from_data(answer["advice"]), tokenizer=answer.get("tokenizer", "")
        )
    return Rehearsal(proof=as_record(answer["proof"], (), 0), tokenizer=answer.get("tokenizer", ""))


def start(checkpoint: Checkpoint, recipe: Recipe) -> Future[Rehearsal] | None:
    """The same, under way; None where there is nothing to quantize, or nothing to do it with."""
    config = checkpoint.value("config.json") or {}
    if format_of(recipe).in_blocks or not format_of(recipe).client:
        return None  # transformers is not who reads it
    if type(checkpoint) is not Checkpoint or not checkpoint.root.is_dir():
        return None
    if "quantization_config" in config and recipe.goal != "quantize":
        return None
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        return None
    return ThreadPoolExecutor(1).submit(rehearse, checkpoint.root, recipe)


def client_of(recipe: Recipe) -> Client:
    """What the quantizer asks the program that will read the recipe's output: transformers, or llama.cpp for GGUF,
    which is only asked to load it.
    """
    if format_of(recipe).in_blocks:
        return Client(lambda folder, modules: {}, prove_loading)
    if not format_of(recipe).client:
        return Client(linears_of_class, prove_loading)
    return Client(linears_of_class, prove_loading, rehearse)
