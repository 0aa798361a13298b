"""Configuration: which file sets what, and which rules that selects.

Layers, the later one wins: built-in defaults; the nearest doctor.toml, or pyproject.toml with [tool.doctor], upward
from the working directory that trust.py believes, else the doctor.toml of the user's own configuration directory;
DOCTOR_* variables; flags. A doctor.toml inside a checkpoint is no layer: it came with the files. It may only suppress,
and only after `doctor trust`. What is found and not believed is said, and changes nothing.
"""

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import date, datetime
from pathlib import Path
from typing import Any

from doctor.checkpoint.directory import Checkpoint
from doctor.checkpoint.regular import read_regular
from doctor.core.errors import BadCheckpoint, DoctorError
from doctor.core.finding import SEVERITIES, Finding
from doctor.core.messages import Message, _, listed, plural
from doctor.core.recipe import Recipe, parse_runtime
from doctor.lint.engine import Report, RuleRun, in_order, load_rules, match_rules
from doctor.lint.rule import Rule
from doctor.lint.suppress import UNTRUSTED, Suppressed, Suppression, own_finding, place_pattern, suppress
from doctor.lint.toml_text import (
    BOOLEAN,
    DATE,
    NUMBER,
    STRING,
    STRINGS,
    TABLE,
    TABLES,
    WHOLE_NUMBER,
    TomlText,
    is_kind,
    kind_of,
    shown_path,
)
from doctor.lint.trust import FILE, MAX_BYTES, doubt, holds_checkpoint, is_allowed, user_folder

TOP_TYPES = {
    "select": STRINGS,
    "extend-select": STRINGS,
    "ignore": STRINGS,
    "rules": STRINGS,
    "fail-on": STRING,
    "recipe": TABLE,
    "suppress": TABLES,
}
SUPPRESS_TYPES = {"code": STRING, "where": STRING, "reason": STRING, "until": DATE, "sha256": STRING}


@dataclass(frozen=True)
class Selection:
    """One layer's choice of rules: `select` replaces the choice so far, `extend_select` adds to it, `ignore`
    removes.
    """

    select: tuple[str, ...] = ()
    extend_select: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()


def choose(rules: Iterable[Rule], layers: Iterable[Selection]) -> list[Rule]:
    """Rules left after every layer, first layer first. Raises DoctorError for a word that names no rule, and if no rule
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
            _("no rule is left after select and ignore."),
            _("`doctor check --show-settings` shows where each comes from."),
        )
    return [r for r in rules if r.code in chosen]


@dataclass(frozen=True)
class Config:
    """What one configuration file sets; `Config()` sets nothing. `lines` maps a key, as `recipe.bits`, to its line."""

    file: Path | None = None
    selection: Selection = Selection()
    fail_on: str | None = None
    rules_dirs: tuple[Path, ...] = ()
    recipe_values: Mapping[str, Any] = field(default_factory=dict)
    suppress: tuple[Suppression, ...] = ()
    lines: Mapping[str, int] = field(default_factory=dict)
    reads_checkpoint: bool = True  # whether a checkpoint's own doctor.toml is read
    ignored: tuple[Message, ...] = ()  # what was found and not believed, a sentence each

    def recipe(self) -> Recipe:
        """The default recipe with this file's values."""
        return Recipe(**self.recipe_values)

    def contents(self) -> Message | str:
        """What the file sets, for a screen: its keys, and how many findings it may hide."""
        keys: list[str] = list(self.lines)
        if self.suppress:
            keys.append(plural("{n} suppression", "{n} suppressions", len(self.suppress)))
        return listed(keys) if keys else _("nothing")

    def origin(self, key: str) -> str:
        """`pyproject.toml:12` for a key that the file sets, "" for another."""
        return f"{shown_path(self.file)}:{self.lines[key]}" if self.file is not None and key in self.lines else ""

    def suppress_in(self, report: Report, checkpoint: Checkpoint) -> None:
        """Apply the suppressions to a report, which keeps what they take away apart."""
        split = self.apply_suppressions(report.findings, report.runs, checkpoint)
        report.findings, report.suppressed = in_order([*split.findings, *split.own]), split.suppressed
        report.runs = [*report.runs, *split.runs]

    def apply_suppressions(
        self, findings: list[Finding], runs: list[RuleRun], checkpoint: Checkpoint, today: date | None = None
    ) -> Suppressed:
        """Separate the suppressed findings from the others, and add one for each suppression that matched nothing."""
        own, problems = of_checkpoint(checkpoint) if self.reads_checkpoint else ([], [])
        return suppress((*self.suppress, *own), findings, runs, checkpoint, today, problems)


