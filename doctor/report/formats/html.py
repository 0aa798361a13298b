"""One HTML file that asks the network for nothing: verdict, recipes, findings, weights layer by layer, tokens, shapes,
files, rules.

It works from the report alone, so `doctor render doctor.json -f html:report.html` gives the same page later. No script
is needed to read it; the report's JSON lies inside, for machines.
"""

import json
import math
from functools import cache

from doctor.lint import explain
from doctor.lint.engine import Report
from doctor.locale import rule_pages
from doctor.locale.catalogue import counted, current, language, say, translated
from doctor.report import presentation, results, verdict
from doctor.report.drawings import activations, block_errors, exponents, heat, losses, small_percent, strips
from doctor.report.formats import json_report, markdown
from doctor.report.matrix_text import blockers, in_every_way, shown
from doctor.report.presentation import Group
from doctor.report.text import count, figure, number, safe, seconds, size, window

MOST_BYTES = 290_000  # of a page with its JSON; where it would grow beyond, the page says how to get the JSON


_WINDOW = 96


WORST = 10


def render(reports: list[Report]) -> str:
    """The page of all reports."""
    return page_of(
        [_context(r) for r in reports],
        None,
        _embedded(reports),
        reports[0].version,
        ", ".join(r.checkpoint for r in reports),
    )


def page_of(reports: list[dict], kv: dict | None, data: str, version: str, title: str) -> str:
    page = _rendered(reports, kv, "", version, title)
    fits = len(page.encode("utf-8", "replace")) + len(data) <= MOST_BYTES  # the JSON is ASCII
    return _rendered(reports, kv, data, version, title) if fits else page


def _rendered(reports: list[dict], kv: dict | None, data: str, version: str, title: str) -> str:
    return template().render(
        reports=reports,
        kv=kv,
        data=data,
        version=version,
        title=safe(title),
        size=size,
        count=count,
        counted=counted,
        say=say,
        translated=translated,
        lang=current(),
    )


