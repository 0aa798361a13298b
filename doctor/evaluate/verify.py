"""`doctor verify`: is the quantized model still the model? Perplexity, divergence and replies of both, judged by
rules.
"""

import os
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import DoctorError
from doctor.core.facts import CHECKPOINT, closure
from doctor.core.host import describe
from doctor.core.recipe import Recipe
from doctor.evaluate.compare import compare
from doctor.lint.engine import Report, judge, load_rules, locate
from doctor.model.quantization_config import stored_recipe
from doctor.quant.budget import free_memory
from doctor.quant.calibration.documents import heldout_documents, read_documents
from doctor.quant.calibration.rows import rows_of
from doctor.quant.calibration.tokenizer import load_tokenizer
from doctor.quant.dequantize import quantization
from doctor.quant.device import device_free, device_memory, device_of
from doctor.quant.solve import cuda
from doctor.scan.header import header_facts
from doctor.scan.scan import scan
from doctor.scan.summary import summary

CONTEXT, ROWS = 512, 24
PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "def add(a, b):\n    return",
    "1, 2, 3, 4, 5,",
)
PROMPT_TOKENS = 16  # of a held-out row, where there is no tokenizer to make prompts with


def verify(
    original: str | os.PathLike,
    quantized: str | os.PathLike,
    *,
    text: str | os.PathLike | None = None,
    context: int = CONTEXT,
    rows: int = ROWS,
    memory: int | None = None,
    device: str = "cpu",
    fail_on: str = "error",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Report on the quantized checkpoint, with a Comparison against its original among its facts.

    text: a .txt, .jsonl or .parquet file; None takes the half of Python's language reference that no built-in
    calibration row holds. context: tokens of a row; rows do not overlap. memory: bytes a whole float32 model may take
    for the greedy replies (half of what is free by default); a larger model is compared without them, and the report
    says so. device: where both are computed, block by block, in float32; its memory is what counts then.
    """
    started = time.perf_counter()
    for name, value, least in (("--rows", rows, 1), ("--context", context, 2)):
        if value < least:
            raise DoctorError(f"{name} {value}: must be {least} or more.")
    device = device_of(device)
    first, second = Checkpoint.open(original), Checkpoint.open(quantized)
    ids, tokenizer, source = _rows(first, text, rows, context)
    prompts, decode = _prompts(tokenizer, ids)
    if memory is None:
        free = device_free(device)
        memory = (free_memory() if free is None else free) // 2
    with quiet(), device_memory(device):
        comparison = compare(first, second, ids, prompts, decode, memory, progress, device)

    # A 16-bit model, say a fine-tune against its base, has no plan: whether it could be quantized is another question.
    plain = quantization(second) is None
    recipe, rules = stored_recipe(second, Recipe()), load_rules()
    if plain:
        rules = [r for r in rules if "recipe" not in closure(r.facts)]
    store = header_facts(second, recipe)
    scanned = scan(second, store)
    store.put(CHECKPOINT, "comparison", comparison)
    if device != "cpu":
        store.put(CHECKPOINT, "slower_paths", tuple(filter(None, [cuda.note(device)])))
    findings, runs = judge(store, rules)
    extra = {
        "comparison": asdict(comparison),
        "text": {"source": source, "rows": len(ids), "context": context, "stride": context},
        "machine": describe(),
        "plain": plain,
    }
    if not comparison.generated:
        extra["not_generated"] = (
            f"a whole model in float32 does not fit the {memory / 2**30:.1f} GiB given to it; --memory raises it"
        )
        extra["reply_bytes"] = memory
    return Report(
        checkpoint=second.name,
        recipe=recipe,
        findings=locate(findings, second),
        runs=runs,
        summary=summary(second, store),
        skipped_tensors=scanned.skipped,
        bytes_read=scanned.bytes_read,
        seconds=time.perf_counter() - started,
        fail_on=fail_on,
        extra=extra,
    )


def _rows(checkpoint: Checkpoint, text, rows: int, context: int):
    """(rows int64[1, context], tokenizer or None, name of the source). Raises DoctorError where there is not one
    row.
    """
    documents = heldout_documents() if text is None else read_documents(Path(text))
    if documents.ids:
        ids, tokenizer = [r[:context] for r in documents.ids[:rows] if len(r) > 1], None
    else:
        tokenizer = load_tokenizer(checkpoint, documents.name)
        ids = rows_of(documents, tokenizer, rows, context)
    if not ids:
        raise DoctorError(f"{documents.name}: not one row of 2 or more tokens.", "Give more text.")
    return [torch.tensor([row]) for row in ids], tokenizer, documents.name


def _prompts(tokenizer, ids):
    if tokenizer is None:
        return [row[:, :PROMPT_TOKENS] for row in ids[:4]], lambda tokens: " ".join(map(str, tokens))
    encoded = [tokenizer(p, return_tensors="pt")["input_ids"] for p in PROMPTS]
    return [e for e in encoded if e.shape[1]], lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True)


@contextmanager
def quiet():
    """transformers warns on stderr about token ids and the like while it reads a config; the rules judge those."""
    import transformers

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
