"""Suppressions: findings that a configuration hides, each with a reason, and never in silence.

A shard has no comments, so suppressions live in the configuration. One that matches nothing is itself a finding (S001),
or it would outlive the defect it was written for and hide the next one.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import date
from functools import cache

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import DoctorError
from doctor.core.facts import CHECKPOINT
from doctor.core.finding import Finding, Place
from doctor.core.messages import _, plural
from doctor.lint.engine import Report, RuleRun
from doctor.lint.rule import RULES, Rule, headline
from doctor.lint.toml_text import shown_path
from doctor.lint.trust import FILE

MAX_STARS = 8  # of one pattern; a checkpoint's own patterns are not trusted with the time they take
MAX_RANGE = 1000  # numbers of one {a-b}


def own_rule(doc: str, severity: str) -> Rule:
    """A rule of the engine itself, judged here and not from the store. `doc` is its page, as in any rule file."""
    code = doc.split(" ", 1)[0]
    name, title = headline(doc, code)
    return Rule(
        code, name, title, severity, "certain", "checkpoint", "listing", (), lambda *_: (), doc, module=__name__
    )


UNUSED = own_rule(
    """S001 unused-suppression: a suppression in the configuration matches no finding.

Why: what it was written for is gone, or its pattern never matched. Left in place it would hide the next defect there
in silence.

Do: remove it, or correct its pattern.

False alarms: a configuration shared by several checkpoints that are checked one at a time. Check them in one command,
or move the suppression into the doctor.toml of its checkpoint. A rule that did not run in this command gives no S001.

Fix safety: no fix: the file is yours.

Sources: doctor/lint/suppress.py.
""",
    "warning",
)


UNTRUSTED = own_rule(
    """S002 configuration-in-checkpoint: the checkpoint's own doctor.toml was not followed.

Why: it came with the files, from whoever made them, who would judge their own work with it. After `doctor trust` it may
suppress findings, which is counted; it may never select, ignore or load rules, or change the recipe.

Do: read it, and move what you want into your own doctor.toml or pyproject.toml; or allow it with `doctor trust FILE`.

False alarms: a doctor.toml that you wrote yourself. `doctor trust FILE` allows it until it changes.

Fix safety: no fix.

