"""Configuration: which file said what, what it selects, and what it suppresses with a reason.

Layers, the later one wins: what is built in; the nearest doctor.toml, or pyproject.toml with [tool.doctor], upward from
the working directory; DOCTOR_* variables; flags. A doctor.toml inside a checkpoint is no layer: it came with the files,
so it may only suppress, and what it suppresses is counted on the last line. For the same reason a directory that looks
like a checkpoint is passed over on the way up: `cd download && doctor check .` must not load rules out of the download.

A shard has no comments, so suppressions live here. One that matches nothing is itself a finding (S001), or it would
outlive the defect it was written for and hide the next one.
"""

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import date, datetime
from functools import cache, cached_property
from pathlib import Path

from doctor.checkpoint.directory import INDEX_NAME, Checkpoint
from doctor.core.errors import BadCheckpoint, DoctorError
from doctor.core.facts import CHECKPOINT
from doctor.core.finding import SEVERITIES, Finding, Place
from doctor.core.recipe import Recipe, parse_runtime
from doctor.lint.engine import RuleRun, match_rules
from doctor.lint.rule import RULES, Rule, headline

FILE = "doctor.toml"
MAX_BYTES = 1 << 20
MAX_STARS = 8  # of one pattern; the checkpoint's own patterns are not to be trusted with the time they take
MAX_RANGE = 1000  # numbers of one {a-b}
_STRINGS = "a list of strings"
_TYPES = {
    "select": _STRINGS,
    "extend-select": _STRINGS,
    "ignore": _STRINGS,
    "rules": _STRINGS,
    "fail-on": "a string",
    "recipe": "a table",
    "suppress": "an array of tables",
}
_SUPPRESS = {"code": "a string", "where": "a string", "reason": "a string", "until": "a date", "sha256": "a string"}


def own_rule(doc: str, severity: str) -> Rule:
    """A rule of the engine's own, which is judged here and not by the store: its page is `doc`, like that of any rule
    file.
    """
    code = doc.split(" ", 1)[0]
    return Rule(
        code,
        *headline(doc, code),
        severity,
        "certain",
        "checkpoint",
        "listing",
        (),
        lambda *_: (),
        doc,
        module=__name__,
    )


UNUSED = own_rule(
    """S001 unused-suppression: a suppression in the configuration matches no finding.

Why: what it was written for is gone, or its pattern never fitted. Left in place it would hide the next defect at that place without
a word.

Do: remove it, or correct its pattern.

False alarms: a configuration shared by several checkpoints, checked one at a time. Check them in one command, or put the suppression
into the doctor.toml of the checkpoint it is for. A rule that was not run in this command gives no S001.

Fix safety: no fix: the file is yours.

Sources: doctor/lint/config.py.
""",
    "warning",
)
UNTRUSTED = own_rule(
    """S002 configuration-in-checkpoint: the checkpoint's own doctor.toml says more than it may, or cannot be read.

Why: it came with the files, from whoever made them. It may suppress findings, which is counted; it may not select, ignore, load rules
or change the plan.

Do: move what you want into your own doctor.toml or pyproject.toml.

False alarms: none.

Fix safety: no fix.

Sources: doctor/lint/config.py.
""",
    "warning",
)
OWN_RULES = (UNUSED, UNTRUSTED)


@dataclass(frozen=True)
class Selection:
    """What one layer says about rules: `select` starts anew, `extend_select` adds to it, `ignore` takes away."""

    select: tuple[str, ...] = ()
    extend_select: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()


def choose(rules: Iterable[Rule], layers: Iterable[Selection]) -> list[Rule]:
    """Rules left after every layer, first layer first. Raises DoctorError for a word that means no rule, and when none
    is left.
    """
    rules = list(rules)
    chosen = {r.code for r in rules}
    for layer in layers:
        if layer.select:
            chosen = match_rules(rules, layer.select)
        chosen = (chosen | match_rules(rules, layer.extend_select)) - match_rules(rules, layer.ignore)
    if not chosen:
        raise DoctorError(
            "no rule is left after select and ignore.", "`doctor check --show-settings` says where each comes from."
        )
    return [r for r in rules if r.code in chosen]


