"""One HTML file that asks the network for nothing: verdict, plans, findings, weights block by block, tokens, shapes, files, rules.

It works from the report alone, so `doctor render doctor.json -f html:report.html` gives the same page later. No script is
needed to read it; the report's JSON lies inside, for machines.
"""

import json
from functools import cache

from doctor import explain
from doctor.engine import Report
from doctor.report import json_report, markdown, view
from doctor.report.view import Group
from doctor.report.words import current, known, language, say

MOST_JSON = 120_000  # characters of JSON that are embedded; above, the page says how to get it
_WINDOW = 96


def render(reports: list[Report]) -> str:
    """The page of all reports."""
    return _template().render(reports=[_context(r) for r in reports], data=_embedded(reports), version=reports[0].version,
                              title=view.safe(", ".join(r.checkpoint for r in reports)), size=view.size, count=view.count, counted=view.counted, say=say, known=known, lang=current())


@cache
def _template():
    import jinja2

    folder = jinja2.PackageLoader("doctor", "report")
    environment = jinja2.Environment(loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
                                     keep_trailing_newline=True)
    return environment.get_template("page.html")


def _embedded(reports: list[Report]) -> str:
    """JSON that cannot end its script element."""
    with language("en"):
        text = json.dumps(json.loads(json_report.render(reports)), separators=(",", ":"))
    text = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return text if len(text) <= MOST_JSON else ""


def _context(report: Report) -> dict:
    found = view.groups(report)
    mark, sentence = view.verdict(report)
    by = view.fixable(found)
    extra = report.extra
    return {
        "name": view.safe(report.checkpoint), "mark": mark, "symbol": view.MARKS[mark], "sentence": sentence, "what": view.what_it_is(report),
        "plan": view.plan_text(report), "counts": view.counts(found), "run": view.ran(report), "skipped": view.skipped(report),
        "seconds": view.seconds(report.seconds), "read": view.size(report.bytes_read) if report.bytes_read else "",
        "fixes": {k: len(v) for k, v in by.items()}, "groups": [_card(report, g) for g in found], "areas": view.areas(report, found),
        "marks": view.MARKS, "steps": view.next_steps(report, found), "crashed": [(r.rule.code, view.safe(r.crashed)) for r in report.crashed],
        "matrix": [{**row, "why": view.blockers(row["cells"])} for row in extra.get("matrix", ())],
        "heat": _heat(extra.get("heat")), "losses": _losses(report.linears), "results": view.results(report),
        "replies": [tuple(map(view.safe, r)) for r in (extra.get("comparison") or {}).get("replies", ())],
        "block_errors": _strips({say("block output"): (extra.get("comparison") or {}).get("block_errors") or []})[0], "tokens": _tokens(extra.get("tokens", ())), "geometry": extra.get("geometry", ()),
        "group_size": report.recipe.group_size, "tp": report.recipe.tp, "files": extra.get("files", ()),
        "rules": [_rule(r) for r in report.runs], "skipped_tensors": {view.safe(k): view.safe(v) for k, v in report.skipped_tensors.items()}, "markdown": markdown.render([report]),
    }


def _card(report: Report, group: Group) -> dict:
    entry, first, where = view.page_rule(report, group.code), group.first, group.first.where
    place = view.safe(where.file) + view.spot(where)
    index = "" if where.index is None else "[" + ", ".join(map(str, where.index)) + "]"
    title, message = view.headline(group, entry)
    return {
        "group": group, "severity": first.severity, "code": group.code, "name": first.name, "title": title, "message": message, "place": place,
        "tensor": view.safe(where.tensor) + index if where.tensor else "", "byte": where.byte, "frame": _frame(where),
        "indent": _indent(where), "note": view.safe(where.note),
        "more": "" if group.folds_into_message else say("{n} more", n=len(group.all) - 1) + f": {group.names}",
        "table": first.facts_table, "strip": _strips(first.strip), "why": view.why(entry) if entry else "",
        "seen": view.elsewhere(entry, report, 4) if entry else (), "cures": view.cures(group, entry),
        "effects": ", ".join(f"{e.code} {e.first.name}" for e in group.effects), "page": _page(entry),
    }


def _page(entry) -> list[tuple[str, list[str]]]:
    if entry is None:
        return []
    return [(say(title), explain.paragraphs(entry.section(key, current()))) for key, title in explain.SECTIONS if entry.section(key)]


def _frame(where) -> list[tuple[int, str, str, str]]:
    """(line number, text before the marked part, marked part, text after)."""
    rows = []
    for number, line in where.frame:
        if number != where.line:
            rows.append((number, view.safe(view.window(line, 1, 1, _WINDOW)[0]), "", ""))
            continue
        text, at = view.window(line, where.column or 1, where.length or 1, _WINDOW)
        end = at - 1 + (where.length or 1)
        rows.append((number, view.safe(text[: at - 1]), view.safe(text[at - 1 : end]), view.safe(text[end:])))
    return rows


