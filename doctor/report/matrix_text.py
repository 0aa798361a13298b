"""The matrix of recipes by GPU count as every format shows it: what stands in the way of all of them once, and in the
cells geometry alone.
"""

from typing import Any, NamedTuple

from doctor.locale.catalogue import say, translated

GEOMETRY = "G"  # the family whose rules ask for a recipe's shapes
Row = dict[str, Any]


class Shown(NamedTuple):
    """common: codes in the way of every recipe on any number of GPUs; rows: the matrix without them."""

    common: list[str]
    rows: list[Row]


def shown(rows: list[Row]) -> Shown:
    """The rows of a report's matrix, and what they have in common but for shapes. A step that changes no shape has no
    row.
    """
    cells = [set(cell["codes"]) for row in rows if row["step"] == "as it is" for cell in row["cells"]]
    common = {code for code in set.intersection(*cells) if not code.startswith(GEOMETRY)} if cells else set()
    kept: list[Row] = []
    for row in rows:
        left = [{**cell, "codes": [c for c in cell["codes"] if c not in common]} for cell in row["cells"]]
        left = [{**cell, "ready": not cell["codes"]} for cell in left]
        if row["step"] == "as it is" or left != kept[-1]["cells"]:
            kept.append({**row, "cells": left})
    return Shown(sorted(common), kept)


def in_every_way(common: list[str]) -> str:
    """The line above the matrix; "" where there is nothing to say."""
    return say("in the way of every recipe: {codes}", codes=", ".join(common)) if common else ""


def plan_row(row: dict) -> str:
    """What a row of the matrix is called; a step comes below its recipe."""
    return row["plan"] if row["step"] == "as it is" else f"… {translated(row['step'])}"


def blockers(cells: list[dict]) -> str:
    """`W201; 2+ GPUs also G302`."""
    everywhere = set.intersection(*(set(c["codes"]) for c in cells))
    more: dict[str, list[int]] = {}
    for cell in cells:
        for code in sorted(set(cell["codes"]) - everywhere):
            more.setdefault(code, []).append(cell["tp"])
    gpus: dict[tuple, list[str]] = {}
    for code, found in more.items():
        gpus.setdefault(tuple(found), []).append(code)
    last = cells[-1]["tp"]
    parts = [", ".join(sorted(everywhere))] if everywhere else []
    for counts, codes in gpus.items():
        upward = (
            list(counts) == [c["tp"] for c in cells if c["tp"] >= counts[0]] and counts[-1] == last and len(counts) > 1
        )
        where = f"{counts[0]}+" if upward else ", ".join(map(str, counts))
        parts.append(
            say("{n} GPUs also {codes}" if everywhere else "{n} GPUs {codes}", n=where, codes=", ".join(codes))
        )
    return "; ".join(parts)
