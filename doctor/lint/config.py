"""Configuration: which file sets what, and which rules that selects.

Layers, the later one wins: built-in defaults; the nearest doctor.toml, or pyproject.toml with [tool.doctor], upward
from the working directory; DOCTOR_* variables; flags. A doctor.toml inside a checkpoint is no layer: it came with the
files, so it may only suppress, and what it suppresses is counted on the last line. For the same reason a directory that
looks like a checkpoint is skipped on the way up: `cd download && doctor check .` must not load rules out of the
download.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from datetime import date, datetime
from pathlib import Path
from typing import Any

from doctor.checkpoint.directory import INDEX_NAME, Checkpoint
from doctor.core.errors import BadCheckpoint, DoctorError
from doctor.core.finding import SEVERITIES, Finding
from doctor.core.messages import _
from doctor.core.recipe import Recipe, parse_runtime
from doctor.lint.engine import RuleRun, match_rules
from doctor.lint.rule import Rule
from doctor.lint.suppress import FILE, UNTRUSTED, Suppressed, Suppression, own_finding, place_pattern, suppress
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

MAX_BYTES = 1 << 20
_TYPES = {
    "select": STRINGS,
    "extend-select": STRINGS,
    "ignore": STRINGS,
    "rules": STRINGS,
    "fail-on": STRING,
    "recipe": TABLE,
    "suppress": TABLES,
}
_SUPPRESS = {"code": STRING, "where": STRING, "reason": STRING, "until": DATE, "sha256": STRING}


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

    def recipe(self) -> Recipe:
        """The default recipe with this file's values."""
        return Recipe(**self.recipe_values)

    def origin(self, key: str) -> str:
        """`pyproject.toml:12` for a key that the file sets, "" for another."""
        return f"{shown_path(self.file)}:{self.lines[key]}" if self.file is not None and key in self.lines else ""

    def apply_suppressions(
        self, findings: list[Finding], runs: list[RuleRun], checkpoint: Checkpoint, today: date | None = None
    ) -> Suppressed:
        """Separate the suppressed findings from the others, and add one for each suppression that matched nothing."""
        own, problems = of_checkpoint(checkpoint) if self.reads_checkpoint else ([], [])
        return suppress((*self.suppress, *own), findings, runs, checkpoint, today, problems)


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
    """Suppressions of the checkpoint's own doctor.toml, and a finding if it is broken or sets more than it may."""
    if FILE not in checkpoint.entries:
        return [], []
    try:
        text = TomlText(Path(FILE), checkpoint.read_file(FILE, MAX_BYTES), "", local_name=True)
        more = sorted(k for k in text.table if k != "suppress")
        problems = (
            [
                own_finding(
                    UNTRUSTED,
                    _(
                        "{file} of the checkpoint sets {keys}, which was not followed: it may only suppress",
                        file=FILE,
                        keys=", ".join(more),
                    ),
                    Suppression("", "", file=FILE, line=text.line(more[0])),
                )
            ]
            if more
            else []
        )
        return _suppressions(text, from_checkpoint=True), problems
    except (DoctorError, BadCheckpoint) as error:
        return [], [
            own_finding(
                UNTRUSTED,
                _("the checkpoint's {file} was not followed: {error}", file=FILE, error=error.message),
                Suppression("", "", file=FILE),
            )
        ]


def _config(text: TomlText, path: Path) -> Config:
    """What a file sets. Raises DoctorError with the line."""
    table = text.checked(text.table, _TYPES)
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


def _recipe(text: TomlText, table: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of Recipe; the runtime as on the command line, `vllm==0.9`. Raises DoctorError with the line."""
    table = {k.replace("-", "_"): v for k, v in table.items()}
    known = {f.name: f.default for f in fields(Recipe) if f.name != "runtime_version"}
    types = {
        k: {
            bool: BOOLEAN,
            int: WHOLE_NUMBER,
            float: NUMBER,
            str: STRING,
            tuple: STRINGS,
            type(None): BOOLEAN,  # only sym has the default None: the method decides
        }[type(v)]
        for k, v in known.items()
    }
    values: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in text.checked(table, types, "recipe").items()
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
    if not is_kind(entries, _TYPES["suppress"]):
        raise text.wrong(
            text.line("suppress"),
            _("{key} is {found}", key="suppress", found=kind_of(entries)),
            _("an array of tables, [[suppress]]"),
        )
    found = []
    for nth, entry in enumerate(entries):
        entry = text.checked(entry, _SUPPRESS, "suppress", nth)
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
