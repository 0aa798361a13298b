"""`doctor kvcache`: what the cache takes, how few bits its keys survive by the weights alone, and, if asked, by running
the model.
"""

import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import BadCheckpoint, DoctorError
from doctor.core.host import describe
from doctor.core.recipe import Recipe
from doctor.core.version import __version__
from doctor.evaluate.kvcache import measure as measurement
from doctor.evaluate.kvcache.measure import WITHOUT_BIAS, with_widths
from doctor.evaluate.kvcache.predict import BROKEN, FINE, FP16_MAX, Fitness, advice, predict
from doctor.evaluate.kvcache.quantizers import Side
from doctor.evaluate.kvcache.size import KIB, Layout, Scheme, read_layout, with_custom
from doctor.evaluate.verify import _rows as text_rows
from doctor.evaluate.verify import quiet
from doctor.lint.engine import load_rules
from doctor.model.spec import build_spec
from doctor.quant.dequantize import as_float
from doctor.quant.device import device_memory, device_of
from doctor.quant.solve import cuda
from doctor.scan import counters
from doctor.scan.header import header_facts

SCHEMA = "doctor.kvcache/1"
MEASURED_CONTEXT, MEASURED_ROWS = 512, 2
_BLOCK = re.compile(r"\.(\d+)\.")


