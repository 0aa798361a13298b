"""What transformers does with the files, and what quantizing would end with, before any work: a run's own steps from
headers, and the client's loader on files without data. In a process of its own (rehearsal_child.py), which takes
seconds whatever the model's size.
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
from doctor.evaluate.clients.load_proof import (
    SECONDS,
    as_record,
    ask_child,
    format_without_client,
    linears_of_class,
    prove_loading,
)
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
    proof, source = (as_record(answer[key], (), 0) if key in answer else None for key in ("proof", "source"))
    refused, advice = (from_data(answer.get(key, "")) for key in ("refused", "advice"))
    return Rehearsal(refused, advice, proof, source, answer.get("tokenizer", ""))


def start(checkpoint: Checkpoint, recipe: Recipe) -> Future[Rehearsal] | None:
    """The same, under way; None where the files are no directory, or transformers is not here or not who reads them."""
    if type(checkpoint) is not Checkpoint or not checkpoint.root.is_dir():
        return None
    if format_without_client(checkpoint):
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
