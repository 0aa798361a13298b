"""The page of `doctor kvcache`: what page.html shows of a KvReport."""

from doctor.core.messages import _
from doctor.evaluate.kvcache.study import KvReport
from doctor.locale.catalogue import say, translated
from doctor.report import kv_text
from doctor.report.drawings import strips
from doctor.report.formats.html import inside_script, machine_rows, page_of
from doctor.report.text import safe

_KV_HEADLINES = {
    "Q4": _("keys of 4 bits will do"),
    "Q6": _("keys need 6 to 8 bits"),
    "never Q4": _("never store these keys in 4 bits"),
    "unknown": _("the keys could not be judged"),
}


_KV_MARKS = {"Q4": "ok", "Q6": "warning", "never Q4": "error", "unknown": "skipped"}


def kvcache_html(report: KvReport) -> str:
    """The page of a KvReport, its JSON inside."""
    data = inside_script(kv_text.kvcache_json(report))
    return page_of([], _kvcache(report), data, report.version, report.checkpoint)


def _kvcache(report: KvReport) -> dict:
    """What the page shows of a KvReport: its advice, a table of schemes, the layers' keys, what was measured."""
    data = report.data
    rows = data["fitness"]
    biases = strips({say("|key bias|"): [r["bias_absmax"] for r in rows]})
    errors = strips(
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
                "gib": f"{s['total_bytes'] / kv_text.GIB:,.3f}",
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
        "name": safe(report.checkpoint),
        "what": safe(data["architecture"]),
        "mark": _KV_MARKS[level],
        "headline": translated(_KV_HEADLINES[level]),
        "sentences": [safe(x) for x in kv_text.advice_said(data["advice"])],
        "context": f"{data['context']:,}",
        "batch": data["batch"],
        "layers": kv_text.layers_said(data),
        "notes": [safe(translated(n)) for n in data["notes"]],
        "tables": tables,
        "past": kv_text.past_said(data),
        "memory": kv_text.longest_said(data),
        "pictures": [row for row in (*biases, *errors) if any(v is not None for v in row["values"])],
        "measured": measured
        and {
            "source": safe(measured["source"]),
            "tokens": f"{measured['tokens']:,}",
            "rows": [
                (kv_text.scheme_said(m["scheme"]), f"{m['perplexity']:.3f}", f"{m['kl']:.4f}", f"{m['top1']:.1%}")
                for m in measured["schemes"]
            ],
        },
        "machine": machine_rows(data.get("machine")),
        "when": safe(data.get("machine", {}).get("when", "")),
        "markdown": kv_text.kvcache_markdown(report),
        "not_measured": safe(translated(data.get("not_measured", ""))),
    }
