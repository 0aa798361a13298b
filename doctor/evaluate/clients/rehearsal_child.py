"""Rehearses a run and lets transformers load what it would write; prints JSON. Runs as a process of its own.

python -m doctor.evaluate.clients.rehearsal_child CHECKPOINT RECIPE FOLDER
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import DoctorError
from doctor.core.facts import Unavailable
from doctor.core.messages import as_data
from doctor.core.recipe import Recipe
from doctor.edits.decoding import decoded
from doctor.evaluate.clients import transformers_child
from doctor.formats.registry import format_of
from doctor.model.quantization_config import holds_quantized, quantization_of
from doctor.quant import import_stubs
from doctor.quant.calibration.tokenizer import tokenizer_directory
from doctor.quant.calibration.tokenizer_probe import limited, memory_for, use
from doctor.quant.rehearsal import rehearse


def main() -> None:
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TORCHDYNAMO_DISABLE="1")
    import_stubs.install()
    root, recipe, folder = Path(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3])
    with contextlib.redirect_stdout(sys.stderr):  # libraries print; stdout carries the answer alone
        tokenizer = why_no_tokenizer(root)  # under way while the model is rehearsed
        answer = answer_of(root, recipe, folder)
        answer["source"] = transformers_child.ask(root, 0, None)
        answer["tokenizer"] = tokenizer()
    print(json.dumps(answer))


def answer_of(root: Path, recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    """{"refused", "advice"}, or {"proof"}: what transformers_child.ask says of the output; {} where none is wanted."""

    def linears(modules) -> dict[str, tuple[str, ...]]:
        found = transformers_child.linears(root, list(modules)).get("linears", {})
        return {name: tuple(sources) for name, sources in found.items()}

    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in recipe.items()}
    plan, checkpoint = Recipe(**fields), Checkpoint.open(root)
    if not is_rehearsed(checkpoint, plan):
        return {}
    try:
        rehearse(_as_read(checkpoint), plan, folder, linears)
    except DoctorError as error:
        return {
            "refused": as_data(error.message) or error.message,
            "advice": as_data(error.hint) or error.hint,
        }
    return {"proof": transformers_child.ask(folder, 0, None)}


def is_rehearsed(checkpoint: Checkpoint, recipe: Recipe) -> bool:
    """Whether something is to be quantized, into a format that transformers reads."""
    if format_of(recipe).in_blocks or not format_of(recipe).client:
        return False
    return recipe.goal == "quantize" or (recipe.goal == "" and quantization_of(checkpoint) is None)


def _as_read(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint as quantize reads it: one in codes is decoded."""
    if not holds_quantized(checkpoint):
        return checkpoint
    with contextlib.suppress(Unavailable):
        return decoded(checkpoint)[0]
    return checkpoint


def why_no_tokenizer(root: Path) -> Callable[[], str]:
    """Under way in a process with limits: transformers' own words where it does not load the tokenizer that is there,
    or what it takes too much of; "" where it works, where none is there, and where a library that it needs is not
    installed here.
    """
    checkpoint = _as_read(Checkpoint.open(root))
    if not any(name in checkpoint.entries for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        return lambda: ""
    import transformers.models.auto.tokenization_auto  # noqa: F401 - imported once, before the limits

    def work() -> str:
        with tokenizer_directory(checkpoint) as folder:
            return use(folder)

    with tokenizer_directory(checkpoint) as folder:
        return limited(work, memory_for(folder))


if __name__ == "__main__":
    main()
