"""`doctor kvcache`: what the cache takes, how few bits its keys survive by the weights alone, and, if asked, by running
the model.
"""

import os
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import DoctorError
from doctor.core.host import describe
from doctor.core.messages import _
from doctor.core.recipe import Recipe
from doctor.evaluate.inputs import quiet, text_rows
from doctor.evaluate.kvcache import measure as measurement
from doctor.evaluate.kvcache.advice import conclude
from doctor.evaluate.kvcache.kv_report import KvReport
from doctor.evaluate.kvcache.layer_sizes import read_cache_layout
from doctor.evaluate.kvcache.layout import KIB, CacheLayout
from doctor.evaluate.kvcache.measure import WITHOUT_BIAS, with_widths
from doctor.evaluate.kvcache.predict import Fitness, bytes_read, predict
from doctor.evaluate.kvcache.quantizers import Side
from doctor.evaluate.kvcache.schemes import Scheme, with_custom
from doctor.lint.engine import load_rules
from doctor.model.spec import build_spec
from doctor.quant.dequantize import as_float
from doctor.quant.device import device_memory, device_of
from doctor.quant.early import described, require_cached
from doctor.quant.solve import cuda
from doctor.scan import counters
from doctor.scan.header import header_facts
from doctor.scan.value_facts import ABSMAX, STATS

MEASURED_CONTEXT, MEASURED_ROWS = 512, 2
_BLOCK = re.compile(r"\.(\d+)\.")


