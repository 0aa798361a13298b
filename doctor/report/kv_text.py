"""The screen of `doctor kvcache`: sizes by scheme, how the keys take few bits layer by layer, advice, and what was
measured.
"""

import io

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from doctor.core.messages import Message
from doctor.evaluate.kvcache.kv_report import KvReport
from doctor.locale.catalogue import counted, current, say, translated
from doctor.report.formats.json_report import dumps
from doctor.report.screen import COLOURS, Screen, aligned, console, styled
from doctor.report.text import level, number, pad, safe, squeeze

GIB = 1 << 30
_COLOUR = {"Q4": COLOURS["ok"], "Q6": COLOURS["warning"], "never Q4": COLOURS["error"], "unknown": COLOURS["skipped"]}
_MARK = {"Q4": "✓", "Q6": "!", "never Q4": "✗", "unknown": "○"}
_MOST_LAYERS = 12


def render_kvcache(report: KvReport, width: int = 100) -> str:
    """The screen as plain text."""
    file = io.StringIO()
    show_kvcache(report, console(file, width, no_color=True, force_terminal=False))
    return file.getvalue()


def kvcache_json(report: KvReport) -> str:
    return dumps(report.to_dict())


def kvcache_markdown(report: KvReport) -> str:
    """The advice and the sizes, for a comment or a job's summary."""
    data = report.data
    found, past, fitting = data["advice"], past_said(data), longest_said(data)
    sentences = [safe(s) for s in advice_said(found)]
    lines = [
        f"### {_MARK[found['level']]} {safe(report.checkpoint)}: {sentences[0]}",
        "",
        f"{_what(data)} · {' · '.join(layers_said(data))}",
        "",
        *(f"- {s}" for s in sentences[1:]),
        "",
    ]
    heads = [
        h
        for h in (
            say("cache"),
            say("K bits"),
            say("V bits"),
            say("KiB/token"),
            past,
            "GiB",
            fitting,
            "vLLM",
            "llama.cpp",
        )
        if h
    ]
    lines += ["| " + " | ".join(heads) + " |", "|---" + "|--:" * (len(heads) - 3) + "|---|---|"]
    for s in data["schemes"]:
        cells = [
            s["name"],
            f"{s['key_bits']:g}",
            f"{s['value_bits']:g}",
            f"{s['kib_per_token']:,.2f}",
            *([f"{s['kib_per_token_past_windows']:,.2f}"] if past else []),
            f"{s['total_bytes'] / GIB:,.3f}",
            *([longest(s)] if fitting else []),
            s["vllm"],
            s["llama_cpp"],
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if "measured" in data:
        heads = [say("cache"), say("perplexity"), say("KL, nats"), say("same top token")]
        lines += ["", "| " + " | ".join(heads) + " |", "|---" + "|--:" * 3 + "|"]
        lines += [
            f"| {scheme_said(m['scheme'])} | {m['perplexity']:.3f} | {m['kl']:.4f} | {m['top1']:.1%} |"
            for m in data["measured"]["schemes"]
        ]
    return "\n".join(lines) + "\n"


def show_kvcache(report: KvReport, out: Console) -> None:
    """Print the screen of a KvReport."""
    screen, data = Screen(out), report.data
    screen.hang(
        styled((f"doctor {report.version}  ", "bold")), styled((f"{safe(report.checkpoint)}   ", "cyan"), _what(data))
    )
    screen.line()
    for line in layers_said(data):
        screen.hang(Text("  "), Text(line))
    notes = list(data["notes"])
    if data["max_positions"] and data["context"] > data["max_positions"]:
        notes.append(
            say(
                "{n} tokens are more than the {positions} positions the model is made for",
                n=f"{data['context']:,}",
                positions=f"{data['max_positions']:,}",
            )
        )
    for note in notes:
        screen.hang(styled((f"  {pad(say('note'), 4)}  ", "bold")), Text(safe(translated(note))))
    _sizes(screen, data, data["schemes"], "")
    if "full_heads" in data:
        _sizes(screen, data, data["full_heads"], say("where the engine stores full heads"))
    _layers(screen, data)
    _advice(screen, data["advice"])
    _measured(screen, data)


def _what(data: dict) -> str:
    parts = [
        safe(data["architecture"]),
        say(
            "{sequences} of {n} tokens",
            sequences=counted("{n:,} sequence", "{n:,} sequences", data["batch"]),
            n=f"{data['context']:,}",
        ),
    ]
    if data["weight_bytes"]:
        parts.append(say("weights {n} GiB", n=f"{data['weight_bytes'] / GIB:.2f}"))
    if data["max_positions"]:
        parts.append(say("made for {n} positions", n=f"{data['max_positions']:,}"))
    return " · ".join(parts)


def _rows(screen: Screen, rows: list[list[str]], right: set[int]) -> None:
    """A table: the first row is its head; columns in `right` are flush right; a column that is empty in every row is
    left out.

    What the screen has no room for stands in a table of its own below, beside the first column again.
    """
    keep = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    sizes = {i: max(cell_len(row[i]) for row in rows) for i in keep}
    fit = [i for n, i in enumerate(keep) if n < 2 or sum(sizes[j] + 2 for j in keep[: n + 1]) <= screen.width]
    later, keep = keep[len(fit) :], fit
    for n, row in enumerate(rows):
        text = "  ".join(aligned(safe(row[i]), sizes[i], i in right) for i in keep).rstrip()
        screen.line(styled(("  " + text, "bold" if n == 0 else "")))
    if later:
        screen.line()
        _rows(
            screen,
            [[row[i] for i in (keep[0], *later)] for row in rows],
            {n for n, i in enumerate((keep[0], *later)) if i in right},
        )


def _sizes(screen: Screen, data: dict, schemes: list[dict], title: str) -> None:
    past, fitting = past_said(data), longest_said(data)
    rows = [[say("cache"), say("K bits"), say("V bits"), say("KiB/token"), past, "GiB", fitting, "vLLM", "llama.cpp"]]
    for s in schemes:
        rows.append(
            [
                s["name"],
                f"{s['key_bits']:g}",
                f"{s['value_bits']:g}",
                f"{s['kib_per_token']:,.2f}",
                f"{s['kib_per_token_past_windows']:,.2f}" if past else "",
                f"{s['total_bytes'] / GIB:,.3f}",
                longest(s),
                s["vllm"],
                s["llama_cpp"],
            ]
        )
    screen.line()
    if title:
        screen.line(("  " + title, "bold"))
    _rows(screen, rows, {1, 2, 3, 4, 5, 6})
    if fitting:
        screen.hang(
            Text("  "),
            Text(say("beside the weights; activations and the engine's own memory are not counted"), "bright_black"),
        )


def past_said(data: dict) -> str:
    """Head of the column of what a token takes beyond every window; "" where no layer has one."""
    return say("past {n}", n=f"{data['windows'][-1]:,}") if data["windows"] else ""


def longest_said(data: dict) -> str:
    """Head of the column of the longest context; "" where no memory was given."""
    return say("longest in {n} GiB", n=f"{data['memory_bytes'] / GIB:.4g}") if data["memory_bytes"] is not None else ""


def longest(scheme: dict) -> str:
    """The longest context that fits, or that any or none does; "" where no memory was given."""
    if "fits" not in scheme:
        return ""
    return (
        say("any")
        if scheme["unbounded"]
        else f"{scheme['largest_context']:,}"
        if scheme["largest_context"]
        else say("none")
    )


def _layers(screen: Screen, data: dict) -> None:
    rows = data["fitness"]
    if not rows:
        return
    screen.line()
    screen.line(("  " + say("keys by layer"), "bold"), f", {rows[0]['layer']} → {rows[-1]['layer']}")
    pictures = {"|key bias|": [r["bias_absmax"] for r in rows]}
    for name in next((r["errors"] for r in rows if "errors" in r), ()):
        pictures[f"error, {name}"] = [r["errors"][name] if "errors" in r else None for r in rows]
    room = max(screen.width - 40, 16)
    tops = {label: max((v for v in values if number(v)), default=None) for label, values in pictures.items()}
    common = max((top for label, top in tops.items() if top is not None and label.startswith("error")), default=0)
    for label, values in pictures.items():
        top = tops[label]
        if top is None:
            continue
        picture = level(squeeze(values, room), common if label.startswith("error") else top)
        screen.line(
            "    ",
            pad(_label(label), 14),
            (picture, "cyan"),
            ("   " + say("at most {top}", top=f"{top:.3g}"), "bright_black"),
        )
    _flagged(screen, rows)


def _label(label: str) -> str:
    """The name of one picture's row."""
    name = label.removeprefix("error, ")
    return say("|key bias|") if name == label else say("error, {name}", name=translated(name))


def _flagged(screen: Screen, rows: list[dict]) -> None:
    bad = [r for r in rows if r.get("advice", "Q4") != "Q4" or (r["bias_key_bits"] or 4) > 4]
    if not bad:
        return
    table = [[say("layer"), say("|key bias|"), say("by bias"), say("4-bit error"), say("8-bit"), "FP8", say("advice")]]
    for r in bad[:_MOST_LAYERS]:
        errors = r.get("errors", {})
        table.append(
            [
                str(r["layer"]),
                f"{r['bias_absmax']:.3g}" if r["bias_absmax"] is not None else "",
                say("{n}+ bits", n=r["bias_key_bits"]) if r["bias_key_bits"] else "",
                *(f"{errors[k]:.2f}" if k in errors else "" for k in ("4-bit", "8-bit", "FP8")),
                r.get("advice", ""),
            ]
        )
    screen.line()
    _rows(screen, table, {0, 1, 2, 3, 4, 5})
    if len(bad) > _MOST_LAYERS:
        screen.line("  " + say("and {n} more; -f json has them all", n=len(bad) - _MOST_LAYERS))


def advice_said(found: dict) -> list[str]:
    """The sentences of the advice in the language that is set."""
    return [translated(Message(template, values)) for template, values in found["parts"]]


def layers_said(data: dict) -> list[str]:
    """A line for each kind of layer."""
    return [translated(Message(template, values)) for template, values in data["kinds"]]


def _advice(screen: Screen, found: dict) -> None:
    screen.line()
    level = found["level"]
    head = styled((f"{_MARK[level]} ", _COLOUR[level]))
    if current() != "en":
        screen.hang(head, Text(translated(level), "bold"))
        head = Text("  ")
    for i, sentence in enumerate(advice_said(found)):
        screen.hang(head if i == 0 else Text("  "), Text(safe(sentence), "bold" if i == 0 else ""))


def _measured(screen: Screen, data: dict) -> None:
    if "not_measured" in data:
        screen.line()
        screen.hang(
            styled(("○ ", COLOURS["skipped"])),
            Text(say("not measured: {reason}", reason=safe(translated(data["not_measured"])))),
        )
    if "measured" not in data:
        return
    found = data["measured"]
    screen.line()
    screen.hang(
        styled((f"  {say('measured')} ", "bold")),
        Text(
            say(
                "on {source}: {tokens}, {rows} of at most {n}",
                source=safe(found["source"]),
                tokens=counted("{n:,} token", "{n:,} tokens", found["tokens"]),
                rows=counted("{n:,} row", "{n:,} rows", found["rows"]),
                n=f"{found['context']:,}",
            )
        ),
    )
    base = found["schemes"][0]["perplexity"]
    rows = [
        [
            say("cache"),
            say("perplexity"),
            say("× FP16"),
            say("KL, nats"),
            say("same top token"),
            say("worst layer's error"),
        ]
    ]
    for m in found["schemes"]:
        errors = [e for e in m["layer_errors"] if e is not None]
        rows.append(
            [
                scheme_said(m["scheme"]),
                f"{m['perplexity']:.3f}",
                f"{m['perplexity'] / base:.3f}",
                f"{m['kl']:.4f}",
                f"{m['top1']:.1%}",
                f"{max(errors, key=lambda e: e if e == e else float('inf')):.3f}",
            ]
        )
    _rows(screen, rows, {1, 2, 3, 4, 5})
    if "note" in found:
        screen.hang(Text("  "), Text(translated(found["note"]), "bright_black"))


def scheme_said(name: str) -> str:
    """A scheme's name: Q4 and Q6 are names here, and in the advice they are verdicts."""
    return translated(name) if name == "Q4, key bias apart" else name