# suppressions


@dataclass(frozen=True)
class Suppression:
    """One [[suppress]] entry. where: pattern of a tensor, a file or file#pointer, "" for every place. until: last day
    it holds.
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
        """`pyproject.toml:12`, from the working directory."""
        return f"{self.file if self.from_checkpoint else _shown(Path(self.file))}:{self.line}"

    def means(self, item: Finding) -> bool:
        """Whether it is about this finding, by code or name and by place; dates and hashes are not looked at."""
        if self.code not in (item.code, item.name):
            return False
        where = item.where
        return not self.where or any(
            _pattern(self.where).fullmatch(t) for t in (where.tensor, where.file, item.target) if t
        )


@cache
def _pattern(text: str) -> re.Pattern:
    """A place pattern: `*` and `?` as in a shell, {1,2,down} alternatives, {0-39} ranges of numbers. Raises
    DoctorError.

    Each part between two stars is tried at its first fit only (an atomic group), so matching takes no more than length
    × stars.
    """
    if text.count("*") > MAX_STARS:
        raise DoctorError(f"pattern {text[:80]!r}: {text.count('*')} stars; at most {MAX_STARS} are read.")
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
            raise DoctorError(f"pattern {{{text}}}: {option.strip()} is not a range of 1 to {MAX_RANGE} numbers.")
        options += map(str, range(first, last + 1))
    # Bounds on both sides: {1-3} must not fit the 1 of 10.
    return (
        "(?<![0-9])(?:" + "|".join(options) + ")(?![0-9])"
        if all(o.isdigit() for o in options)
        else "(?:" + "|".join(options) + ")"
    )


# one file


@dataclass(frozen=True)
class Config:
    """What one configuration file says; `Config()` says nothing. `lines` maps a key, as `recipe.bits`, to its line."""

    file: Path | None = None
    selection: Selection = Selection()
    fail_on: str | None = None
    rules_dirs: tuple[Path, ...] = ()
    recipe_values: Mapping[str, object] = field(default_factory=dict)
    suppress: tuple[Suppression, ...] = ()
    lines: Mapping[str, int] = field(default_factory=dict)
    reads_checkpoint: bool = True  # whether a checkpoint's own doctor.toml is looked at

    def recipe(self) -> Recipe:
        """The default plan with this file's values."""
        return Recipe(**self.recipe_values)

    def origin(self, key: str) -> str:
        """`pyproject.toml:12` for a key that the file sets, "" for another."""
        return f"{_shown(self.file)}:{self.lines[key]}" if key in self.lines else ""

    def hush(
        self, findings: list[Finding], runs: list[RuleRun], checkpoint: Checkpoint, today: date | None = None
    ) -> "Hushed":
        """Part suppressed findings from the others, and give a finding for each suppression that did nothing."""
        own, problems = of_checkpoint(checkpoint) if self.reads_checkpoint else ((), ())
        return hush((*self.suppress, *own), findings, runs, checkpoint, today, problems)


def load(start: Path | None = None) -> Config:
    """The nearest configuration upward from a directory. Raises DoctorError with file and line."""
    folder = Path(start or Path.cwd()).resolve()
    for place in (folder, *folder.parents):
        if _holds_checkpoint(place):
            continue
        for name in (FILE, "pyproject.toml"):
            if (place / name).is_file():
                found = read(place / name)
                if found is not None:
                    return found
    return Config()


def _holds_checkpoint(folder: Path) -> bool:
    return (folder / "config.json").exists() or (folder / INDEX_NAME).exists() or any(folder.glob("*.safetensors"))