def rules_of(
    rules_dirs: Iterable[Path],
    config: Config | None,
    select: Iterable[str],
    extend_select: Iterable[str],
    ignore: Iterable[str],
) -> list[Rule]:
    """The rules of a run: the configuration's layer, then the caller's."""
    config = config or Config()
    layers = (config.selection, Selection(tuple(select), tuple(extend_select), tuple(ignore)))
    return choose(load_rules(dict.fromkeys((*config.rules_dirs, *rules_dirs))), layers)


def load(start: Path | None = None) -> Config:
    """The nearest believed configuration upward from a directory, else that of the user's own configuration directory.

    Config.ignored says what was found and not believed. Raises DoctorError with file and line.
    """
    folder = Path(start or Path.cwd()).resolve()
    ignored: list[Message] = []
    for path in _candidates(folder):
        doubtful = doubt(path)
        if doubtful is not None:
            ignored.append(_("{file}: {doubt}", file=shown_path(path), doubt=doubtful))
        elif not holds_checkpoint(path.parent) and (found := read(path)) is not None:
            if found.rules_dirs and not is_allowed(path):
                ignored.append(_("the Python rule files that {file} names", file=shown_path(path)))
                found = replace(found, rules_dirs=())
            return replace(found, ignored=tuple(ignored))
    own = user_folder() / FILE
    found = (read(own) if own.is_file() else None) or Config()
    return replace(found, ignored=tuple(ignored))


def _candidates(folder: Path) -> Iterator[Path]:
    """Configuration files upward from a directory."""
    for place in (folder, *folder.parents):
        for name in (FILE, "pyproject.toml"):
            path = place / name
            if path.is_file() and (name == FILE or _speaks_of_doctor(path)):
                yield path


def _speaks_of_doctor(path: Path) -> bool:
    """Whether a pyproject.toml has [tool.doctor], or cannot be read to tell."""
    try:
        raw = read_regular(path, MAX_BYTES)
        return b"doctor" in raw and "doctor" in tomllib.loads(raw.decode("utf-8")).get("tool", {})
    except (OSError, DoctorError, ValueError, RecursionError, AttributeError, TypeError):
        return True


def read(path: Path) -> Config | None:
    """One configuration file; None for a pyproject.toml without [tool.doctor]. Raises DoctorError with file and
    line.
    """
    try:
        raw = read_regular(Path(path), MAX_BYTES)
    except OSError as error:
        raise DoctorError(
            _("{path}: {error}.", path=path, error=error.strerror),
            _("Give a doctor.toml or pyproject.toml that can be read."),
        ) from None
    inside = path.name == "pyproject.toml"
    if inside and b"tool" not in raw:
        return None
    text = TomlText(Path(path), raw, "tool.doctor" if inside else "")
    if inside and "doctor" not in text.document.get("tool", {}):
        return None
    return _config(text, path)


def of_checkpoint(checkpoint: Checkpoint) -> tuple[list[Suppression], list[Finding]]:
    """Suppressions of the checkpoint's own doctor.toml where the user trusts it, and a finding where it was not
    followed.
    """
    if FILE not in checkpoint.entries:
        return [], []
    path = checkpoint.root / FILE
    if checkpoint.unread or not is_allowed(path):
        return [], [_not_followed(_("it came with the files; `doctor trust {file}` allows it to suppress", file=path))]
    try:
        text = TomlText(Path(FILE), checkpoint.read_file(FILE, MAX_BYTES), "", local_name=True)
        more = sorted(k for k in text.table if k != "suppress")
        found = _suppressions(text, from_checkpoint=True)
    except (DoctorError, BadCheckpoint) as error:
        return [], [_not_followed(error.message)]
    problem = _("it sets {keys}; it may only suppress", keys=", ".join(more))
    return found, [_not_followed(problem, text.line(more[0]))] if more else []


def _not_followed(why: str, line: int = 1) -> Finding:
    message = _("the checkpoint's {file} was not followed: {error}", file=FILE, error=why)
    return own_finding(UNTRUSTED, message, Suppression("", "", file=FILE, line=line))