def kvcache(
    path: str | os.PathLike | Checkpoint,
    *,
    context: int = 8192,
    batch: int = 1,
    memory: int | None = None,
    key_bits: int | None = None,
    value_bits: int | None = None,
    measure: bool = False,
    text: str | os.PathLike | None = None,
    rows: int = MEASURED_ROWS,
    measured_context: int = MEASURED_CONTEXT,
    device: str = "auto",
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> KvReport:
    """KvReport of a checkpoint. context: tokens a sequence keeps; batch: sequences at a time; memory: bytes for weights
    and cache.

    key_bits, value_bits: one more scheme with these widths (2 to 8, or 16). measure: also run the model on `text` (rows
    of measured_context tokens; the half of Python's documentation that no calibration sees by default). device: where
    layers are simulated and the model is run. say: gets a line before weights are read. Raises DoctorError for
    impossible options, MachineError for a device that is not there, BadCheckpoint where config.json is absent or does
    not give the sizes. Of a GGUF model, metadata give them, and weights are decoded as they are read.
    """
    checkpoint = path if isinstance(path, Checkpoint) else Checkpoint.open(path)
    require_cached(checkpoint, context=context, batch=batch, rows=rows, text=text, measure=measure)
    device = device_of(device)
    source, checkpoint = checkpoint, described(checkpoint)
    config = checkpoint.value("config.json") or {}
    with quiet(), device_memory(device):
        spec = build_spec(config, checkpoint.tensors)
        layout = read_cache_layout(spec)
        weights = source.total_bytes if source.gguf else sum(info.nbytes for info in checkpoint.tensors.values())
        data = {
            "architecture": spec.architecture or spec.model_type,
            "context": context,
            "batch": batch,
            "memory_bytes": memory,
            "weight_bytes": weights,
            "max_positions": spec.max_positions,
            "layers": list(map(str, layout.kinds())),
            "kinds": [[m.template, dict(m.values)] for m in layout.kinds()],
            "windows": layout.windows,
            "notes": [*layout.notes, *filter(None, [cuda.note(device)])],
            "schemes": [
                _scheme_row(layout, s, context, batch, memory, weights) for s in with_custom(key_bits, value_bits)
            ],
        }
        if layout.expanded:
            full = CacheLayout(layout.expanded)
            data["full_heads"] = [
                _scheme_row(full, s, context, batch, memory, weights) for s in with_custom(key_bits, value_bits)
            ]
        _add_fitness(data, checkpoint, layout, key_bits, device, progress, say)
        if measure:
            _add_measured(
                data,
                as_float(source) if source.gguf else checkpoint,  # with the tokenizer that metadata gives
                layout,
                with_widths(key_bits, value_bits),
                text,
                rows,
                measured_context,
                device,
                progress,
            )
    data["machine"] = describe()
    return KvReport(checkpoint.name, data)


def _scheme_row(
    layout: CacheLayout, scheme: Scheme, context: int, batch: int, memory: int | None, weights: int
) -> dict:
    total = layout.total_bytes(scheme, context, batch)
    row = asdict(scheme) | {"kib_per_token": layout.bytes_per_token(scheme) / KIB, "total_bytes": total}
    if layout.windows:
        row["kib_per_token_past_windows"] = layout.bytes_per_token(scheme, layout.windows[-1]) / KIB
    if memory is not None:
        most = layout.largest_context(scheme, memory - weights, batch)
        row |= {"fits": total <= memory - weights, "unbounded": most is None, "largest_context": most}
    return row


def key_biases(checkpoint: Checkpoint) -> dict[int, dict]:
    """block -> its key bias: name, largest |value|, and the fewest bits that the rules give its keys. Reads the biases,
    nothing else.
    """
    load_rules()  # the fact key_bits is declared by the rule that warns of such biases
    store = header_facts(checkpoint, Recipe())
    found = {}
    for name, info in checkpoint.tensors.items():
        place = _BLOCK.search(name)
        if place is None or not name.endswith(".bias") or not counters.can_scan(info.dtype.name):
            continue
        subject = f"tensor:{name}"
        store.put(STATS, counters.scan(checkpoint.load(name).tobytes(), info.dtype.name), subject)
        bits = store.value("key_bits", subject)
        if bits is not None:
            found[int(place[1])] = {"tensor": name, "absmax": store.get(ABSMAX, subject), "key_bits": bits}
    return found


def _add_fitness(
    data: dict,
    checkpoint: Checkpoint,
    layout: CacheLayout,
    key_bits: int | None,
    device: str,
    progress: Callable[[str, int, int], None],
    say: Callable[[str], None],
) -> None:
    biases: dict[int, dict] = {}
    fits: list[Fitness] = []
    reason = ""
    if not checkpoint.tensors:
        reason = _("there are no weights to look at.")
    else:
        biases = key_biases(checkpoint)
        more = {f"{key_bits}-bit": Side("int", key_bits)} if key_bits and key_bits < 16 else {}
        try:
            view = as_float(checkpoint)
            spec = build_spec(view.value("config.json") or {}, view.tensors)
            say(
                _(
                    "kvcache: reads {size:.2f} GiB of weights, those that make queries and keys, layer by layer",
                    size=bytes_read(view, spec, layout.layers) / 2**30,
                )
            )
            fits = predict(
                view, spec, layout.layers, more, lambda done, total: progress("predict", done, total), device
            )
        except DoctorError as error:
            reason = error.message
    errors = {f.block: f for f in fits}
    data["fitness"] = [
        {
            "layer": i,
            "bias_absmax": biases.get(i, {}).get("absmax"),
            "bias_key_bits": biases.get(i, {}).get("key_bits"),
            **(
                {
                    "errors": errors[i].errors,
                    "key_absmax": errors[i].key_absmax,
                    "peak": errors[i].peak,
                    "advice": errors[i].advice,
                }
                if i in errors
                else {}
            ),
        }
        for i in sorted(errors.keys() | biases.keys())
    ]
    data["not_predicted"] = reason
    data["advice"] = conclude(fits, biases, len(layout.layers), reason)


def _add_measured(
    data: dict,
    checkpoint: Checkpoint,
    layout: CacheLayout,
    schemes,
    text,
    rows: int,
    context: int,
    device: str,
    progress,
) -> None:
    if any(x.kind == "latent" for x in layout.layers):
        data["not_measured"] = _("its cache holds latent vectors, and transformers runs the model on full heads")
        return
    try:
        ids, _tokenizer, source = text_rows(checkpoint, Path(text) if text is not None else None, rows, context)
        found = measurement.measure(
            checkpoint, ids, schemes, lambda done, total: progress("measure", done, total), device
        )
    except DoctorError as error:
        data["not_measured"] = error.message
        return
    data["measured"] = {
        "source": source,
        "tokens": sum(r.shape[1] - 1 for r in ids),
        "rows": len(ids),
        "context": max(r.shape[1] for r in ids),
        "schemes": [asdict(m) for m in found],
    }
    if not any(m.scheme == WITHOUT_BIAS for m in found):
        data["measured"]["note"] = _("the keys have no bias, so there is none to store apart")
