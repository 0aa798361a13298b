"""What `doctor advise` found, as a screen, Markdown, HTML and JSON: what fits and what does not, and the commands."""

import io
from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from doctor.core.messages import listed
from doctor.evaluate.advise.advice import Advice, Option
from doctor.evaluate.advise.candidates import STORED
from doctor.locale.catalogue import counted, current, say, translated
from doctor.report.formats.json_report import dumps
from doctor.report.screen import Screen, aligned, console, styled
from doctor.report.text import count, pad, safe, size

GIB = 1 << 30
COMMANDS = 3  # of the best rows, on a screen
_LONGEST, _BITS = 7, 8  # columns
_RIGHT = frozenset({0, 2, 4, 5, 6, _LONGEST, _BITS, 9, 10})


def advice_json(advice: Advice) -> str:
    """The JSON of an Advice."""
    return dumps(advice.to_dict()) + "\n"


def render_advice(advice: Advice) -> str:
    """The screen as plain text, 100 columns wide."""
    text = io.StringIO()
    show_advice(advice, console(text, width=100))
    return text.getvalue()


def show_advice(advice: Advice, out: Console, verbose: bool = False) -> None:
    """Print the screen. verbose: every number of GPUs and every cache, and the commands of every row."""
    screen = Screen(out)
    screen.hang(
        styled((f"doctor {advice.version}  ", "bold")),
        styled((f"{safe(advice.checkpoint)}   ", "cyan"), what_said(advice)),
    )
    screen.hang(Text(" " * 2), Text(machine_said(advice)))
    for note in advice.notes:
        screen.hang(styled((f"  {pad(say('note'), 4)}  ", "bold")), Text(safe(translated(note))))
    options = advice.options if verbose else advice.best
    fitting = [o for o in options if o.good]
    screen.line()
    table = [heads(), *(cells(n, o) for n, o in enumerate(fitting, 1))]
    shown = _columns(screen, table)
    if fitting:
        _rows(screen, table, shown)
    else:
        screen.hang(styled((f"  {say('nothing fits')}  ", "bold red")), Text(shortest_said(advice)))
    for title, rows in others(options):
        _others(screen, title, rows)
    screen.line()
    for line in legend(fitting, shown):
        screen.hang(Text("  "), Text(line, "bright_black"))
    numbered = list(enumerate(fitting, 1))
    chosen = numbered if verbose else _first_of_each(numbered)[:COMMANDS]
    _commands(screen, chosen)
    if len(chosen) < len(numbered):
        screen.hang(
            Text(" " * 8), Text(say("-v, -f markdown and -f json give the commands of every row"), "bright_black")
        )


def _columns(screen: Screen, rows: list[list[str]]) -> list[int]:
    """The columns that the screen has room for: bits a weight and the longest sequence go first."""
    columns = list(range(len(rows[0])))
    for droppable in (_BITS, _LONGEST):
        if sum(max(cell_len(row[i]) for row in rows) + 2 for i in columns) > screen.width:
            columns.remove(droppable)
    return columns


def _rows(screen: Screen, rows: list[list[str]], columns: list[int]) -> None:
    """A table of these columns."""
    sizes = {i: max(cell_len(row[i]) for row in rows) for i in columns}
    for n, row in enumerate(rows):
        text = "  ".join(aligned(safe(row[i]), sizes[i], i in _RIGHT) for i in columns).rstrip()
        screen.line(styled(("  " + text, "bold" if n == 0 else "green" if n == 1 else "")))


def _others(screen: Screen, title: str, rows: list[tuple[Option, str]]) -> None:
    if not rows:
        return
    screen.line()
    screen.line(("  " + title, "bold"))
    for names, reason in _by_reason(rows):
        if len(names) <= screen.width // 3:
            screen.hang(styled(f"    {names}  "), Text(safe(reason), "bright_black"), indent=6)
        else:  # many schemes for one reason: it stands below them
            screen.hang(Text("    "), Text(names))
            screen.hang(Text("      "), Text(safe(reason), "bright_black"))


