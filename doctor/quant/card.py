"""README.md of a quantized checkpoint: what it was made of, how, and how far it is from its original.

It holds no times, no paths and no name of the output, so that the same run writes the same bytes. The front matter of
the original's card is kept as it is written; keys that it lacks are added below. What the original's card says follows
under a heading.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import DoctorError
from doctor.core.recipe import Recipe
from doctor.core.records import CalibrationFacts
from doctor.core.version import __version__
from doctor.fixing.receipt import RECEIPT
from doctor.formats.registry import format_of
from doctor.formats.schemes import name_of, with_others
from doctor.lint.engine import Report

CARD = "README.md"
MOST_BYTES = 1 << 20  # of an original's card that is kept
MOST_FRONT = 1 << 16  # characters of its front matter that are parsed
_FRONT = re.compile(r"\A---[ \t]*\r?\n(.*?)^---[ \t]*\r?\n?", re.DOTALL | re.MULTILINE)
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_CACHED = re.compile(r"/models--([\w.-]+?)--([\w.-]+)/snapshots/")


def card(
    original: Checkpoint,
    recipe: Recipe,
    calibration: CalibrationFacts | None,
    report: Report,
    notes: list[str],
) -> str:
    """The text of README.md of an output."""
    front, body = _of_original(original)
    base = base_model(original)
    lines = [
        f"# {(base or original.name).rpartition('/')[2]} · {with_others(name_of(recipe) or recipe.label(), recipe)}",
        "",
        f"{base or original.name}, quantized with doctor {__version__}.",
        "",
        "| | |",
        "|---|---|",
    ]
    lines += [f"| {label} | {_cell(text)} |" for label, text in _rows(recipe, calibration, report)]
    if notes:
        lines += ["", *(f"- {_cell(note)}" for note in notes)]
    lines += ["", f"{RECEIPT} is the receipt: the recipe, the calibration and what became of each linear.", ""]
    if body:
        lines += ["## The card of the original", "", body.strip(), ""]
    return "---\n" + _front_matter(front, base, recipe) + "---\n\n" + "\n".join(lines)


def base_model(original: Checkpoint) -> str:
    """org/name of the original on the Hub, "" where nothing says it."""
    cached = _CACHED.search(f"{original.root}/")
    if cached:
        return f"{cached[1]}/{cached[2]}"
    named = (original.value("config.json") or {}).get("_name_or_path")
    return named if isinstance(named, str) and _REPOSITORY.fullmatch(named) else ""


def _of_original(original: Checkpoint) -> tuple[str, str]:
    """(front matter, the rest) of the original's card; ("", "") without one that can be kept."""
    entry = original.entries.get(CARD)
    if entry is None or entry.size > MOST_BYTES:
        return "", ""
    try:
        text = original.read_file(CARD, MOST_BYTES).decode("utf-8")
    except (DoctorError, UnicodeDecodeError):
        return "", ""
    found = _FRONT.match(text)
    if found is None:
        return "", text
    return (found[1] if isinstance(_parsed(found[1]), dict) else ""), text[found.end() :]


def _front_matter(front: str, base: str, recipe: Recipe) -> str:
    """The original's, with the keys that it lacks and that a quantized model has on the Hub."""
    stated = _parsed(front) or {}
    added: dict[str, Any] = {"base_model": base} if base else {}
    added |= {"base_model_relation": "quantized", "library_name": "transformers", "tags": [_tag(recipe), "doctor"]}
    form = format_of(recipe)
    if form.in_blocks:
        added["library_name"] = "gguf"
    elif not form.client:
        del added["library_name"]  # transformers does not read it
    more = {key: value for key, value in added.items() if key not in stated}
    front = front if not front or front.endswith("\n") else front + "\n"
    return front + (yaml.safe_dump(more, sort_keys=False) if more else "")


def _parsed(front: str) -> Any:
    if len(front) > MOST_FRONT:
        return None
    try:
        return yaml.safe_load(front)
    except (yaml.YAMLError, ValueError, RecursionError):  # a date that does not exist, brackets a thousand deep
        return None


def _tag(recipe: Recipe) -> str:
    return (name_of(recipe) or recipe.name).lower().replace("_", "-")


def _rows(recipe: Recipe, calibration: CalibrationFacts | None, report: Report) -> list[tuple[str, str]]:
    """(what, numbers) of the table."""
    run, compared = report.extra.get("run", {}), report.extra.get("comparison")
    outcomes = [x["outcome"] for x in report.linears if isinstance(x, dict)]
    rows = [
        ("recipe", with_others(name_of(recipe) or recipe.label(), recipe)),
        ("format", format_of(recipe).label),
        ("linears", ", ".join(f"{outcomes.count(kind):,} {kind}" for kind in sorted(set(outcomes)))),
    ]
    if calibration is not None:
        rows.append(("calibration", f"{calibration.source}: {calibration.rows} rows, {calibration.tokens:,} tokens"))
    if run:
        before, after = map(_size, (run["source_bytes"], run["output_bytes"]))
        rows.append(("size", f"{before} → {after}, {run['bits']:.2f} bits a weight"))
    if compared:
        before, after = compared["perplexity_original"], compared["perplexity_quantized"]
        text = report.extra["text"]
        rows += [
            ("perplexity", f"{before:.4g} → {after:.4g}{_span(compared['ratio_span'], 'times')}"),
            ("KL divergence", f"{compared['kl_mean']:.4g} nats{_span(compared['kl_span'])}"),
            ("same next token", f"{compared['top1_agreement']:.1%}"),
            ("measured on", f"{text['source']}: {text['rows']} rows of {text['context']}, none of them calibrated it"),
        ]
    return rows


def _size(nbytes: int) -> str:
    unit = next((u for u in (10**9, 10**6) if nbytes >= u), 10**3)
    return f"{nbytes / unit:.3g} {'GB' if unit == 10**9 else 'MB' if unit == 10**6 else 'kB'}"


def _span(span: tuple[float, float], unit: str = "") -> str:
    """`, 0.07 to 0.11 in 95 of 100 resamplings`; "" where it is not known."""
    if not all(map(math.isfinite, span)):
        return ""
    return f" ({span[0]:.4g} to {span[1]:.4g}{' ' + unit if unit else ''} in 95 of 100 resamplings of the rows)"


def _cell(text: str) -> str:
    """Text that ends no cell and no line."""
    return " ".join(str(text).replace("|", "\\|").split())
