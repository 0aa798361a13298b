"""One HTML file that asks the network for nothing: verdict, plans, findings, weights block by block, tokens, shapes,
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
from doctor.report import presentation
from doctor.report.formats import json_report, markdown
from doctor.report.presentation import Group

MOST_BYTES = 290_000  # of a page with its JSON; where it would grow beyond, the page says how to get the JSON
_WINDOW = 96
WORST = 10
GIB = 1 << 30
_KV_HEADLINES = {
    "Q4": "keys of 4 bits will do",
    "Q6": "keys need 6 to 8 bits",
    "never Q4": "never store these keys in 4 bits",
    "unknown": "the keys could not be judged",
}
_KV_MARKS = {"Q4": "ok", "Q6": "warning", "never Q4": "error", "unknown": "skipped"}
# Exponents of float16: the least subnormal is 2^-24, the least normal 2^-14, the largest value just below 2^16.
_FP16_LOWEST, _FP16_NORMAL, _FP16_HIGHEST = -24, -14, 15


def render(reports: list[Report]) -> str:
    """The page of all reports."""
    return _page_of(
        [_context(r) for r in reports],
        None,
        _embedded(reports),
        reports[0].version,
        ", ".join(r.checkpoint for r in reports),
    )


def render_kvcache(report, text: str) -> str:
    """The page of a KvReport. text: its JSON, which the page carries."""
    return _page_of([], _kvcache(report), _inside_script(text), report.version, report.checkpoint)


def _page_of(reports: list[dict], kv: dict | None, data: str, version: str, title: str) -> str:
    page = _rendered(reports, kv, "", version, title)
    fits = len(page.encode("utf-8", "replace")) + len(data) <= MOST_BYTES  # the JSON is ASCII
    return _rendered(reports, kv, data, version, title) if fits else page


def _rendered(reports: list[dict], kv: dict | None, data: str, version: str, title: str) -> str:
    return _template().render(
        reports=reports,
        kv=kv,
        data=data,
        version=version,
        title=presentation.safe(title),
        size=presentation.size,
        count=presentation.count,
        counted=counted,
        say=say,
        translated=translated,
        lang=current(),
    )


def _kvcache(report) -> dict:
    """What the page shows of a KvReport: its advice, a table of schemes, the layers' keys, what was measured."""
    from doctor.report import kv_text  # which knows the evaluation, hence torch: a check's page must not

    data = report.data
    rows = data["fitness"]
    biases = _strips({say("|key bias|"): [r["bias_absmax"] for r in rows]})
    errors = _strips(
        {
            say("error, {name}", name=translated(name)): [r["errors"][name] if "errors" in r else None for r in rows]
            for name in next((r["errors"] for r in rows if "errors" in r), ())
        }
    )
    highest = max((row["top"] for row in errors), default=0)
    for row in errors:  # one scale for all of them, so that they can be compared
        row["bars"] = [h * row["top"] / highest if highest else 0.0 for h in row["bars"]]
    largest = max((s["total_bytes"] for s in (*data["schemes"], *data.get("full_heads", ()))), default=0) or 1

    def table(schemes: list[dict]) -> list[dict]:
        return [
            {
                **s,
                "past": f"{s.get('kib_per_token_past_windows', 0):,.2f}",
                "longest": kv_text.longest(s),
                "gib": f"{s['total_bytes'] / GIB:,.3f}",
                "kib": f"{s['kib_per_token']:,.2f}",
                "share": round(100 * s["total_bytes"] / largest, 1),
                "engines": ", ".join(
                    filter(
                        None,
                        (
                            s["exllama"] and f"ExLlama {s['exllama']}",
                            s["vllm"] and f"vLLM {s['vllm']}",
                            s["llama_cpp"] and f"llama.cpp {s['llama_cpp']}",
                        ),
                    )
                ),
            }
            for s in schemes
        ]

    tables = [(say("Size of the cache"), table(data["schemes"]))]
    if "full_heads" in data:
        tables.append((say("Where the engine stores full heads"), table(data["full_heads"])))
    level = data["advice"]["level"]
    measured = data.get("measured")
    return {
        "name": presentation.safe(report.checkpoint),
        "what": presentation.safe(data["architecture"]),
        "mark": _KV_MARKS[level],
        "headline": say(_KV_HEADLINES[level]),
        "sentences": [presentation.safe(x) for x in kv_text.advice_said(data["advice"])],
        "context": f"{data['context']:,}",
        "batch": data["batch"],
        "layers": kv_text.layers_said(data),
        "notes": [presentation.safe(translated(n)) for n in data["notes"]],
        "tables": tables,
        "past": kv_text.past_said(data),
        "memory": kv_text.longest_said(data),
        "pictures": [row for row in (*biases, *errors) if any(v is not None for v in row["values"])],
        "measured": measured
        and {
            "source": presentation.safe(measured["source"]),
            "tokens": f"{measured['tokens']:,}",
            "rows": [
                (kv_text.scheme_said(m["scheme"]), f"{m['perplexity']:.3f}", f"{m['kl']:.4f}", f"{m['top1']:.1%}")
                for m in measured["schemes"]
            ],
        },
        "machine": _machine_rows(data.get("machine")),
        "when": presentation.safe(data.get("machine", {}).get("when", "")),
        "markdown": kv_text.kvcache_markdown(report),
        "not_measured": presentation.safe(translated(data.get("not_measured", ""))),
    }