Sources: doctor/lint/trust.py.
""",
    "warning",
)


OWN_RULES = (UNUSED, UNTRUSTED)


@dataclass(frozen=True)
class Suppression:
    """One [[suppress]] entry. where: pattern of a tensor, a file or file#pointer, "" for every place. until: the last
    day on which it applies. sha256: of the only file it applies to, "" for any.
    """

    code: str
    reason: str
    where: str = ""
    until: date | None = None
    sha256: str = ""
    file: str = ""
    line: int = 1
    from_checkpoint: bool = False

    @property
    def origin(self) -> str:
        """`pyproject.toml:12`, relative to the working directory."""
        return f"{self.file if self.from_checkpoint else shown_path(self.file)}:{self.line}"

    def matches(self, item: Finding) -> bool:
        """Whether it names this finding, by code or name and by place; its date and hash are not compared."""
        if self.code not in (item.code, item.name):
            return False
        where = item.where
        return not self.where or any(
            place_pattern(self.where).fullmatch(t) for t in (where.tensor, where.file, item.target) if t
        )


@cache
def place_pattern(text: str) -> re.Pattern[str]:
    """A place pattern: `*` and `?` as in a shell, {1,2,down} alternatives, {0-39} ranges of numbers. Raises
    DoctorError.

    Each part between two stars is tried at its first match only (an atomic group), so matching takes at most length ×
    stars steps.
    """
    if text.count("*") > MAX_STARS:
        raise DoctorError(
            _(
                "pattern {pattern!r}: {count} stars; at most {most} are allowed.",
                pattern=text[:80],
                count=text.count("*"),
                most=MAX_STARS,
            )
        )
    parts = [_part(p) for p in re.split(r"\*+", text)]
    if len(parts) == 1:
        return re.compile(parts[0])
    middle = "".join(f"(?>.*?{p})" for p in parts[1:-1])
    return re.compile(f"{parts[0]}{middle}.*{parts[-1]}", re.S)


def _part(text: str) -> str:
    return "".join(
        _choices(p[1:-1]) if p[:1] == "{" and p[-1:] == "}" else re.escape(p).replace(r"\?", ".")
        for p in re.split(r"(\{[^{}]*\})", text)
    )


def _choices(text: str) -> str:
    options = []
    for option in text.split(","):
        bounds = re.fullmatch(r"\s*(\d{1,9})-(\d{1,9})\s*", option)
        if not bounds:
            options.append(re.escape(option.strip()))
            continue
        first, last = int(bounds[1]), int(bounds[2])
        if not first <= last < first + MAX_RANGE:
            raise DoctorError(
                _(
                    "pattern {{{pattern}}}: {range} is not a range of 1 to {most} numbers.",
                    pattern=text,
                    range=option.strip(),
                    most=MAX_RANGE,
                )
            )
        options += map(str, range(first, last + 1))
    # Bounds on both sides: {1-3} must not fit the 1 of 10.
    return (
        "(?<![0-9])(?:" + "|".join(options) + ")(?![0-9])"
        if all(o.isdigit() for o in options)
        else "(?:" + "|".join(options) + ")"
    )


@dataclass(frozen=True)
class Suppressed:
    """Findings after suppression. `suppressed` carry their reason in Finding.suppression; `own` are findings about the
    configuration itself, and `runs` the rules of those.
    """

    findings: list[Finding]
    own: list[Finding]
    suppressed: list[Finding]
    runs: list[RuleRun]


def suppress(
    suppressions: Iterable[Suppression],
    findings: list[Finding],
    runs: list[RuleRun],
    checkpoint: Checkpoint,
    today: date | None = None,
    problems: Iterable[Finding] = (),
) -> Suppressed:
    """Separate the suppressed findings from the others, and add one for each suppression that matched nothing.

    problems: findings about the configuration, passed through. A file is hashed only if a suppression states its
    sha256.
    """
    today = today or date.today()
    suppressions = list(suppressions)
    digests: dict[str, str] = {}
    kept: list[Finding] = []
    suppressed: list[Finding] = []
    used: set[Suppression] = set()
    ended: dict[Suppression, int] = {}
    for item in findings:
        about = [s for s in suppressions if s.matches(item)]
        for late in (s for s in about if s.until is not None and today > s.until):
            ended[late] = ended.get(late, 0) + 1
        holds = next(
            (s for s in about if (s.until is None or today <= s.until) and _same_file(s, item, checkpoint, digests)),
            None,
        )
        if holds is None:
            kept.append(item)
        else:
            used.add(holds)
            suppressed.append(
                replace(
                    item,
                    suppression={
                        "reason": holds.reason,
                        "origin": holds.origin,
                        "from_checkpoint": holds.from_checkpoint,
                    },
                )
            )
    judged = {word for r in runs if r.status == "run" for word in (r.rule.code, r.rule.name)}
    known = {word for r in RULES.values() for word in (r.code, r.name)}
    own = list(problems)
    for entry in suppressions:
        if entry in ended:
            own.append(
                own_finding(
                    UNUSED,
                    plural(
                        "the suppression of {what} ended on {date}: {n} finding is shown again",
                        "the suppression of {what} ended on {date}: {n} findings are shown again",
                        ended[entry],
                        what=_what(entry),
                        date=entry.until,
                    ),
                    entry,
                    severity="info",
                )
            )
        elif entry.code not in known:
            own.append(own_finding(UNUSED, _("the suppression of {what} names no rule", what=_what(entry)), entry))
        elif entry not in used and entry.code in judged:
            own.append(own_finding(UNUSED, _("the suppression of {what} matches no finding", what=_what(entry)), entry))
    own_runs = [RuleRun(UNUSED, len(suppressions))] if suppressions else []
    own_runs += [RuleRun(UNTRUSTED, 1)] if FILE in checkpoint.entries else []
    return Suppressed(kept, own, suppressed, own_runs)


def settle(reports: Iterable[Report]) -> None:
    """Remove S001 from a report if its suppression was used by another report of the same command."""
    reports = list(reports)
    used = {f.suppression["origin"] for r in reports for f in r.suppressed if f.suppression is not None}
    for report in reports:
        report.findings = [f for f in report.findings if f.code != UNUSED.code or f.evidence.get("origin") not in used]


def _same_file(entry: Suppression, item: Finding, checkpoint: Checkpoint, digests: dict[str, str]) -> bool:
    name = item.where.file
    if not entry.sha256:
        return True
    if name not in checkpoint.entries:
        return False
    if name not in digests:
        digests[name] = checkpoint.sha256(name)
    return digests[name] == entry.sha256


def _what(entry: Suppression) -> str:
    """What a suppression names, for a message."""
    values = {"code": entry.code, "where": entry.where, "hash": entry.sha256[:12]}
    if entry.where and entry.sha256:
        return _("{code} on {where} for sha256 {hash}…", **values)
    if entry.where:
        return _("{code} on {where}", **values)
    return _("{code} for sha256 {hash}…", **values) if entry.sha256 else entry.code


def own_finding(entry: Rule, message: str, source: Suppression, severity: str = "") -> Finding:
    """A finding about the configuration, at the line of `source`."""
    return Finding(
        message,
        Place(source.file, line=source.line, column=1),
        code=entry.code,
        name=entry.name,
        certainty=entry.certainty,
        severity=severity or entry.severity,
        subject=CHECKPOINT,
        evidence={"origin": source.origin},
    )