def _indent(where) -> int:
    """Characters before the marked part, to put the note under it; 0 where that would push the note off the page."""
    before = next((len(b) for n, b, _, _ in _frame(where) if n == where.line), 0)
    return before if before <= _WINDOW // 2 else 0


def _strips(strip: dict | None) -> list[dict]:
    """Bars of each row, heights 0 to 1 against the row's own largest."""
    rows = []
    for label, values in (strip or {}).items():
        numbers = [abs(v) for v in values if isinstance(v, (int, float)) and v == v and abs(v) != float("inf")]
        top = max(numbers, default=0)
        bars = [1.0 if isinstance(v, str) or (v is not None and (v != v or abs(v) == float("inf"))) else abs(v or 0) / top if top else 0.0
                for v in values]
        rows.append({"label": label, "top": top, "bars": bars, "values": values})
    return rows


def _heat(heat: dict | None) -> dict | None:
    """Cells (block, row, shade 0..1, is non-finite, tooltip) of the weights' picture."""
    if not heat:
        return None
    cells = []
    for y, row in enumerate(heat["roles"]):
        known = [v for v in row["absmax"] if isinstance(v, (int, float))]
        top = max(known, default=0) or 1
        for x, value in enumerate(row["absmax"]):
            if value is None:
                continue
            bad = row["nonfinite"][x]
            label = f"block {x} {row['role']}: max |w| {value:.4g}, {row['zero'][x]:.2%} zeros" + (f", {bad:,} NaN or Inf" if bad else "")
            cells.append((x, y, round(0.08 + 0.92 * value / top, 3), bool(bad), label))
    tops = [max((v for v in r["absmax"] if isinstance(v, (int, float))), default=0) for r in heat["roles"]]
    return {"blocks": heat["blocks"], "roles": [r["role"] for r in heat["roles"]], "tops": [f"{t:.3g}" for t in tops], "cells": cells,
            "ticks": [b for b in range(heat["blocks"]) if b % (5 if heat["blocks"] <= 60 else 10) == 0]}


def _losses(linears: list) -> dict | None:
    """Cells of the quantization's picture: shade by error against the same role, red for what failed or fell back."""
    rows = [x for x in linears if isinstance(x, dict) and x.get("block") is not None and x.get("solve")]
    if not rows:
        return None
    roles = list(dict.fromkeys(x["role"] for x in rows))
    worst = {r: max((x["solve"]["loss"] for x in rows if x["role"] == r and view.number(x["solve"]["loss"])), default=0) or 1 for r in roles}
    cells = []
    for x in rows:
        loss, fell = x["solve"]["loss"], x.get("outcome") not in ("gptq", "awq")
        shade = round(0.08 + 0.92 * loss / worst[x["role"]], 3) if view.number(loss) else 1
        label = f"{x['name']}: {x.get('outcome')}, relative error {_small(loss)}, damp {view.figure(x['solve']['damp_used'])}"
        cells.append((x["block"], roles.index(x["role"]), shade, fell, view.safe(label)))
    blocks = 1 + max(x["block"] for x in rows)
    return {"blocks": blocks, "roles": roles, "tops": [_small(worst[r]) for r in roles], "cells": cells,
            "ticks": [b for b in range(blocks) if b % (5 if blocks <= 60 else 10) == 0]}


def _small(share: object) -> str:
    """A share as percent with two digits, however small."""
    return f"{share * 100:.2g} %" if view.number(share) else str(share)


def _tokens(rows) -> dict | None:
    """Files as columns; a row disagrees where the ids that its files name differ."""
    if not rows:
        return None
    columns = list(dict.fromkeys(f for f in ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")
                                 for r in rows if f in r["says"]))
    return {"columns": columns, "rows": [{"token": r["token"].upper(), "cells": [r["says"].get(c, "") for c in columns],
                                          "differ": _differ(r["says"])} for r in rows]}


def _differ(says: dict) -> bool:
    """Whether two files name different tokens; a list agrees with each of its members, silence with everything."""
    named = [{part.split(" = ")[0].strip() for part in text.strip("[]").split(", ")} for text in says.values() if text not in ("", "null")]
    return bool(named) and not set.intersection(*named)


def _rule(run) -> dict:
    reason = max(run.reasons, key=run.reasons.get) if run.reasons else ""
    text = run.crashed or (known(reason) if run.status == "skipped" else say(f"no {run.rule.scope} to judge") if run.status == "not applicable" else
                           view.counted(run.judged, run.rule.scope))
    return {"code": run.rule.code, "name": run.rule.name, "area": run.rule.area, "status": run.status, "text": view.safe(text),
            "ms": f"{run.seconds * 1000:.1f} ms" if run.status == "run" else "",
            "mark": {"run": "✓", "skipped": "○", "crashed": "☠", "not applicable": "–"}[run.status]}