def _config(text: TomlText, path: Path) -> Config:
    """What a file sets. Raises DoctorError with the line."""
    table = text.checked(text.table, TOP_TYPES)
    recipe = _recipe(text, table.get("recipe", {}))
    fail_on = table.get("fail-on")
    if fail_on is not None and fail_on not in (*SEVERITIES, "never"):
        raise text.wrong(
            text.line("fail-on"),
            _("{key} is {found!r}", key="fail-on", found=fail_on),
            _("one of {words}", words=", ".join((*SEVERITIES, "never"))),
        )
    dirs = tuple((path.parent / d).resolve() for d in table.get("rules", ()))
    for folder in dirs:
        if not folder.is_dir():
            raise text.wrong(text.line("rules"), _("rules names {folder}, which is no directory", folder=folder))
    lines = {k: text.line(k) for k in table if k not in ("recipe", "suppress")}
    lines |= {f"recipe.{k}": text.line(k, "recipe") for k in table.get("recipe", {})}
    return Config(
        path,
        Selection(*(tuple(table.get(k, ())) for k in ("select", "extend-select", "ignore"))),
        fail_on,
        dirs,
        recipe,
        tuple(_suppressions(text)),
        {k.replace("-", "_") if k.startswith("recipe.") else k: n for k, n in lines.items()},
    )


def recipe_types() -> dict[str, str]:
    """Key of a [recipe] table, with underscores -> the kind of its value, a constant of toml_text."""
    kinds: dict[type, str] = {
        bool: BOOLEAN,
        int: WHOLE_NUMBER,
        float: NUMBER,
        str: STRING,
        tuple: STRINGS,
        type(None): BOOLEAN,  # only sym has the default None: the method decides
    }
    return {f.name: kinds[type(f.default)] for f in fields(Recipe) if f.name != "runtime_version"}


def _recipe(text: TomlText, table: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of Recipe; the runtime as on the command line, `vllm==0.9`. Raises DoctorError with the line."""
    table = {k.replace("-", "_"): v for k, v in table.items()}
    values: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in text.checked(table, recipe_types(), "recipe").items()
    }
    if "runtime" in values:
        values["runtime"], values["runtime_version"] = parse_runtime(values["runtime"])
    try:
        Recipe(**values)
    except DoctorError as error:
        culprit = next((k for k in table if k.replace("_", " ") in error.message), next(iter(table), ""))
        raise DoctorError(
            _("{where}: {error}", where=f"{text.name}:{text.line(culprit, 'recipe')}", error=error.message)
        ) from None
    return values


def _suppressions(text: TomlText, from_checkpoint: bool = False) -> list[Suppression]:
    """The [[suppress]] entries. Raises DoctorError with the line."""
    entries = text.table.get("suppress", [])
    if not is_kind(entries, TOP_TYPES["suppress"]):
        raise text.wrong(
            text.line("suppress"),
            _("{key} is {found}", key="suppress", found=kind_of(entries)),
            _("an array of tables, [[suppress]]"),
        )
    found = []
    for nth, entry in enumerate(entries):
        entry = text.checked(entry, SUPPRESS_TYPES, "suppress", nth)
        head = text.line("", "suppress", nth)
        for key in ("code", "reason"):
            if not str(entry.get(key, "")).strip():
                raise text.wrong(
                    head,
                    _("suppress has no {key}: a suppression states the code that it hides and the reason", key=key),
                )
        sha256 = entry.get("sha256", "").lower()
        if sha256 and not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise text.wrong(
                text.line("sha256", "suppress", nth), _("suppress.sha256 is not a SHA-256"), _("64 hexadecimal digits")
            )
        until = entry.get("until")
        until = until.date() if isinstance(until, datetime) else until
        try:
            place_pattern(entry.get("where", ""))
        except DoctorError as error:
            raise DoctorError(
                _("{where}: {error}", where=f"{text.name}:{text.line('where', 'suppress', nth)}", error=error.message)
            ) from None
        found.append(
            Suppression(
                entry["code"],
                entry["reason"],
                entry.get("where", ""),
                until,
                sha256,
                text.file,
                head,
                from_checkpoint,
            )
        )
    return found


def default_recipe(checkpoint: Checkpoint, config: Config | None) -> Recipe:
    """The recipe without one from the caller: of a quantized checkpoint, what its own quantization_config states."""
    from doctor.model.quantization_config import STATED, stored_recipe

    own = config.recipe() if config else Recipe()
    return own if config and config.recipe_values.keys() & STATED else stored_recipe(checkpoint, own)
