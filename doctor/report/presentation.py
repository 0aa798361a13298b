"""Findings as every format shows them: folded over layers, with their page, their fixes and their table.

A format that counted or worded these by itself would soon disagree with the others.
"""

import os
import re
from dataclasses import dataclass, field

from doctor.core.finding import Finding, Place
from doctor.core.messages import listed, plural
from doctor.lint.engine import Report, fold, folded_name
from doctor.lint.rule import Rule, Seen
from doctor.locale import rule_pages
from doctor.locale.catalogue import current, say, translated
from doctor.report.text import one_line, relative, safe

MARKS = {"error": "✗", "warning": "!", "info": "i", "ok": "✓", "skipped": "○", "crashed": "☠"}


@dataclass
class Group:
    """Findings alike but for the layer. `effects` are groups that this one explains."""

    first: Finding
    all: list[Finding]
    effects: list["Group"] = field(default_factory=list)

    @property
    def code(self) -> str:
        return self.first.code

    @property
    def names(self) -> str:
        """The tensors, folded: model.layers.{0-39}.mlp.down_proj.weight; else the place of the first."""
        tensors = [f.where.tensor for f in self.all if f.where.tensor]
        return safe(folded_name(tensors) if tensors else self.first.target)

    @property
    def message(self) -> str:
        """The first finding's sentence in the language that is set; where the others' differ by nothing but the name,
        with the folded name.
        """
        own, said = self.first.where.tensor, translated(self.first.message)
        if len(self.all) > 1 and own:
            patterns = {f.message.replace(f.where.tensor or "\0", "\0") for f in self.all}
            if len(patterns) == 1 and own in self.first.message:
                said = said.replace(own, folded_name([f.where.tensor for f in self.all if f.where.tensor]))
        return safe(said)

    @property
    def folds_into_message(self) -> bool:
        return len(self.all) == 1 or self.names in self.message

    @property
    def safety(self) -> str:
        """ "safe", "unsafe", "by name" or "manual": who or what can fix it."""
        fix = self.first.fix
        if fix is None or fix.safety == "manual" or not fix.edits:
            return "manual"
        return "by name" if fix.by_name else fix.safety

    @property
    def of_recipe(self) -> bool:
        """Whether the fix changes the recipe alone: `quantize` can carry it out, `fix` cannot."""
        fix = self.first.fix
        return fix is not None and bool(fix.edits) and all(edit.phase == "recipe" for edit in fix.edits)


def groups(report: Report) -> list[Group]:
    """Folded findings in repair order, consequences hung under the first group of the code that explains them, or
    explains that.
    """
    made = [Group(first, every) for first, every in fold(report.findings)]
    roots = [g for g in made if not g.first.consequence_of]
    causes = {g.code: g.first.consequence_of for g in made if g.first.consequence_of}
    for group in made:
        if group.first.consequence_of:
            code, passed = group.first.consequence_of, {group.code}
            while code in causes and code not in passed and not any(r.code == code for r in roots):
                passed.add(code)
                code = causes[code]
            cause = next((r for r in roots if r.code == code), None)
            (cause.effects if cause else roots).append(group)
    return roots


def counts(found: list[Group]) -> dict[str, int]:
    """severity -> folded findings, causes only."""
    return {s: sum(g.first.severity == s for g in found) for s in ("error", "warning", "info")}


def tally(found: list[Group]) -> str:
    """`3 errors, 2 warnings`; `no findings`."""
    many = {
        "error": lambda n: plural("{n:,} error", "{n:,} errors", n),
        "warning": lambda n: plural("{n:,} warning", "{n:,} warnings", n),
        "info": lambda n: plural("{n:,} note", "{n:,} notes", n),
    }
    parts = [translated(many[s](n)) for s, n in counts(found).items() if n]
    return say(", ").join(parts) or say("no findings")


def path_of(report: Report, file: str) -> str:
    """Path of a finding's file from the working directory: below the checkpoint, or a configuration file anywhere."""
    if os.path.isabs(file):
        return relative(file)
    root = str(report.summary.get("path") or report.checkpoint).rstrip("/")
    return f"{root}/{file}" if root else file