def others(options: list[Option]) -> list[tuple[str, list[tuple[Option, str]]]]:
    """(title, options with the reason): what would not run though it fits, and what does not fit."""
    return [
        (say("would not run"), [(o, blocked_said(o)) for o in options if o.fits and o.blocked]),
        (say("does not fit"), [(o, short_said(o)) for o in options if not o.fits]),
    ]


def _by_reason(rows: list[tuple[Option, str]]) -> list[tuple[str, str]]:
    """(names, reason): schemes with the same reason share a line."""
    found: dict[str, list[str]] = {}
    for option, reason in rows:
        names = found.setdefault(reason, [])
        if (name := translated(option.scheme)) not in names:
            names.append(name)
    return [(", ".join(names), reason) for reason, names in found.items()]


def _first_of_each(options: list[tuple[int, Option]]) -> list[tuple[int, Option]]:
    """Of a scheme that is offered with several group sizes the first."""
    found: dict[str, tuple[int, Option]] = {}
    for n, option in options:
        found.setdefault(option.scheme.split(" ")[0], (n, option))
    return list(found.values())


def _commands(screen: Screen, options: list[tuple[int, Option]]) -> None:
    head = say("next")
    shown = [(n, lines) for n, o in options if (lines := [x for x in (o.quantize, o.serve) if x])]
    if shown:
        screen.line()
    for n, lines in shown:
        for m, line in enumerate(lines):
            label = f"{n:2}  " if m == 0 else "    "
            screen.line((f"  {pad(head, 4)} {label}", "bold"), (safe(line), "magenta"))
            head = ""


def what_said(advice: Advice) -> str:
    """Class, parameters and size of the model."""
    parts = [safe(advice.architecture), count(advice.parameters), size(advice.stored_bytes)]
    return " · ".join(parts)


def machine_said(advice: Advice) -> str:
    """Where it is to be served, and what the engine takes of it."""
    engine = advice.engine
    name = f"{advice.runtime} {advice.engine_version}".strip()
    card = f"{advice.gpus} × " + (advice.gpu or "GPU")
    return say(
        "{engine} on {card}, {memory} GiB each: it uses {usable} GiB, {own} GiB of them for itself (an estimate); "
        "{sequences} of {n} tokens",
        engine=name,
        card=card,
        memory=f"{advice.memory / GIB:.1f}",
        usable=f"{engine.usable / GIB:.1f}",
        own=f"{engine.own / GIB:.1f}",
        sequences=counted("{n:,} sequence", "{n:,} sequences", advice.batch),
        n=f"{advice.context:,}",
    )


def heads() -> list[str]:
    """Heads of the table; sizes are GiB on one GPU."""
    return [
        "",
        say("scheme"),
        "GPU",
        say("KV cache"),
        say("weights"),
        say("cache"),
        say("left"),
        say("longest"),
        say("bits"),
        "KL",
        say("perplexity"),
    ]


def cells(n: int, option: Option) -> list[str]:
    """A row of the table."""
    return [
        str(n),
        translated(option.scheme),
        str(option.gpus),
        option.cache,
        f"{option.weight_bytes / GIB:.2f}",
        f"{option.cache_bytes / GIB:.2f}",
        f"{option.free_bytes / GIB:.1f}",
        say("any") if option.longest is None else f"{option.longest:,}",
        f"{option.bits:.2f}",
        "?" if _unknown(option) else "" if option.kl is None else f"{option.kl:.4f}",
        "" if option.perplexity is None else f"{option.perplexity - 1:+.1%}",
    ]


def short_said(option: Option) -> str:
    """How much is missing."""
    return say(
        "{need} GiB on a GPU, {over} GiB more than there is, even on {gpus} with KV cache {cache}",
        need=f"{(option.weight_bytes + option.cache_bytes + option.engine_bytes) / GIB:.1f}",
        over=f"{-option.free_bytes / GIB:.1f}",
        gpus=counted("{n:,} GPU", "{n:,} GPUs", option.gpus),
        cache=option.cache,
    )


def shortest_said(advice: Advice) -> str:
    """What comes nearest, where nothing fits."""
    near = [o for o in advice.options if not o.blocked]
    if not near:
        return say("no scheme would run")
    best = max(near, key=lambda o: o.free_bytes)
    return say("{scheme} comes nearest: {short}", scheme=translated(best.scheme), short=short_said(best))