@dataclass
class KvReport:
    """What was found, as plain data: `data` is what other reports carry under extra["kvcache"]."""

    checkpoint: str
    data: dict
    version: str = __version__

    @property
    def extra(self) -> dict:
        return {"kvcache": self.data}

    def to_dict(self) -> dict:
        return {"schema": SCHEMA, "version": self.version, "checkpoint": self.checkpoint, **self.extra}


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
    device: str = "cpu",
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> KvReport:
    """KvReport of a checkpoint. context: tokens a sequence keeps; batch: sequences at a time; memory: bytes for weights
    and cache.

    key_bits, value_bits: one more scheme with these widths (2 to 8, or 16). measure: also run the model on `text` (rows
    of measured_context tokens; the half of Python's documentation that no calibration sees by default). device: where
    layers are simulated and the model is run. Raises DoctorError for impossible options, MachineError for a device that
    is not there, BadCheckpoint where config.json is absent or does not give the sizes.
    """
    for name, value in (("--context", context), ("--batch", batch), ("rows", rows)):
        if value < 1:
            raise DoctorError(f"{name} {value}: must be 1 or more.")
    device = device_of(device)
    checkpoint = path if isinstance(path, Checkpoint) else Checkpoint.open(path)
    config = checkpoint.value("config.json")
    if config is None:
        raise BadCheckpoint(f"{checkpoint.name}: config.json is absent or broken; the cache's shape stands there.")
    with quiet(), device_memory(device):
        spec = build_spec(config, checkpoint.tensors)
        layout = read_layout(spec)
        weights = sum(info.nbytes for info in checkpoint.tensors.values())
        data = {
            "architecture": spec.architecture or spec.model_type,
            "context": context,
            "batch": batch,
            "memory_bytes": memory,
            "weight_bytes": weights,
            "max_positions": spec.max_positions,
            "layers": layout.describe(),
            "kinds": [list(k) for k in layout.kinds()],
            "windows": layout.windows,
            "notes": [*layout.notes, *filter(None, [cuda.note(device)])],
            "schemes": [
                _scheme_row(layout, s, context, batch, memory, weights) for s in with_custom(key_bits, value_bits)
            ],
        }
        if layout.expanded:
            full = Layout(layout.expanded)
            data["full_heads"] = [
                _scheme_row(full, s, context, batch, memory, weights) for s in with_custom(key_bits, value_bits)
            ]
        _add_fitness(data, checkpoint, layout, key_bits, device, progress)
        if measure:
            _add_measured(
                data,
                checkpoint,
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


def from_dict(document: dict) -> KvReport:
    """The KvReport of a document that `doctor kvcache -f json` wrote. Raises DoctorError for what is none."""
    if document.get("schema") != SCHEMA or not isinstance(document.get("kvcache"), dict):
        raise DoctorError(
            f"not a report on a cache: the schema must be {SCHEMA!r}.",
            "Make one with `doctor kvcache CHECKPOINT -f json:kv.json`.",
        )
    return KvReport(str(document.get("checkpoint", "")), document["kvcache"], str(document.get("version", "")))


def _scheme_row(layout: Layout, scheme: Scheme, context: int, batch: int, memory: int | None, weights: int) -> dict:
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
        store.put(subject, "stats", counters.scan(checkpoint.load(name).tobytes(), info.dtype.name))
        bits = store.get(subject, "key_bits")
        if bits is not None:
            found[int(place[1])] = {"tensor": name, "absmax": store.get(subject, "absmax"), "key_bits": bits}
    return found


def _add_fitness(
    data: dict, checkpoint: Checkpoint, layout: Layout, key_bits: int | None, device: str, progress
) -> None:
    biases, fits, reason = {}, [], ""
    if not checkpoint.tensors:
        reason = "there are no weights to look at"
    else:
        biases = key_biases(checkpoint)
        more = {f"{key_bits}-bit": Side("int", key_bits)} if key_bits and key_bits < 16 else {}
        try:
            view = as_float(checkpoint)
            spec = build_spec(view.value("config.json"), view.tensors)
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


def conclude(fits: list[Fitness], biases: dict[int, dict], layers: int, reason: str = "") -> dict:
    """The advice for the whole model: level "Q4", "Q6", "never Q4" or "unknown", and sentences that say why and what to
    do.

    parts are the same sentences as [words, values], for renderings in another language. The simulation decides where
    there is one, since a large bias does no harm where the signal is large too; else the biases do.
    """
    level, parts = _judged(fits, biases, layers, reason.removesuffix("."))
    return {
        "level": level,
        "sentences": [words.format(**values) for words, values in parts],
        "parts": [list(p) for p in parts],
    }


def _judged(
    fits: list[Fitness], biases: dict[int, dict], layers: int, reason: str
) -> tuple[str, list[tuple[str, dict]]]:
    if fits:
        level, parts = _by_simulation(fits, layers)
        large = max(biases, key=lambda i: biases[i]["absmax"], default=None)
        if level == "Q4" and large is not None and biases[large]["key_bits"] > 4:
            parts.append(
                (
                    LARGE_BIAS,
                    {"layer": large, "size": f"{biases[large]['absmax']:.3g}", "bits": biases[large]["key_bits"]},
                )
            )
        return level, parts
    if not biases:
        return "unknown", [
            (NOT_JUDGED, {"reason": reason or "there is no layer with plain keys"}),
            (UNJUDGED_CHOICE, {}),
        ]
    worst = max(biases, key=lambda i: biases[i]["absmax"])
    level = {4: "Q4", 6: "Q6", 8: "never Q4"}[max(b["key_bits"] for b in biases.values())]
    return level, [
        (BY_BIAS, {"reason": reason, "size": f"{biases[worst]['absmax']:.3g}", "layer": worst}),
        (WHAT_TO_DO[level], {}),
    ]


WHAT_TO_DO = {
    "Q4": "Q4 is fine where memory is short; verify recall over long contexts, which no short test shows. Q6 and Q8 cost next to nothing.",
    "Q6": "Take Q6 (8-bit keys, 4-bit values): ExLlamaV2 Q6, llama.cpp --cache-type-k q8_0 --cache-type-v q4_0. Q4 costs some quality.",
    "never Q4": "Never store these keys in 4 bits. Take Q6 (8-bit keys, 4-bit values): ExLlamaV2 Q6, llama.cpp --cache-type-k q8_0 "
    "--cache-type-v q4_0; Q8 where memory allows. In vLLM leave the cache dtype on auto.",
}
_MOVES = "4-bit keys move the attention logits of layer {layer} by {error} (rms), more than those of any other layer: "
MOVES = {
    "Q4": _MOVES + f"below {FINE:g}, where 4 bits cost a few percent of perplexity.",
    "Q6": _MOVES + f"between {FINE:g} and {BROKEN:g}, where text gets worse.",
    "never Q4": _MOVES + f"above {BROKEN:g}, where heads attend to the wrong tokens.",
}
LARGE_BIAS = (
    "The key bias of layer {layer} reaches {size}, by its size alone a reason for {bits} bits; against this layer's queries it weighs "
    "little. --measure settles it."
)
NOT_JUDGED = "Not judged: {reason}."
UNJUDGED_CHOICE = "Q8 is the choice that needs no judgement; --measure decides."
BY_BIAS = (
    "By the key biases alone (the layers could not be simulated: {reason}): the largest is {size}, in layer {layer}."
)
FP8_WORSE = "FP8 (e5m2) keys move them by {fp8}, more than 4-bit keys do, and take more room."
BAD_LAYERS = "{n} of {layers} layers are this bad ({list}): an engine with a type per layer needs wide keys only there."
EIGHT_BITS = "There 8-bit keys move the logits by at most {eight}, FP8 (e5m2) by {fp8}."
MEASURE_FIRST = EIGHT_BITS + " Run --measure before relying on 8 bits."
PEAK = "q·k reaches {peak} in layer {layer}: attention that multiplies in float16 before it scales overflows (65,504), whatever the cache."
SENTENCES = (
    *WHAT_TO_DO.values(),
    *MOVES.values(),
    LARGE_BIAS,
    NOT_JUDGED,
    UNJUDGED_CHOICE,
    BY_BIAS,
    FP8_WORSE,
    BAD_LAYERS,
    EIGHT_BITS,
    MEASURE_FIRST,
    PEAK,
)


def _by_simulation(fits: list[Fitness], layers: int) -> tuple[str, list[tuple[str, dict]]]:
    worst = max(fits, key=lambda f: _sortable(f.errors["4-bit"]))
    error = worst.errors["4-bit"]
    level = advice(error)
    parts = [(MOVES[level], {"layer": worst.block, "error": f"{error:.2f}"}), (WHAT_TO_DO[level], {})]
    eight, fp8 = (max((f.errors[k] for f in fits), key=_sortable) for k in ("8-bit", "FP8"))
    if level != "never Q4" and not fp8 <= error:
        parts.append((FP8_WORSE, {"fp8": f"{fp8:.2f}"}))
    if level == "never Q4":
        bad = [f.block for f in fits if f.advice == "never Q4"]
        parts.append((BAD_LAYERS, {"n": len(bad), "layers": layers, "list": _listed(bad)}))
        parts.append((EIGHT_BITS if eight <= BROKEN else MEASURE_FIRST, {"eight": f"{eight:.2f}", "fp8": f"{fp8:.2f}"}))
    peak = max(fits, key=lambda f: _sortable(f.peak))
    if not peak.peak <= FP16_MAX:
        parts.append((PEAK, {"peak": f"{peak.peak:,.0f}", "layer": peak.block}))
    return level, parts


def _sortable(value: float) -> float:
    return value if value == value else float("inf")


def _listed(numbers: list[int], most: int = 8) -> str:
    return ", ".join(map(str, numbers[:most])) + (f" and {len(numbers) - most} more" if len(numbers) > most else "")


def _add_measured(
    data: dict, checkpoint: Checkpoint, layout: Layout, schemes, text, rows: int, context: int, device: str, progress
) -> None:
    if any(x.kind == "latent" for x in layout.layers):
        data["not_measured"] = "its cache holds latent vectors, and transformers runs the model on full heads"
        return
    try:
        ids, _, source = text_rows(checkpoint, Path(text) if text is not None else None, rows, context)
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
        data["measured"]["note"] = "the keys have no bias, so there is none to store apart"