def read(path: Path) -> Config | None:
    """One configuration file; None for a pyproject.toml without [tool.doctor]. Raises DoctorError with file and
    line.
    """
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise DoctorError(
            f"{path}: {error.strerror}.", "Give a doctor.toml or pyproject.toml that can be read."
        ) from None
    inside = path.name == "pyproject.toml"
    if inside and b"tool" not in raw:
        return None
    text = _Text(Path(path), raw, "tool.doctor" if inside else "")
    if inside and "doctor" not in text.document.get("tool", {}):
        return None
    return text.config(path)


def of_checkpoint(checkpoint: Checkpoint) -> tuple[list[Suppression], list[Finding]]:
    """Suppressions of the checkpoint's own doctor.toml, and a finding where it is broken or asks for more than it
    may.
    """
    if FILE not in checkpoint.entries:
        return [], []
    try:
        text = _Text(Path(FILE), checkpoint.read_file(FILE, MAX_BYTES), "", from_checkpoint=True)
        more = sorted(k for k in text.table if k != "suppress")
        problems = (
            [
                _own(
                    UNTRUSTED,
                    f"{FILE} of the checkpoint sets {', '.join(more)}, which was not followed: it may only suppress",
                    Suppression("", "", file=FILE, line=text.line(more[0])),
                )
            ]
            if more
            else []
        )
        return text.suppressions(), problems
    except (DoctorError, BadCheckpoint) as error:
        return [], [
            _own(UNTRUSTED, f"{error.message.rstrip('.')}; nothing of it was followed", Suppression("", "", file=FILE))
        ]


