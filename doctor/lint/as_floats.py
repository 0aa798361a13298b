"""A quantized checkpoint that a plan quantizes again, seen as the plain numbers that it stands for."""

from __future__ import annotations

from doctor.checkpoint.directory import Checkpoint
from doctor.core.facts import Unavailable
from doctor.core.recipe import Recipe
from doctor.core.store import Store
from doctor.edits.decoding import decoded
from doctor.edits.stored import Decoding
from doctor.formats.registry import verbatim_tails
from doctor.lint.engine import judge
from doctor.lint.rule import Rule
from doctor.model.quantization_config import holds_quantized
from doctor.scan.header import header_facts

DECODES = "C147"  # decodes as is done below, and is judged again on what comes of it


def read_as_floats(source: Checkpoint, recipe: Recipe, rules: list[Rule]) -> tuple[Checkpoint, Decoding | None]:
    """The view that a plan to quantize reads, and how it is decoded. The source itself and None where it holds plain
    numbers, where nothing is to be quantized, and where its headers show an error. Raises BadCheckpoint for a GGUF
    model that is not read.
    """
    if type(source) is not Checkpoint or source.unread or recipe.goal != "quantize" or not holds_quantized(source):
        return source, None
    if source.gguf:
        return decoded(source)
    store = header_facts(source, recipe)
    for name in source.tensors:
        if name.endswith(verbatim_tails()):
            store.put_value("stored_bytes", source.load(name).tobytes(), f"tensor:{name}")
    if refused_by_headers(store, [one for one in rules if one.code != DECODES]):
        return source, None
    try:
        return decoded(source)
    except Unavailable:
        return source, None


def refused_by_headers(store: Store, rules: list[Rule]) -> bool:
    """Whether headers alone show an error: then nothing that takes seconds is begun."""
    findings, _runs = judge(store, rules, "header")
    return any(finding.severity == "error" for finding in findings)
