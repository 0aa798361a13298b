"""The rule engine: loads rules, asks the store for what they need, collects findings, and says what was not looked at.

It names no rule. A rule that crashes is a finding about us, and the others still run.
"""

import importlib
import importlib.util
import pkgutil
import re
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from doctor.checkpoint.directory import INDEX_NAME, Checkpoint
from doctor.core.errors import CheckpointNotReady, DoctorError, MachineError
from doctor.core.facts import STAGES, Store, Unavailable
from doctor.core.finding import SEVERITIES, Finding, Place
from doctor.core.recipe import Recipe
from doctor.core.version import __version__
from doctor.lint.rule import RULES, Rule, run_rule

_ORDER = "FCWGQKOS"
_RULE_FILE = re.compile(r"^[a-z]\d{3}_\w+$")


def load_rules(extra: Iterable[Path] = ()) -> list[Rule]:
    """All rules of the package doctor.rules and of the extra directories, by code. Raises DoctorError for a broken
    file.
    """
    import doctor.rules as package

    for module in sorted(m.name for m in pkgutil.iter_modules(package.__path__) if _RULE_FILE.match(m.name)):
        importlib.import_module(f"doctor.rules.{module}")
    for folder in extra:
        for path in sorted(Path(folder).glob("*.py")):
            _load_file(path)
    return sorted(RULES.values(), key=lambda r: r.code)


def _load_file(path: Path) -> None:
    name = f"doctor_extra_rules.{path.stem}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise DoctorError(f"{path}: the rule file cannot be loaded: {error}") from error


def match_rules(rules: Iterable[Rule], words: Iterable[str]) -> set[str]:
    """Codes of the rules that a word means: a code, a family letter or prefix, a name or a certainty. Raises
    DoctorError for none.
    """
    rules, found = list(rules), set()
    for word in words:
        means = {
            r.code for r in rules if word in (r.name, r.certainty) or (word.upper() == word and r.code.startswith(word))
        }
        if not means:
            raise DoctorError(
                f"{word!r}: no rule has this code, family, name or certainty.", "`doctor rules` lists them."
            )
        found |= means
    return found


def select_rules(rules: Iterable[Rule], select: Iterable[str] = (), ignore: Iterable[str] = ()) -> list[Rule]:
    """Rules that any word of select means (all for none) and no word of ignore. Raises DoctorError for a word that
    means none.
    """
    rules, select = list(rules), list(select)
    wanted = match_rules(rules, select) if select else {r.code for r in rules}
    wanted -= match_rules(rules, ignore)
    return [r for r in rules if r.code in wanted]


@dataclass
class RuleRun:
    """What became of one rule: the subjects it judged, and why it judged no others."""

    rule: Rule
    judged: int = 0
    seconds: float = 0.0
    reasons: dict[str, int] = field(default_factory=dict)  # reason -> subjects it kept from being judged
    crashed: str = ""

    @property
    def status(self) -> str:
        """ "crashed", "run", "skipped" (some reason kept it from judging anything) or "not applicable" (no subject at
        all).
        """
        if self.crashed:
            return "crashed"
        return "run" if self.judged else "skipped" if self.reasons else "not applicable"


@dataclass
class Report:
    """One run, whole: every other format is a rendering of it. `findings` are in the order in which one repairs."""

    checkpoint: str
    recipe: Recipe
    findings: list[Finding]
    runs: list[RuleRun]
    summary: dict = field(
        default_factory=dict
    )  # architecture, parameters, bytes, shards, tensors …: the second line of the screen
    skipped_tensors: dict[str, str] = field(default_factory=dict)
    bytes_read: int = 0
    seconds: float = 0.0
    fail_on: str = "error"
    version: str = __version__
    linears: list = field(default_factory=list)
    extra: dict = field(default_factory=dict)  # tables and series for pictures, by name
    suppressed: list[Finding] = field(default_factory=list)  # hidden by configuration; each says why
    baseline: str = ""  # what the findings were compared with
    gone: list[Finding] = field(default_factory=list)  # of the baseline, and no longer here

    def at_or_above(self, severity: str) -> list[Finding]:
        if severity == "never":
            return []
        return [f for f in self.findings if SEVERITIES.index(f.severity) <= SEVERITIES.index(severity)]

    @property
    def failing(self) -> list[Finding]:
        """Findings that make this run fail: at or above fail_on, and with a baseline only the new ones."""
        return [f for f in self.at_or_above(self.fail_on) if f.baseline_state != "unchanged"]

    @property
    def ok(self) -> bool:
        return not self.failing

    @property
    def crashed(self) -> list[RuleRun]:
        return [r for r in self.runs if r.crashed]

    def count(self, severity: str) -> int:
        return sum(f.severity == severity for f in self.findings)

    def raise_for_findings(self) -> None:
        """Raises CheckpointNotReady with one line per finding that makes the run fail."""
        bad = self.failing
        if bad:
            lines = "\n".join(f"{f.code} {f.message}" for f in bad)
            raise CheckpointNotReady(
                f"{self.checkpoint}: not ready for {self.recipe.label()}: {len(bad)} findings\n{lines}"
            )


