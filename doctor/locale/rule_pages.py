"""Rule pages in other languages: doctor/locale/LANGUAGE/rules/CODE.md, beside the English one in the rule's docstring.

A page is a title and sections under their headings. A rule without one is shown in English.
"""

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from doctor.lint.explain import SECTIONS, code_span, find, search
from doctor.lint.rule import Rule
from doctor.lint.suppress import OWN_RULES

# What each section is called. What other tools print and the sources need no translation.
HEADINGS = {"zh": {"Title": "标题", "Why": "原因", "Do": "处理", "False alarms": "误报", "Fix safety": "修复"}}
_ONLY_HEADINGS = {"zh": {"Seen as": "别处的报错", "Sources": "出处"}}
_STOP = {"zh": "。"}
HERE = Path(__file__).parent


@cache
def page(code: str, lang: str) -> dict[str, str]:
    """Section -> text of a rule's page in this language, the title under "Title"; empty where there is none."""
    file = HERE / lang / "rules" / f"{code}.md"
    if lang not in HEADINGS or not file.is_file():
        return {}
    title, *parts = re.split(r"^## (.+)\n", file.read_text(encoding="utf-8"), flags=re.M)
    names = {heading: name for name, heading in HEADINGS[lang].items()}
    sections = {names[h]: text.strip() for h, text in zip(parts[::2], parts[1::2], strict=True) if h in names}
    return {"Title": title.removeprefix("#").strip(), **sections}


def section(entry: Rule, name: str, lang: str = "en") -> str:
    """A section of a rule's page, in English where the language has none."""
    return page(entry.code, lang).get(name) or entry.section(name)


def heading(entry: Rule, lang: str = "en") -> str:
    """What is wrong, in one line without its full stop."""
    return page(entry.code, lang).get("Title") or entry.title


def sentence(entry: Rule, lang: str = "en") -> str:
    """The heading as a sentence."""
    return heading(entry, lang) + _STOP.get(lang, ".")


def markdown(entry: Rule, lang: str = "en") -> str:
    """The whole page as Markdown."""
    names = {**HEADINGS.get(lang, {}), **_ONLY_HEADINGS.get(lang, {})}
    parts = [
        f"# {entry.code} {entry.name}",
        f"{entry.severity} · {entry.certainty} · {entry.area.lower()}",
        sentence(entry, lang),
    ]
    if entry.seen_as:
        parts.append(f"## {names.get('Seen as', 'Seen as')}")
        parts.append("\n".join(f"- {s.tool}: {code_span(s.text)}" for s in entry.seen_as))
    for key, title in SECTIONS:
        if entry.section(key):
            parts += [f"## {names.get(key, title)}", section(entry, key, lang)]
    return "\n\n".join(parts) + "\n"


def pages_for(what: str, rules: Iterable[Rule], lang: str = "en") -> str:
    """Markdown of the page of a rule, by code or name; for the text of an error, of each rule that it points to; ""
    where it points to none.
    """
    rules = [*rules, *OWN_RULES]
    entry = find(what, rules)
    found = [entry] if entry else [match.rule for match in search(what, rules)]
    return "\n".join(markdown(rule, lang) for rule in found)