def why(entry: Rule) -> str:
    """First paragraph of the page's Why, as one line."""
    return _first(entry, "Why")


def _first(entry: Rule, section: str) -> str:
    return one_line(rule_pages.section(entry, section, current()).split("\n\n")[0])


def headline(group: Group, entry: Rule | None) -> tuple[str, str]:
    """(what is wrong, the exact message): in English the message says both; in another language the title of the
    rule's page goes before it.
    """
    if current() != "en" and entry is not None:
        return rule_pages.heading(entry, current()), group.message
    return group.message, ""


def page_rule(report: Report, code: str) -> Rule | None:
    return next((r.rule for r in report.runs if r.rule.code == code), None)


def elsewhere(entry: Rule, report: Report, most: int = 2) -> list[Seen]:
    """What other tools print for the same defect: the runtime's own words first, then the method's tools."""
    wanted = [_letters(report.recipe.runtime)] if report.recipe.runtime else []
    wanted += report.recipe.solver.tools

    def rank(seen: Seen) -> int:
        tool = _letters(seen.tool)
        return next((i for i, w in enumerate(wanted) if w in tool), len(wanted))

    ranked = sorted(entry.seen_as, key=rank)
    first_of_tool = list({s.tool: s for s in reversed(ranked)}.values())[::-1]
    others = [s for s in ranked if s not in first_of_tool]
    return (sorted(first_of_tool, key=rank) + others)[:most]


def _letters(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def fixes(group: Group, entry: Rule | None, report: Report) -> list[tuple[str, str]]:
    """(label, sentence): `fix` safe, `fix!` changes numbers or shapes, `you` is for the user, `do` the advice of the
    rule's page, in another language than English.

    A fix waits only for codes that the report holds.
    """
    fix, advice = group.first.fix, group.first.advice
    lines = []
    if current() != "en" and entry is not None:
        lines.append(("do", _first(entry, "Do")))
    if fix is None:
        pass
    elif group.safety == "safe":
        lines.append(("fix", translated(fix.title)))
    elif group.safety == "unsafe":
        standing = {f.code for f in report.findings}
        needs = [code for code in fix.needs if code in standing]
        waits = (
            say(" (once {codes} is gone)" if len(needs) == 1 else " (once {codes} are gone)", codes=listed(needs))
            if needs
            else ""
        )
        lines.append(("fix!", translated(fix.title) + waits))
    elif group.safety == "by name":
        lines.append(
            (
                "fix!",
                say(
                    "{title}: a guess, only by name with --unsafe-fixes={code}",
                    title=translated(fix.title),
                    code=group.code,
                ),
            )
        )
    elif fix is not None:
        lines.append(("you", translated(fix.title)))
    if advice:
        lines.append(("you", translated(advice)))
    if not lines and entry is not None:
        lines.append(("you", _first(entry, "Do")))
    return [(label, safe(text)) for label, text in lines]


def table(item: Finding) -> tuple[tuple, ...]:
    """The finding's table in the language that is set."""
    return tuple(tuple(map(translated, row)) for row in item.facts_table)


def fixable(found: list[Group]) -> dict[str, list[Group]]:
    """safety -> groups."""
    return {s: [g for g in found if g.safety == s] for s in ("safe", "unsafe", "by name", "manual")}


def anchor(finding: Finding) -> tuple[str, int, int]:
    """(file, line, column) for readers that know only text: tensors point at line 1."""
    where = finding.where
    return where.file or "config.json", where.line or 1, where.column or 1


def spot(where: Place) -> str:
    """`:5:19`, `:5` where no column is known, or nothing: what follows a file's name."""
    return "".join(f":{n}" for n in (where.line, where.column if where.line else None) if n)


def fingerprint(finding: Finding) -> str:
    """Stable name of one defect: code and place, no numbers."""
    return f"{finding.code}:{finding.target}"


def given_path(report: Report) -> str:
    """The path that the checkpoint was opened by: its directory, or one GGUF file of it."""
    given = str(report.summary.get("path") or report.checkpoint)
    one = report.checkpoint.endswith(".gguf") and not given.endswith(report.checkpoint)
    return os.path.join(given, report.checkpoint) if one else given
