"""The pictures of a page as numbers for page.html: bars, shades and their tooltips. Nothing here knows SVG."""

import math
from typing import Any

from doctor.locale.catalogue import say, translated
from doctor.report.text import figure, number, safe

# Exponents of float16: the least subnormal is 2^-24, the least normal 2^-14, the largest value just below 2^16.
_FP16_LOWEST, _FP16_NORMAL, _FP16_HIGHEST = -24, -14, 15


def strips(strip: dict | None) -> list[dict]:
    """Bars of each row, heights 0 to 1 against the row's own largest."""
    rows = []
    for label, values in (strip or {}).items():
        numbers = [abs(v) for v in values if isinstance(v, (int, float)) and v == v and abs(v) != float("inf")]
        top = max(numbers, default=0)
        bars = [
            1.0
            if isinstance(v, str) or (v is not None and (v != v or abs(v) == float("inf")))
            else abs(v or 0) / top
            if top
            else 0.0
            for v in values
        ]
        rows.append(
            {
                "label": translated(label),
                "top": top,
                "bars": bars,
                "values": values,
                "ticks": [b for b in range(len(bars)) if b % _tick(len(bars)) == 0],
            }
        )
    return rows


def block_errors(comparison: dict) -> list[dict]:
    rows = {say("each layer alone"): comparison.get("own_errors"), say("carried along"): comparison.get("block_errors")}
    return strips({label: errors for label, errors in rows.items() if errors})


def heat(found: dict | None) -> dict | None:
    """Cells (block, row, shade 0..1, is non-finite, tooltip) of the weights' picture."""
    if not found:
        return None
    cells = []
    for y, row in enumerate(found["roles"]):
        finite = [v for v in row["absmax"] if isinstance(v, (int, float))]
        top = max(finite, default=0) or 1
        for x, value in enumerate(row["absmax"]):
            if value is None:
                continue
            bad = row["nonfinite"][x]
            label = say(
                "layer {layer} {role}: max |w| {absmax:.4g}, {zeros:.2%} zeros, {bad:,} NaN or Inf"
                if bad
                else "layer {layer} {role}: max |w| {absmax:.4g}, {zeros:.2%} zeros",
                layer=x,
                role=row["role"],
                absmax=value,
                zeros=row["zero"][x],
                bad=bad,
            )
            cells.append((x, y, round(0.08 + 0.92 * value / top, 3), bool(bad), label))
    tops = [max((v for v in r["absmax"] if isinstance(v, (int, float))), default=0) for r in found["roles"]]
    return {
        "blocks": found["blocks"],
        "roles": [r["role"] for r in found["roles"]],
        "tops": [f"{t:.3g}" for t in tops],
        "cells": cells,
        "ticks": [b for b in range(found["blocks"]) if b % _tick(found["blocks"]) == 0],
    }


def _tick(layers: int) -> int:
    """How many layers lie between two numbers under a picture."""
    return 1 if layers <= 12 else 5 if layers <= 60 else 10


def losses(linears: list, method: str) -> dict | None:
    """Cells of the quantization's picture: shade by error against the same role, red for what failed or fell back from
    the method.
    """
    rows = [x for x in linears if isinstance(x, dict) and x.get("block") is not None and x.get("solve")]
    if not rows:
        return None
    roles = list(dict.fromkeys(x["role"] for x in rows))
    worst = {
        r: max((x["solve"]["loss"] for x in rows if x["role"] == r and number(x["solve"]["loss"])), default=0) or 1
        for r in roles
    }
    cells = []
    for x in rows:
        loss, fell = x["solve"]["loss"], x.get("outcome") != method
        shade = round(0.08 + 0.92 * loss / worst[x["role"]], 3) if number(loss) else 1
        label = say(
            "{name}: {outcome}, relative error {loss}, damp {damp}",
            name=x["name"],
            outcome=x.get("outcome"),
            loss=small_percent(loss),
            damp=figure(x["solve"]["damp_used"]),
        )
        cells.append((x["block"], roles.index(x["role"]), shade, fell, safe(label)))
    blocks = 1 + max(x["block"] for x in rows)
    return {
        "blocks": blocks,
        "roles": roles,
        "tops": [small_percent(worst[r]) for r in roles],
        "cells": cells,
        "ticks": [b for b in range(blocks) if b % _tick(blocks) == 0],
    }


def exponents(found: dict | None) -> dict | None:
    """Bars (x, height, is beyond float16, tooltip) of the weights' exponents, on a logarithmic scale, and float16's
    range in the same units.
    """
    if not found or not found["counts"]:
        return None
    low = min(found["low"], _FP16_LOWEST) - 2
    high = max(found["low"] + len(found["counts"]) - 1, _FP16_HIGHEST) + 2
    width = 700 / (high - low + 1)
    top = math.log10(max(found["counts"]) + 1)
    bars = [
        {
            "x": f"{30 + (e - low) * width:.1f}",
            "w": f"{width * 0.86:.1f}",
            "h": f"{96 * math.log10(n + 1) / top:.1f}",
            "y": f"{100 - 96 * math.log10(n + 1) / top:.1f}",
            "bad": not _FP16_LOWEST <= e <= _FP16_HIGHEST,
            "label": f"2^{e}: {n:,} ({n / found['sampled']:.2%})",
        }
        for e, n in enumerate(found["counts"], found["low"])
        if n
    ]
    at = {
        name: f"{30 + (e - low) * width:.1f}"
        for name, e in (("lowest", _FP16_LOWEST), ("normal", _FP16_NORMAL), ("end", _FP16_HIGHEST + 1))
    }
    beyond = sum(n for e, n in enumerate(found["counts"], found["low"]) if e > _FP16_HIGHEST)
    lost = sum(n for e, n in enumerate(found["counts"], found["low"]) if e < _FP16_LOWEST)
    return {
        "bars": bars,
        "at": at,
        "ticks": [(e, f"{30 + (e - low + 0.43) * width:.1f}") for e in range(low, high + 1) if e % 4 == 0],
        "sampled": f"{found['sampled']:,}",
        "beyond": f"{beyond:,}",
        "lost": f"{lost:,}",
        "zeros": f"{found['zeros']:,}",
        "nonfinite": f"{found['nonfinite']:,}",
    }


def activations(found: dict | None) -> list[dict]:
    """Bars of the original's largest activations by layer."""
    if not found:
        return []
    return strips({say("residual"): list(found["residual"]), say("largest"): [size for _, size in found["blocks"]]})


def small_percent(share: Any) -> str:
    """A share as percent with two digits, however small."""
    return f"{share * 100:.2g} %" if number(share) else str(share)