@cache
def _template():
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
    return environment.get_template("page.html")


def _embedded(reports: list[Report]) -> str:
    """JSON that cannot end its script element."""
    with language("en"):
        return _inside_script(json_report.render(reports))


def _inside_script(document: str) -> str:
    text = json.dumps(json.loads(document), separators=(",", ":"))
    text = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return text


def _context(report: Report) -> dict:
    found = presentation.groups(report)
    mark, sentence = presentation.verdict(report)
    by = presentation.fixable(found)
    extra = report.extra
    return {
        "name": presentation.safe(report.checkpoint),
        "mark": mark,
        "symbol": presentation.MARKS[mark],
        "sentence": sentence,
        "what": presentation.what_it_is(report),
        "plan": presentation.plan_text(report),
        "counts": presentation.counts(found),
        "run": presentation.ran(report),
        "skipped": presentation.skipped(report),
        "seconds": presentation.seconds(report.seconds),
        "read": presentation.size(report.bytes_read) if report.bytes_read else "",
        "fixes": {k: len(v) for k, v in by.items()},
        "groups": [_card(report, g) for g in found],
        "areas": presentation.areas(report, found),
        "marks": presentation.MARKS,
        "steps": presentation.next_steps(report, found),
        "crashed": [(r.rule.code, presentation.safe(r.crashed)) for r in report.crashed],
        "matrix": [{**row, "why": presentation.blockers(row["cells"])} for row in extra.get("matrix", ())],
        "heat": _heat(extra.get("heat")),
        "losses": _losses(report.linears, report.recipe.method),
        "results": presentation.results(report),
        "exponents": _exponents(extra.get("exponents")),
        "calibration": _calibration(extra.get("calibration")),
        "worst": _worst(report.linears),
        "half": _half((extra.get("comparison") or {}).get("half")),
        "receipt": _receipt(extra.get("receipt")),
        "machine": _machine(report),
        "replies": [tuple(map(presentation.safe, r)) for r in (extra.get("comparison") or {}).get("replies", ())],
        "block_errors": _block_errors(extra.get("comparison") or {}),
        "tokens": _tokens(extra.get("tokens", ())),
        "geometry": extra.get("geometry", ()),
        "group_size": report.recipe.group_size,
        "tp": report.recipe.tp,
        "odd_tp": len((extra.get("matrix") or [{"cells": ()}])[0]["cells"]) > 4,
        "when": presentation.safe((extra.get("machine") or {}).get("when", "")),
        "config_sha256": next(
            (f["sha256"] for f in extra.get("files", ()) if f["name"] == "config.json" and "sha256" in f), ""
        ),
        "files": extra.get("files", ()),
        "rules": [_rule(r) for r in report.runs],
        "skipped_tensors": {
            presentation.safe(k): presentation.safe(translated(v)) for k, v in report.skipped_tensors.items()
        },
        "markdown": markdown.render([report]),
    }