class _Text:
    """A parsed file that knows where its keys stand. tomllib gives no places, so they are looked for in the text."""

    def __init__(self, path: Path, raw: bytes, prefix: str, from_checkpoint: bool = False):
        self.name = path.name if from_checkpoint else _shown(path)
        self.file = path.name if from_checkpoint else str(path.resolve())
        self.prefix, self.from_checkpoint, name = prefix, from_checkpoint, self.name
        try:
            self.text = raw.decode("utf-8")
            self.document = tomllib.loads(self.text)
        except UnicodeDecodeError as error:
            raise DoctorError(f"{name}: not UTF-8 at byte {error.start}.", "Save it as UTF-8.") from None
        except tomllib.TOMLDecodeError as error:
            where = re.search(r"\(at line (\d+), column (\d+)\)", str(error))
            spot = f":{where[1]}:{where[2]}" if where else ""
            raise DoctorError(
                f"{name}{spot}: not TOML: {str(error).partition(' (at')[0]}.", "Correct the file."
            ) from None
        except RecursionError:
            raise DoctorError(f"{name}: nested too deeply.", "Correct the file.") from None

    @cached_property
    def table(self) -> dict:
        found = self.document
        for key in filter(None, self.prefix.split(".")):
            found = found.get(key, {})
        if not isinstance(found, dict):
            raise DoctorError(f"{self.name}: {self.prefix} is {_kind(found)}; it must be a table.")
        return {_hyphen(k): v for k, v in found.items()}

    def line(self, key: str, table: str = "", nth: int = 0) -> int:
        """Line of a key in a table (the nth of an array of tables); of the table's head where the key is not found;
        else 1.
        """
        wanted = ".".join(filter(None, (self.prefix, table)))
        here, seen, best = not wanted, -1, 1
        for number, line in enumerate(self.text.split("\n"), 1):
            head = re.match(r"\s*\[\[?\s*([^\]]+?)\s*\]", line)
            if head:
                name = re.sub(r"[\s\"']", "", head[1])
                seen += name == wanted and table == "suppress"
                here = name == wanted and (table != "suppress" or seen == nth)
                if here or (best == 1 and name == ".".join(filter(None, (wanted, key)))):
                    best = number
            elif here and key and _hyphen((re.match(r"\s*[\"']?([\w.-]+)", line) or ("", ""))[1]) == _hyphen(key):
                return number
        return best

    def wrong(self, line: int, what: str, must: str = "") -> DoctorError:
        return DoctorError(
            f"{self.name}:{line}: {what}{'; it must be ' + must if must else ''}.",
            "`doctor check --show-settings` shows every key.",
        )

    def checked(self, table: Mapping, types: Mapping[str, str], name: str = "", nth: int = 0) -> dict:
        """The table, its keys known and its values of the right type. Raises DoctorError with the line."""
        label = f"{name}." if name else ""
        for key, value in table.items():
            if key not in types:
                import difflib

                near = difflib.get_close_matches(key, types, 1)
                raise self.wrong(
                    self.line(key, name, nth),
                    f"unknown key {label}{key}"
                    + (f"; did you mean {near[0]}?" if near else f"; known are {', '.join(types)}"),
                )
            if not _is(value, types[key]):
                raise self.wrong(self.line(key, name, nth), f"{label}{key} is {_kind(value)}", types[key])
        return dict(table)

    def config(self, path: Path) -> Config:
        table = self.checked(self.table, _TYPES)
        recipe = self.recipe(table.get("recipe", {}))
        fail_on = table.get("fail-on")
        if fail_on is not None and fail_on not in (*SEVERITIES, "never"):
            raise self.wrong(self.line("fail-on"), f"fail-on is {fail_on!r}", f"one of {', '.join(SEVERITIES)}, never")
        dirs = tuple((path.parent / d).resolve() for d in table.get("rules", ()))
        for folder in dirs:
            if not folder.is_dir():
                raise self.wrong(self.line("rules"), f"rules names {folder}, which is no directory")
        lines = {k: self.line(k) for k in table if k not in ("recipe", "suppress")}
        lines |= {f"recipe.{k}": self.line(k, "recipe") for k in table.get("recipe", {})}
        return Config(
            path,
            Selection(*(tuple(table.get(k, ())) for k in ("select", "extend-select", "ignore"))),
            fail_on,
            dirs,
            recipe,
            tuple(self.suppressions()),
            {k.replace("-", "_") if k.startswith("recipe.") else k: n for k, n in lines.items()},
        )

    def recipe(self, table: Mapping) -> dict:
        """Fields of Recipe; the runtime as `vllm==0.9` on the command line."""
        table = {k.replace("-", "_"): v for k, v in table.items()}
        known = {f.name: f.default for f in fields(Recipe) if f.name != "runtime_version"}
        types = {
            k: {
                bool: "true or false",
                int: "a whole number",
                float: "a number",
                str: "a string",
                tuple: _STRINGS,
                type(None): "true or false",
            }[type(v)]  # only sym has no default of its own: the method decides
            for k, v in known.items()
        }
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in self.checked(table, types, "recipe").items()}
        if "runtime" in values:
            values["runtime"], values["runtime_version"] = parse_runtime(values["runtime"])
        try:
            Recipe(**values)
        except DoctorError as error:
            culprit = next((k for k in table if k.replace("_", " ") in error.message), next(iter(table), ""))
            raise DoctorError(f"{self.name}:{self.line(culprit, 'recipe')}: {error.message}") from None
        return values

    def suppressions(self) -> list[Suppression]:
        """The [[suppress]] entries. Raises DoctorError with the line."""
        entries = self.table.get("suppress", [])
        if not _is(entries, _TYPES["suppress"]):
            raise self.wrong(self.line("suppress"), f"suppress is {_kind(entries)}", "an array of tables, [[suppress]]")
        found = []
        for nth, entry in enumerate(entries):
            entry = self.checked(entry, _SUPPRESS, "suppress", nth)
            head = self.line("", "suppress", nth)
            for key in ("code", "reason"):
                if not str(entry.get(key, "")).strip():
                    raise self.wrong(head, f"suppress has no {key}", "there: a suppression says what it hides and why")
            sha256 = entry.get("sha256", "").lower()
            if sha256 and not re.fullmatch(r"[0-9a-f]{64}", sha256):
                raise self.wrong(
                    self.line("sha256", "suppress", nth), "suppress.sha256 is not a SHA-256", "64 hexadecimal digits"
                )
            until = entry.get("until")
            until = until.date() if isinstance(until, datetime) else until
            try:
                _pattern(entry.get("where", ""))
            except DoctorError as error:
                raise DoctorError(f"{self.name}:{self.line('where', 'suppress', nth)}: {error.message}") from None
            found.append(
                Suppression(
                    entry["code"],
                    entry["reason"],
                    entry.get("where", ""),
                    until,
                    sha256,
                    self.file,
                    head,
                    self.from_checkpoint,
                )
            )
        return found


