"""`doctor facts`: what a rule can ask for."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from doctor.cli.command import Command
from doctor.cli.options import lang_option, option, rules_dir_option
from doctor.core.facts import COSTS, FACTS, SCOPES, Fact
from doctor.core.messages import _
from doctor.locale.catalogue import say, translated

if TYPE_CHECKING:
    from rich.table import Table


@click.command(
    cls=Command,
    short_help=_("List the facts that a rule can ask for."),
    help=_(
        "List the facts that a rule can ask for: name, scope, what they cost, and what they say.\n\n"
        "A rule asks by naming a fact as a parameter. The cost is the stage that makes it: listing and header read no "
        "weights. every_NAME gathers a fact over all tensors, linears or shards. WORDS keep the facts that hold one of "
        "them."
    ),
)
@click.argument("words", nargs=-1, metavar="[WORDS]...")
@option("--scope", type=click.Choice(SCOPES), default=None, help=_("Only facts of this scope."))
@option("-f", "--format", type=click.Choice(("table", "json", "markdown")), default="table")
@rules_dir_option
@lang_option
def command(words: tuple[str, ...], scope: str | None, format: str, rules_dirs: tuple[Path, ...]) -> None:
    """Rules are loaded first, because some declare facts of their own."""
    from doctor.lint.engine import load_rules

    load_rules(rules_dirs)
    chosen = [
        fact
        for fact in sorted(FACTS.values(), key=lambda f: (SCOPES.index(f.scope), COSTS.index(f.cost), f.name))
        if scope in (None, fact.scope)
        and (not words or any(w.lower() in f"{fact.name} {_line(fact)} {_said(fact)}".lower() for w in words))
    ]
    if format == "json":
        rows = [{"name": f.name, "scope": f.scope, "cost": f.cost, "doc": _line(f)} for f in chosen]
        import json

        sys.stdout.write(json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
    elif format == "markdown":
        lines = ["| " + " | ".join(_heads()) + " |", "|---|---|---|---|"]
        lines += [f"| `{f.name}` | {f.scope} | {f.cost} | {_said(f).replace('|', chr(92) + '|')} |" for f in chosen]
        sys.stdout.write("\n".join(lines) + "\n")
    else:
        from doctor.report.screen import console

        console(sys.stdout).print(_table(chosen))


def _table(facts: list[Fact]) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    *titles, last = _heads()
    for title in titles:
        table.add_column(title, no_wrap=True)
    table.add_column(last, overflow="fold")
    for fact in facts:
        table.add_row(Text(fact.name), fact.scope, fact.cost, Text(_said(fact)))
    return table


def _heads() -> list[str]:
    return [say("fact"), say("scope"), say("cost"), say("what it says")]


def _line(fact: Fact) -> str:
    return " ".join(fact.doc.split())


def _said(fact: Fact) -> str:
    return translated(_line(fact))