def _card(report: Report, group: Group) -> dict:
    entry, first, where = presentation.page_rule(report, group.code), group.first, group.first.where
    place = presentation.safe(where.file) + presentation.spot(where)
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
        "tensor": presentation.safe(where.tensor) + index if where.tensor else "",
        "byte": where.byte,
        "frame": _frame(where),
        "indent": _indent(where),
        "note": presentation.safe(where.note),
        "more": "" if group.folds_into_message else say("{n} more", n=len(group.all) - 1) + f": {group.names}",
        "table": presentation.table(first),
        "strip": _strips(first.strip),
        "why": presentation.why(entry) if entry else "",
        "seen": presentation.elsewhere(entry, report, 4) if entry else (),
        "cures": presentation.cures(group, entry, report),
        "effects": ", ".join(f"{e.code} {e.first.name}" for e in group.effects),
        "page": _page(entry),
    }


def _page(entry) -> list[tuple[str, list[str]]]:
    if entry is None:
        return []
    return [
        (say(title), explain.paragraphs(rule_pages.section(entry, key, current())))
        for key, title in explain.SECTIONS
        if entry.section(key)
    ]


def _frame(where) -> list[tuple[int, str, str, str]]:
    """(line number, text before the marked part, marked part, text after)."""
    rows = []
    for number, line in where.frame:
        if number != where.line:
            rows.append((number, presentation.safe(presentation.window(line, 1, 1, _WINDOW)[0]), "", ""))
            continue
        text, at = presentation.window(line, where.column or 1, where.length or 1, _WINDOW)
        end = at - 1 + (where.length or 1)
        rows.append(
            (
                number,
                presentation.safe(text[: at - 1]),
                presentation.safe(text[at - 1 : end]),
                presentation.safe(text[end:]),
            )
        )
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


def _block_errors(comparison: dict) -> list[dict]:
    rows = {"each block alone": comparison.get("own_errors"), "carried along": comparison.get("block_errors")}
    return _strips({label: errors for label, errors in rows.items() if errors})


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
            label = f"block {x} {row['role']}: max |w| {value:.4g}, {row['zero'][x]:.2%} zeros" + (
                f", {bad:,} NaN or Inf" if bad else ""
            )
            cells.append((x, y, round(0.08 + 0.92 * value / top, 3), bool(bad), label))
    tops = [max((v for v in r["absmax"] if isinstance(v, (int, float))), default=0) for r in heat["roles"]]
    return {
        "blocks": heat["blocks"],
        "roles": [r["role"] for r in heat["roles"]],
        "tops": [f"{t:.3g}" for t in tops],
        "cells": cells,
        "ticks": [b for b in range(heat["blocks"]) if b % _tick(heat["blocks"]) == 0],
    }


def _tick(blocks: int) -> int:
    """How many blocks lie between two numbers under a picture."""
    return 1 if blocks <= 12 else 5 if blocks <= 60 else 10


def _losses(linears: list, method: str) -> dict | None:
    """Cells of the quantization's picture: shade by error against the same role, red for what failed or fell back from
    the method.
    """
    rows = [x for x in linears if isinstance(x, dict) and x.get("block") is not None and x.get("solve")]
    if not rows:
        return None
    roles = list(dict.fromkeys(x["role"] for x in rows))
    worst = {
        r: max(
            (x["solve"]["loss"] for x in rows if x["role"] == r and presentation.number(x["solve"]["loss"])), default=0
        )
        or 1
        for r in roles
    }
    cells = []
    for x in rows:
        loss, fell = x["solve"]["loss"], x.get("outcome") != method
        shade = round(0.08 + 0.92 * loss / worst[x["role"]], 3) if presentation.number(loss) else 1
        label = f"{x['name']}: {x.get('outcome')}, relative error {_small(loss)}, damp {presentation.figure(x['solve']['damp_used'])}"
        cells.append((x["block"], roles.index(x["role"]), shade, fell, presentation.safe(label)))
    blocks = 1 + max(x["block"] for x in rows)
    return {
        "blocks": blocks,
        "roles": roles,
        "tops": [_small(worst[r]) for r in roles],
        "cells": cells,
        "ticks": [b for b in range(blocks) if b % _tick(blocks) == 0],
    }


