"""What a checkpoint on disk says about itself: its files, and what doctor's own receipt in it records."""

import hashlib
from typing import Any

from doctor.checkpoint.directory import Checkpoint

MOST_STEPS = 100  # of a receipt that are shown


def files(checkpoint: Checkpoint) -> list[dict]:
    """Rows {name, bytes, tensors, header_bytes} of shards, then of the other files; with sha256 where the run holds the
    whole file.
    """
    rows = [
        {"name": s.name, "bytes": s.size, "tensors": len(s.tensors), "header_bytes": s.header_bytes}
        for s in checkpoint.shards.values()
    ]
    held = {
        name: hashlib.sha256(file.raw).hexdigest()
        for name, file in checkpoint.json.items()
        if isinstance(file.raw, bytes)
    }
    return rows + [
        {"name": e.name, "bytes": e.size, **({"sha256": held[e.name]} if e.name in held else {})}
        for e in checkpoint.entries.values()
        if e.name not in checkpoint.shards
    ]


def receipt_summary(checkpoint: Checkpoint) -> dict:
    """What doctor itself did to this checkpoint, by the receipt in it: {source, plan, steps: [[code, title, safety]]};
    {} without one.
    """
    document = checkpoint.value("doctor.json") or {}
    if isinstance(document.get("outcomes"), dict):
        return quantization_summary(document)
    steps = document.get("steps")
    if not (isinstance(steps, list) and all(isinstance(s, dict) for s in steps)):
        return {}
    return {
        "source": str(document.get("source", "")),
        "plan": str(document.get("recipe", "")),
        "steps": [
            [str(s.get("code", "")), str(s.get("title", "")), str(s.get("safety", ""))] for s in steps[:MOST_STEPS]
        ],
    }


def quantization_summary(document: dict) -> dict:
    """The same of a quantization: its settings, its calibration, what became of the linears, and what a reader should
    know.
    """
    settings, text = _object(document.get("recipe")), _object(document.get("calibration"))
    kinds = ", ".join(f"{n} {kind}" for kind, n in document["outcomes"].items())
    asked = ", ".join(f"{k} {v}" for k, v in settings.items() if v not in ("", [], None))
    made = ", ".join(f"{name} {document[name]}" for name in ("doctor", "torch", "transformers") if name in document)
    rows = [("recipe", asked), ("linears", kinds), ("versions", made)]
    if text:
        rows.append(("calibration", f"{text.get('source')}: {text.get('rows')} rows, {text.get('tokens')} tokens"))
    rows += [("note", str(note)) for note in _list(document.get("notes"))]
    plan = f"{settings.get('method', '')} {settings.get('bits', '')}-bit".strip()
    return {"source": "", "plan": plan, "steps": [[kind, text, ""] for kind, text in rows if text][:MOST_STEPS]}


def _object(value: object) -> dict[str, Any]:
    """The value if it is an object, else an empty one: a receipt may come from anywhere."""
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