@cache
def template(name: str = "page.html"):
    """A template of this folder; what it does not define is an error."""
    import jinja2

    folder = jinja2.PackageLoader("doctor.report", "formats")
    environment = jinja2.Environment(
        loader=folder,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    return environment.get_template(name)


def _embedded(reports: list[Report]) -> str:
    """JSON that cannot end its script element."""
    with language("en"):
        return inside_script(json_report.render(reports))


def inside_script(document: str) -> str:
    text = json.dumps(json.loads(document), separators=(",", ":"))
    text = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return text


def _context(report: Report) -> dict:
    found = presentation.groups(report)
    mark, sentence = verdict.verdict(report)
    by = presentation.fixable(found)
    extra, told = report.extra, results.results(report)
    return {
        "name": safe(report.checkpoint),
        "mark": mark,
        "symbol": presentation.MARKS[mark],
        "sentence": sentence,
        "what": verdict.what_it_is(report),
        "plan": verdict.plan_text(report),
        "counts": presentation.counts(found),
        "run": verdict.ran(report),
        "skipped": verdict.skipped(report),
        "seconds": seconds(report.seconds),
        "read": size(report.bytes_read) if report.bytes_read else "",
        "fixes": {k: len(v) for k, v in by.items()},
        "groups": [_card(report, g) for g in found],
        "areas": verdict.areas(report, found),
        "marks": presentation.MARKS,
        "steps": verdict.next_steps(report, found),
        "crashed": [(r.rule.code, safe(translated(r.crashed))) for r in report.crashed],
        **_matrix(extra.get("matrix", ())),
        "headline": results.headline(report),
        "heat": heat(extra.get("heat")),
        "losses": losses(report.linears, report.recipe.method),
        "results": told,
        "exponents": exponents(extra.get("exponents")),
        "calibration": _calibration(extra.get("calibration")),
        "worst": _worst(report.linears),
        "half": activations((extra.get("comparison") or {}).get("half")),
        "receipt": _receipt(extra.get("receipt"), told),
        "machine": _machine(report),
        "replies": [tuple(map(safe, r)) for r in (extra.get("comparison") or {}).get("replies", ())],
        "block_errors": block_errors(extra.get("comparison") or {}),
        "tokens": _tokens(extra.get("tokens", ())),
        "geometry": extra.get("geometry", ()),
        "group_size": report.recipe.group_size,
        "tp": report.recipe.tp,
        "odd_tp": len((extra.get("matrix") or [{"cells": ()}])[0]["cells"]) > 4,
        "when": safe((extra.get("machine") or {}).get("when", "")),
        "config_sha256": next(
            (f["sha256"] for f in extra.get("files", ()) if f["name"] == "config.json" and "sha256" in f), ""
        ),
        "files": [{**f, "name": safe(f["name"])} for f in extra.get("files", ())],
        "rules": [_rule(r) for r in report.runs],
        "rules_in_short": _rules_in_short(report),
        "skipped_tensors": {safe(k): safe(translated(v)) for k, v in report.skipped_tensors.items()},
        "markdown": markdown.render([report]),
    }


def _matrix(rows: list[dict]) -> dict:
    """The matrix, and the line above it."""
    common, left = shown(list(rows))
    return {"matrix": [{**row, "why": blockers(row["cells"])} for row in left], "common": in_every_way(common)}


def _card(report: Report, group: Group) -> dict:
    entry, first, where = presentation.page_rule(report, group.code), group.first, group.first.where
    place = safe(where.file) + presentation.spot(where)
    index = "" if where.index is None else "[" + ", ".join(map(str, where.index)) + "]"
    title, message = presentation.headline(group, entry)
    return {
        "group": group,
        "severity": first.severity,
        "code": group.code,
        "name": first.name,
        "title": title,
        "message": message,
        "place": place,
        "tensor": safe(where.tensor) + index if where.tensor else "",
        "byte": where.byte,
        "frame": _frame(where),
        "indent": _indent(where),
        "note": safe(translated(where.note)),
        "more": "" if group.folds_into_message else say("{n} more", n=len(group.all) - 1) + f": {group.names}",
        "table": presentation.table(first),
        "strip": strips(first.strip),
        "why": presentation.why(entry) if entry else "",
        "seen": presentation.elsewhere(entry, report, 4) if entry else (),
        "fixes": presentation.fixes(group, entry, report),
        "effects": ", ".join(f"{e.code} {e.first.name}" for e in group.effects),
        "page": _page(entry),
    }


def _page(entry) -> list[tuple[str, list[str]]]:
    if entry is None:
        return []
    return [
        (translated(title), explain.paragraphs(rule_pages.section(entry, key, current())))
        for key, title in explain.SECTIONS
        if entry.section(key)
    ]


def _frame(where) -> list[tuple[int, str, str, str]]:
    """(line number, text before the marked part, marked part, text after)."""
    rows = []
    for at_line, line in where.frame:
        if at_line != where.line:
            rows.append((at_line, safe(window(line, 1, 1, _WINDOW)[0]), "", ""))
            continue
        text, at = window(line, where.column or 1, where.length or 1, _WINDOW)
        end = at - 1 + (where.length or 1)
        rows.append(
            (
                at_line,
                safe(text[: at - 1]),
                safe(text[at - 1 : end]),
                safe(text[end:]),
            )
        )
    return rows


def _indent(where) -> int:
    """Characters before the marked part, to put the note under it; 0 where that would push the note off the page."""
    before = next((len(b) for n, b, _, _ in _frame(where) if n == where.line), 0)
    return before if before <= _WINDOW // 2 else 0


def _calibration(facts: dict | None) -> list[tuple[str, str]]:
    if not facts:
        return []
    lengths = f"{facts['shortest']:,} / {facts['median']:,} / {facts['longest']:,}"
    return [
        (
            say("source"),
            safe(facts["source"]) + (say(" (doctor's own texts)") if facts["builtin"] else ""),
        ),
        (say("rows"), f"{facts['rows']:,}"),
        (say("tokens"), f"{facts['tokens']:,}"),
        (say("shortest / median / longest row"), lengths),
        (say("distinct tokens"), f"{facts['distinct_tokens']:,}"),
        (say("rows that repeat another"), f"{facts['duplicate_rows']:,}"),
        (say("padding tokens"), f"{facts['padding']:,}"),
        (say("rows with two BOS tokens"), f"{facts['bos_doubled']:,}"),
        *([(say("scripts"), safe(", ".join(facts["scripts"])))] if facts["scripts"] else []),
    ]


def _worst(linears: list) -> list[tuple[str, ...]]:
    """The linears with the largest error: name, how, error, that of plain rounding, damp, tokens seen."""
    done = [x for x in linears if isinstance(x, dict) and x.get("solve") and x.get("outcome") != "kept"]
    done.sort(key=lambda x: -x["solve"]["loss"] if number(x["solve"]["loss"]) else -math.inf)
    return [
        (
            safe(x["name"]),
            str(x.get("outcome")),
            small_percent(x["solve"]["loss"]),
            small_percent(x["solve"].get("rtn_loss")),
            figure(x["solve"].get("damp_used")),
            f"{x['hessian']['tokens']:,}" if x.get("hessian") else "",
        )
        for x in done[:WORST]
    ]


def _receipt(found: dict | None, told: list[tuple[str, str]]) -> dict | None:
    """What the receipt holds besides what the results above it tell."""
    if not found:
        return None
    rows = [tuple(map(safe, s)) for s in found["steps"]]
    return {
        **{k: safe(found[k]) for k in ("source", "plan")},
        "steps": [row for row in rows if (translated(row[0]), row[1]) not in told],
    }


def _machine(report: Report) -> list[tuple[str, str]]:
    """(what, text) of where the run took place, and how long it took; [] for a report that does not say."""
    rows = machine_rows(report.extra.get("machine"))
    return [*rows, (say("seconds"), seconds(report.seconds))] if rows else []


def machine_rows(found: dict | None) -> list[tuple[str, str]]:
    return [(translated(name), safe(text)) for name, text in (found or {}).items()]


def _tokens(rows) -> dict | None:
    """Files as columns; a row disagrees where the ids that its files name differ."""
    if not rows:
        return None
    columns = list(
        dict.fromkeys(
            f
            for f in ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")
            for r in rows
            if f in r["says"]
        )
    )
    return {
        "columns": columns,
        "rows": [
            {
                "token": r["token"].upper(),
                "cells": [safe(r["says"].get(c, "")) for c in columns],
                "differ": _differ(r["says"]),
            }
            for r in rows
        ],
    }


def _differ(says: dict) -> bool:
    """Whether two files name different tokens; a list agrees with each of its members, silence with everything."""
    named = [
        {part.split(" = ")[0].strip() for part in text.strip("[]").split(", ")}
        for text in says.values()
        if text not in ("", "null")
    ]
    return bool(named) and not set.intersection(*named)


def _rules_in_short(report: Report) -> list[tuple[str, str]]:
    """(what became of them, codes), for paper: a table of every rule takes eight pages."""
    found: dict[str, list[str]] = {say("run"): [r.rule.code for r in report.runs if r.status == "run"]}
    found[say("crashed")] = [r.rule.code for r in report.crashed]
    for code, _name, reason in verdict.skip_reasons(report):
        found.setdefault(reason, []).append(code)
    return [(label, " ".join(codes)) for label, codes in found.items() if codes]


def _rule(run) -> dict:
    reason = max(run.reasons, key=run.reasons.get) if run.reasons else ""
    text = run.crashed or (
        translated(reason)
        if run.status == "skipped"
        else verdict.none_to_judge(run.rule.scope)
        if run.status == "not applicable"
        else verdict.subjects(run.judged, run.rule.scope)
    )
    return {
        "code": run.rule.code,
        "name": run.rule.name,
        "area": run.rule.area,
        "status": run.status,
        "text": safe(text),
        "ms": f"{run.seconds * 1000:.1f} ms" if run.status == "run" else "",
        "mark": {"run": "✓", "skipped": "○", "crashed": "☠", "not applicable": "–"}[run.status],
    }