def judge(store: Store, rules: Iterable[Rule], until: str = STAGES[-1]) -> tuple[list[Finding], list[RuleRun]]:
    """Run every rule on every subject of its scope; findings come in repair order, consequences after their cause."""
    findings: list[Finding] = []
    runs = []
    for entry in rules:
        run = RuleRun(entry)
        runs.append(run)
        if STAGES.index(entry.stage) > STAGES.index(until):
            run.reasons[f"stage {entry.stage} was not asked for"] = 1
            continue
        start = time.perf_counter()
        for subject, thing in list(store.subjects(entry.scope).items()):
            try:
                values = tuple(store.values(subject, entry))
                findings.extend(run_rule(entry, subject, thing, values))
                run.judged += 1
            except Unavailable as error:
                reason = str(error)
                run.reasons[reason] = run.reasons.get(reason, 0) + 1
            except MachineError:  # the network or the disk: no rule of ours, and nothing that may be left out
                raise
            except Exception as error:  # a crash of one rule must not hide the findings of the others
                run.crashed = f"{subject}: {type(error).__name__}: {error}"
                if sys.flags.dev_mode:
                    raise
                break
        run.seconds = time.perf_counter() - start
    return in_order(under_causes(findings, rules)), runs


def in_order(findings: list[Finding]) -> list[Finding]:
    """Errors before warnings, then by family in the order of repair, then by code; a consequence follows its cause's
    rank.
    """
    return sorted(
        findings, key=lambda f: (bool(f.consequence_of), SEVERITIES.index(f.severity), _ORDER.find(f.code[0]), f.code)
    )


def under_causes(findings: list[Finding], rules: Iterable[Rule]) -> list[Finding]:
    """Mark findings that another finding on the same tensor, file or checkpoint explains."""
    implied = {r.code: r.implied_by for r in rules if r.implied_by}
    if not implied:
        return findings
    marked = []
    for item in findings:
        cause = next((c for c in findings if c.code in implied.get(item.code, ()) and _touches(c, item)), None)
        marked.append(replace(item, consequence_of=cause.code) if cause else item)
    return marked


def _touches(cause: Finding, effect: Finding) -> bool:
    if cause.subject.startswith("checkpoint:") or effect.subject.startswith("checkpoint:"):
        return True
    return cause.where.file == effect.where.file or (
        cause.where.tensor is not None and cause.where.tensor == effect.where.tensor
    )


def against(report: Report, baseline: Report) -> None:
    """Say of each finding whether the baseline had it (same code, same place, blocks counted), and keep what is
    gone.
    """
    left: dict[tuple[str, str], list[Finding]] = {}
    for item in [*baseline.findings, *baseline.suppressed]:
        left.setdefault((item.code, item.target), []).append(item)

    def state(item: Finding) -> str:
        rest = left.get((item.code, item.target))
        return "unchanged" if rest and rest.pop(0) else "new"

    report.findings = [replace(f, baseline_state=state(f)) for f in report.findings]
    report.suppressed = [replace(f, baseline_state=state(f)) for f in report.suppressed]
    hidden = {id(f) for f in baseline.suppressed}
    report.gone = in_order(
        [replace(f, baseline_state="absent") for rest in left.values() for f in rest if id(f) not in hidden]
    )
    report.baseline = baseline.checkpoint


def locate(findings: Iterable[Finding], checkpoint: Checkpoint) -> list[Finding]:
    """Fill in lines, columns and frames from the files' own text, and the shard of a tensor."""
    return [replace(f, where=_located(f.where, checkpoint)) for f in findings]


def _located(place: Place, checkpoint: Checkpoint) -> Place:
    if place.tensor and not place.file:
        info = checkpoint.tensors.get(place.tensor)
        return replace(place, file=info.shard if info else INDEX_NAME)
    file = checkpoint.json.get(place.file)
    if file is None:
        return place
    if place.pointer is None:
        if file.broken is not None:
            return replace(place, line=file.broken.line, column=file.broken.column)
        return place
    spot, pointer = file.place(place.pointer), place.pointer
    if spot is None:  # the key is absent: point at the brace that should hold it
        pointer = pointer.rpartition("/")[0]
        spot = file.place(pointer)
        if spot is None:
            return place
        spot = (spot[0], spot[1], 1)
    line, column, length = spot
    lines = file.doc.text.split("\n")
    first = max(line - 1, 1)
    frame = tuple((n, lines[n - 1].rstrip("\r").replace("\t", " ")) for n in range(first, line + 1))
    return replace(
        place, line=line, column=column, length=min(length, max(len(lines[line - 1]) - column + 1, 1)), frame=frame
    )


_NUMBER = re.compile(r"\.(\d+)(?=\.|$)")


def fold(findings: Iterable[Finding]) -> list[tuple[Finding, list[Finding]]]:
    """Findings alike but for the block, as (first, all): one line on the screen, every record in JSON."""
    groups: dict[tuple, list[Finding]] = {}
    for item in findings:
        name = item.where.tensor
        where = (_NUMBER.sub(".N", name),) if name else (item.where.file, item.where.pointer, item.message)
        groups.setdefault((item.code, item.severity, item.consequence_of, item.baseline_state, *where), []).append(item)
    return [(group[0], group) for group in groups.values()]


def folded_name(names: Iterable[str]) -> str:
    """Tensor names alike but for one number, as one: model.layers.{0-3,7}.mlp.down_proj.weight."""
    from doctor.lint.rule import ranges

    names = sorted(set(names))
    first = _NUMBER.search(names[0])
    if len(names) == 1 or not first:
        return names[0]
    numbers = [int(m[1]) for m in map(_NUMBER.search, names) if m]
    return names[0][: first.start(1)] + ranges(numbers) + names[0][first.end(1) :]
