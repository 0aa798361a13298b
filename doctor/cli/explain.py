"""`doctor explain`: a rule's page, or the rules behind a pasted error."""

import re
import sys

import click

from doctor.cli.command import Command
from doctor.cli.options import complete_rules, lang_option, option
from doctor.core.errors import DoctorError
from doctor.core.messages import _
from doctor.core.near import nearest_codes
from doctor.locale import catalogue


@click.command(
    cls=Command,
    help=_(
        "A rule's page, or what a pasted error points to.\n\n"
        "- reads the error from stdin: `python quantize.py 2>&1 | tail -1 | doctor explain -`."
    ),
)
@click.argument("what", nargs=-1, required=True, metavar="CODE | NAME | ERROR TEXT | -", shell_complete=complete_rules)
@option("-f", "--format", type=click.Choice(("text", "markdown")), default="text")
@lang_option
def command(what: tuple[str, ...], format: str) -> None:
    """Exits 1 where no rule quotes the error."""
    from doctor.lint import explain as search
    from doctor.lint.engine import load_rules
    from doctor.lint.suppress import OWN_RULES
    from doctor.locale import rule_pages
    from doctor.report import pages
    from doctor.report.screen import console

    text = sys.stdin.read() if what == ("-",) else " ".join(what)
    rules = [*load_rules(), *OWN_RULES]
    entry = search.find(text, rules)
    if entry is not None and format == "markdown":
        sys.stdout.write(rule_pages.markdown(entry, catalogue.current()))
    elif entry is not None:
        pages.show_page(entry, rules, console(sys.stdout))
    elif re.fullmatch(r"[A-Za-z]\d{3}", text):
        hint = nearest_codes(text, [r.code for r in rules]) or _("`doctor rules` lists them.")
        raise DoctorError(_("{code}: no rule has this code.", code=text.upper()), hint)
    else:
        matches = search.search(text, rules)
        pages.show_matches(text, matches, search.nearest(text, rules), console(sys.stdout))
        sys.exit(0 if matches or search.elsewhere(text) else 1)