def _hyphen(key: str) -> str:
    return key.replace("_", "-")


def _is(value: object, kind: str) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return {
        "a string": isinstance(value, str),
        "true or false": isinstance(value, bool),
        "a whole number": whole,
        "a number": whole or isinstance(value, float),
        "a table": isinstance(value, dict),
        "a date": isinstance(value, date),
        _STRINGS: isinstance(value, list) and all(isinstance(v, str) for v in value),
        "an array of tables": isinstance(value, list) and all(isinstance(v, dict) for v in value),
    }[kind]


def _kind(value: object) -> str:
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a string",
        dict: "a table",
        list: "a list",
        date: "a date",
        datetime: "a date",
    }
    return (
        f"{names.get(type(value), type(value).__name__)} ({str(value)[:40]})"
        if not isinstance(value, (dict, list))
        else names[type(value)]
    )


def _shown(path: Path) -> str:
    """A path as people write it: from the working directory where it lies below, else whole."""
    path = Path(path).resolve()
    try:
        return str(path.relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)


# their effect


@dataclass
class Hushed:
    """Findings after suppression. `suppressed` carry their reason in Finding.suppression; `own` are about the
    configuration itself, and `runs` the rules they belong to.
    """

    findings: list[Finding]
    own: list[Finding]
    suppressed: list[Finding]
    runs: list[RuleRun]


def hush(
    suppressions: Iterable[Suppression],
    findings: list[Finding],
    runs: list[RuleRun],
    checkpoint: Checkpoint,
    today: date | None = None,
    problems: Iterable[Finding] = (),
) -> Hushed:
    """Part the findings; see Config.hush. Only the files of findings that a sha256 is about are hashed."""
    today = today or date.today()
    suppressions, problems = list(suppressions), list(problems)
    digests: dict[str, str] = {}
    kept, suppressed, used, ended = [], [], set(), {}
    for item in findings:
        about = [s for s in suppressions if s.means(item)]
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
                _own(
                    UNUSED,
                    f"the suppression of {_what(entry)} ended on {entry.until}: {ended[entry]} finding{'s' * (ended[entry] != 1)} "
                    "of it are shown again",
                    entry,
                    severity="info",
                )
            )
        elif entry.code not in known:
            own.append(_own(UNUSED, f"the suppression of {_what(entry)} names no rule", entry))
        elif entry not in used and entry.code in judged:
            own.append(_own(UNUSED, f"the suppression of {_what(entry)} matches no finding", entry))
    made = [RuleRun(UNUSED, len(suppressions))] if suppressions else []
    made += [RuleRun(UNTRUSTED, 1)] if FILE in checkpoint.entries else []
    return Hushed(kept, own, suppressed, made)


def settle(reports: Iterable) -> None:
    """Take back S001 where several checkpoints were checked with one configuration and another of them has the
    finding.
    """
    reports = list(reports)
    used = {f.suppression["origin"] for r in reports for f in r.suppressed}
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
    return (
        entry.code
        + (f" on {entry.where}" if entry.where else "")
        + (f" for sha256 {entry.sha256[:12]}…" if entry.sha256 else "")
    )


def _own(entry: Rule, message: str, source: Suppression, severity: str = "") -> Finding:
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
