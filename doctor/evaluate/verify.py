"""`doctor verify`: is the quantized model still the model? Perplexity, divergence and replies of both, judged by
rules.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import DoctorError
from doctor.core.facts import closure
from doctor.core.host import describe
from doctor.core.messages import _, listed
from doctor.core.recipe import Recipe
from doctor.core.records import CLIENT_RUN, COMPARISON, LOAD_PROOF, OWN_MEASURE, SLOWER_PATHS, TaskScore
from doctor.evaluate import choices
from doctor.evaluate.clients.harness import run_tasks
from doctor.evaluate.clients.load_proof import prove_loading
from doctor.evaluate.clients.logprobs import CLIENTS, run_client
from doctor.evaluate.compare import compare
from doctor.evaluate.inputs import fitting, prompts_of, quiet, text_rows
from doctor.evaluate.own_measure import compare_own, kind_of
from doctor.evaluate.served_inputs import rounds_inputs
from doctor.lint.engine import Report, judge, load_rules, locate
from doctor.model.quantization_config import stored_recipe
from doctor.quant.budget import free_memory
from doctor.quant.dequantize import as_float, quantization
from doctor.quant.device import device_free, device_memory, device_of
from doctor.quant.ending import run_figures
from doctor.quant.solve import cuda
from doctor.scan.header import header_facts
from doctor.scan.scan import scan
from doctor.scan.summary import summary

CONTEXT, ROWS = 512, 24


def verify(
    original: str | os.PathLike | Checkpoint,
    quantized: str | os.PathLike | Checkpoint,
    *,
    text: str | os.PathLike | None = None,
    context: int = CONTEXT,
    rows: int = ROWS,
    memory: int | None = None,
    device: str = "auto",
    fail_on: str = "error",
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
    load_proof: bool = False,
    client: str | None = None,
    client_python: str | os.PathLike | None = None,
    tasks: Sequence[str] = (),
) -> Report:
    """Report on the quantized checkpoint, with a Comparison against its original among its facts.

    text: a .txt, .jsonl or .parquet file; None takes the half of Python's language reference that no built-in
    calibration row holds. context: tokens of a row; rows do not overlap. memory: bytes a whole float32 model may take
    for the greedy replies (half of what is free by default); a larger model is compared without them, and the report
    says so. client: "transformers", "vllm" or "llama.cpp", which then runs the quantized files on the same rows; what
    it computes is compared with what doctor does. client_python: the interpreter of the client's environment.
    tasks: "choices", a small one of doctor's own, and names of tasks of lm-evaluation-harness where it is installed.
    progress gets a phase ("compare", "score", "reply", "tasks"), how much of it is done and how much there is.
    load_proof: first ask transformers to load the quantized checkpoint under the class that its config names; what it
    does not load whole is a finding, because the figures then speak of a model that nobody serves. device: where both
    are computed, layer by layer, in float32; its memory is what counts then.
    """
    started = time.perf_counter()
    for name, value, least in (("--rows", rows, 1), ("--context", context, 2)):
        if value < least:
            raise DoctorError(_("{option} {value}: must be {least} or more.", option=name, value=value, least=least))
    if client is not None and client not in CLIENTS:
        raise DoctorError(_("--client {value}: must be one of {names}.", value=client, names=listed(CLIENTS)))
    python = os.fspath(client_python) if client_python else None
    device = device_of(device)
    logprobs: list | None = [] if client else None
    first, second = (x if isinstance(x, Checkpoint) else Checkpoint.open(x) for x in (original, quantized))
    _require_reader(second, client)
    first = as_float(first) if first.gguf else first
    context = fitting(first, context)
    ids, tokenizer, source = text_rows(first, text, rows, context)
    own = kind_of(first)
    if own and client is not None:
        raise DoctorError(
            _("--client {value}: {name} has no next-token logits to compare.", value=client, name=first.name),
            _("Verify without --client: embeddings and scores are compared by themselves."),
        )
    if own and choices.NAME in tasks:
        raise DoctorError(_("--tasks {task}: {name} has no next-token logits.", task=choices.NAME, name=first.name))
    prompts, decode = prompts_of(tokenizer, ids)
    if memory is None:
        free = device_free(device)
        memory = (free_memory() if free is None else free) // 2
    with quiet(), device_memory(device):
        measured = compare_own(first, second, ids, own, progress, device) if own else None
        comparison = None if own else compare(first, second, ids, prompts, decode, memory, progress, device, logprobs)

    # A 16-bit model, say a fine-tune against its base, has no plan: whether it could be quantized is another question.
    plain = quantization(second) is None and not second.gguf
    recipe, rules = stored_recipe(second, Recipe()), load_rules()
    if plain:
        rules = [r for r in rules if "recipe" not in closure(r.facts)]
    store = header_facts(second, recipe)
    scanned = scan(second, store)
    if comparison is not None:
        store.put(COMPARISON, comparison)
    if measured is not None:
        store.put(OWN_MEASURE, measured)
    served = second.root / second.gguf[0].files[0].name if second.gguf else second.root
    proof = (
        prove_loading(served, python=python if client == "llama.cpp" else None) if load_proof and not plain else None
    )
    if proof is not None:
        store.put(LOAD_PROOF, proof)
    ran = None
    if client is not None:
        ran = run_client(client, python, served, ids, logprobs or [], rounds=rounds_inputs(second))
        store.put(CLIENT_RUN, ran)
    if device != "cpu":
        store.put(SLOWER_PATHS, tuple(filter(None, [cuda.note(device)])))
    findings, runs = judge(store, rules)
    extra: dict[str, Any] = {
        **({"comparison": asdict(comparison)} if comparison is not None else {}),
        **({"own_measure": asdict(measured)} if measured is not None else {}),
        "text": {"source": source, "rows": len(ids), "context": context, "stride": context},
        "machine": describe(),
        "run": run_figures(first, second),
        "plain": plain,
    }
    if proof is not None:
        extra["load_proof"] = asdict(proof)
    if tasks:
        extra["tasks"] = [asdict(found) for found in _scores(first, second, tokenizer, tasks, python, device, progress)]
    if ran is not None:
        extra["client_run"] = asdict(ran)
    if comparison is not None and not comparison.generated:
        extra["not_generated"] = _(
            "a whole model in float32 does not fit the {gib:.1f} GiB given to it; --memory raises it",
            gib=memory / 2**30,
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


def _scores(
    first: Checkpoint,
    second: Checkpoint,
    tokenizer: Any,
    tasks: Sequence[str],
    python: str | None,
    device: str,
    progress: Callable[[str, int, int], None],
) -> list[TaskScore]:
    """Of the task that doctor has, and of the harness's."""
    found = []
    if choices.NAME in tasks:
        if tokenizer is None:
            raise DoctorError(
                _("--tasks {name}: needs a tokenizer, but the text came as ids.", name=choices.NAME),
                _("Give text, or none."),
            )
        with quiet(), device_memory(device):
            found.append(choices.choose(first, second, tokenizer, device, progress))
    others = [name for name in tasks if name != choices.NAME]
    return found + (run_tasks(first.root, second.root, others, python) if others else [])


def _require_reader(quantized: Checkpoint, client: str | None) -> None:
    """Raises DoctorError where the client does not read files of this container."""
    if client is not None and (client == "llama.cpp") != bool(quantized.gguf):
        raise DoctorError(
            _("--client {client}: does not read {name}.", client=client, name=quantized.name),
            _("llama.cpp reads GGUF; transformers and vllm read safetensors."),
        )