def _exponents(found: dict | None) -> dict | None:
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


def _calibration(facts: dict | None) -> list[tuple[str, str]]:
    if not facts:
        return []
    lengths = f"{facts['shortest']:,} / {facts['median']:,} / {facts['longest']:,}"
    return [
        (
            say("source"),
            presentation.safe(facts["source"]) + (say(" (doctor's own texts)") if facts["builtin"] else ""),
        ),
        (say("rows"), f"{facts['rows']:,}"),
        (say("tokens"), f"{facts['tokens']:,}"),
        (say("shortest / median / longest row"), lengths),
        (say("distinct tokens"), f"{facts['distinct_tokens']:,}"),
        (say("rows that repeat another"), f"{facts['duplicate_rows']:,}"),
        (say("padding tokens"), f"{facts['padding']:,}"),
        (say("rows with two BOS tokens"), f"{facts['bos_doubled']:,}"),
        *([(say("scripts"), presentation.safe(", ".join(facts["scripts"])))] if facts["scripts"] else []),
    ]


def _worst(linears: list) -> list[tuple[str, ...]]:
    """The linears with the largest error: name, how, error, that of plain rounding, damp, tokens seen."""
    done = [x for x in linears if isinstance(x, dict) and x.get("solve") and x.get("outcome") != "kept"]
    done.sort(key=lambda x: -x["solve"]["loss"] if presentation.number(x["solve"]["loss"]) else -math.inf)
    return [
        (
            presentation.safe(x["name"]),
            str(x.get("outcome")),
            _small(x["solve"]["loss"]),
            _small(x["solve"].get("rtn_loss")),
            presentation.figure(x["solve"].get("damp_used")),
            f"{x['hessian']['tokens']:,}" if x.get("hessian") else "",
        )
        for x in done[:WORST]
    ]


def _half(found: dict | None) -> list[dict]:
    """Bars of the original's largest activations by block."""
    if not found:
        return []
    return _strips({say("residual"): list(found["residual"]), say("largest"): [size for _, size in found["blocks"]]})


def _receipt(found: dict | None) -> dict | None:
    if not found:
        return None
    return {
        **{k: presentation.safe(found[k]) for k in ("source", "plan")},
        "steps": [tuple(map(presentation.safe, s)) for s in found["steps"]],
    }


def _machine(report: Report) -> list[tuple[str, str]]:
    """(what, text) of where the run took place, and how long it took; [] for a report that does not say."""
    rows = _machine_rows(report.extra.get("machine"))
    return [*rows, (say("seconds"), presentation.seconds(report.seconds))] if rows else []


def _machine_rows(found: dict | None) -> list[tuple[str, str]]:
    return [(translated(name), presentation.safe(text)) for name, text in (found or {}).items()]


def _small(share: object) -> str:
    """A share as percent with two digits, however small."""
    return f"{share * 100:.2g} %" if presentation.number(share) else str(share)


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
                "cells": [r["says"].get(c, "") for c in columns],
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


def _rule(run) -> dict:
    reason = max(run.reasons, key=run.reasons.get) if run.reasons else ""
    text = run.crashed or (
        translated(reason)
        if run.status == "skipped"
        else presentation.none_to_judge(run.rule.scope)
        if run.status == "not applicable"
        else presentation.subjects(run.judged, run.rule.scope)
    )
    return {
        "code": run.rule.code,
        "name": run.rule.name,
        "area": run.rule.area,
        "status": run.status,
        "text": presentation.safe(text),
        "ms": f"{run.seconds * 1000:.1f} ms" if run.status == "run" else "",
        "mark": {"run": "✓", "skipped": "○", "crashed": "☠", "not applicable": "–"}[run.status],
    }