def blocked_said(option: Option) -> str:
    """The first reason why it would not run."""
    code, reason = option.blocked[0]
    return f"{code} {translated(reason)}".strip()


def legend(options: list[Option], columns: Sequence[int] = (_LONGEST,)) -> list[str]:
    """What these columns mean, and where the figures of quality come from."""
    if not options:
        return []
    found = [say("weights, cache, left: GiB on one GPU")]
    if _LONGEST in columns:
        found.append(say("longest: tokens of a sequence that fit, of the model's positions"))
    found += _measured(options)
    alone = [o.scheme for o in options if o.weights_alone]
    if alone:
        found.append(
            say(
                "{schemes}: of the weights alone; engines round activations too",
                schemes=", ".join(dict.fromkeys(alone)),
            )
        )
    published = dict.fromkeys((o.scheme.split(" ")[0], o.published) for o in options if o.published)
    found += [say("{scheme}: {published}", scheme=name, published=translated(text)) for name, text in published]
    return found


def _unknown(option: Option) -> bool:
    """Whether a figure is owed: what is served as it is stored loses nothing by that."""
    return option.kl is None and option.scheme != STORED


def _measured(options: list[Option]) -> list[str]:
    """On which models quality was measured, and what was not."""
    by_model: dict[str, list[str]] = {}
    for option in options:
        if option.measured_on:
            by_model.setdefault(option.measured_on, []).append(option.scheme)
    models = sorted(by_model, key=lambda model: -len(by_model[model]))
    found = []
    if models:
        found.append(
            say(
                "KL, perplexity: measured on {models}, small models that lose most: an order, not a forecast; "
                "`doctor verify` measures yours",
                models=translated(listed(models)),
            )
        )
    for model in models[1:]:  # figures of two models are not to be compared
        found.append(say("{schemes}: on {model}", schemes=", ".join(by_model[model]), model=model))
    if unknown := [option.scheme for option in options if _unknown(option)]:
        found.append(
            say("?: {schemes} not measured; they stand where bits and groups put them", schemes=", ".join(unknown))
        )
    return found


def advice_markdown(advice: Advice) -> str:
    """The same as Markdown, with the commands of every row."""
    options, fitting = advice.best, advice.fitting
    lines = [f"### {safe(advice.checkpoint)}", "", what_said(advice) + "  ", machine_said(advice), ""]
    lines += [translated(note) + "  " for note in advice.notes]
    if fitting:
        lines += ["| " + " | ".join(heads()) + " |", "|--:|---|--:|---|" + "--:|" * 7]
        lines += ["| " + " | ".join(cells(n, o)) + " |" for n, o in enumerate(fitting, 1)]
    else:
        lines.append(f"**{say('nothing fits')}**: {shortest_said(advice)}")
    for title, rows in others(options):
        if rows:
            lines += ["", f"**{title}**", "", *(f"- {names}: {reason}" for names, reason in _by_reason(rows))]
    lines += ["", *(f"- {line}" for line in legend(fitting))]
    for n, option in enumerate(fitting, 1):
        lines += [
            "",
            f"{n}. {translated(option.scheme)}",
            "",
            *(f"       {x}" for x in (option.quantize, option.serve) if x),
        ]
    return "\n".join(lines) + "\n"


def advice_html(advice: Advice) -> str:
    """One page that asks the network for nothing, the JSON inside."""
    from doctor.report.formats.html import inside_script, template

    options, fitting = advice.best, advice.fitting
    return template("advice.html").render(
        a=advice,
        lang=current(),
        say=say,
        what=what_said(advice),
        machine=machine_said(advice),
        notes=[safe(translated(n)) for n in advice.notes],
        heads=heads(),
        rows=[cells(n, o) for n, o in enumerate(fitting, 1)],
        right=_RIGHT,
        nearest=shortest_said(advice),
        others=[(title, _by_reason(rows)) for title, rows in others(options)],
        commands=[(translated(o.scheme), [x for x in (o.quantize, o.serve) if x]) for o in fitting],
        legend=legend(fitting),
        data=inside_script(advice_json(advice)),
    )
