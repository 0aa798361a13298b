"""The rule engine: loads rules, asks the store for the facts they need, collects findings, and reports what was
skipped.

It names no rule. A rule that crashes is reported as an internal error (a bug in doctor), and the others still run.
"""

import importlib
import importlib.util
import pkgutil
import re
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice
from pathlib import Path

from doctor.checkpoint.directory import INDEX_NAME, Checkpoint
from doctor.core.collection import uncollected
from doctor.core.errors import CheckpointNotReady, DoctorError, MachineError
from doctor.core.facts import COSTS, Unavailable, closure
from doctor.core.finding import SEVERITIES, Finding, Place
from doctor.core.messages import _, plural
from doctor.core.near import nearest, nearest_codes
from doctor.core.recipe import Recipe
from doctor.core.store import Store
from doctor.core.version import __version__
from doctor.lint.rule import RULES, Rule, ranges, run_rule

RULES_PACKAGE = "doctor.rules"
MOST_FINDINGS = 1000  # of one rule on one subject: an index may name a million files
_ORDER = "FCWGQKOS"  # of families, as one repairs
_RULE_FILE = re.compile(r"^[a-z]\d{3}_\w+$")


def load_rules(extra: Iterable[Path] = ()) -> list[Rule]:
    """All rules of the package doctor.rules and of the extra directories, by code. Raises DoctorError for a broken
    file.
    """
    _load_package()
    for folder in extra:
        for path in sorted(Path(folder).glob("*.py")):
            _load_file(path)
    return sorted(RULES.values(), key=lambda r: r.code)


@cache
def _load_package() -> None:
    package = importlib.import_module(RULES_PACKAGE)  # by name: rules import this wing, not the other way round
    for module in sorted(m.name for m in pkgutil.iter_modules(package.__path__) if _RULE_FILE.match(m.name)):
        importlib.import_module(f"{RULES_PACKAGE}.{module}")


def _load_file(path: Path) -> None:
    name = f"doctor_extra_rules.{path.stem}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise DoctorError(_("{path}: not a Python file.", path=path))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise DoctorError(_("{path}: the rule file cannot be loaded: {error}", path=path, error=error)) from error


def match_rules(rules: Iterable[Rule], words: Iterable[str]) -> set[str]:
    """Codes of the rules that the words name: a code, a family letter or prefix, a name or a certainty. Raises
    DoctorError for a word that names none.
    """
    rules = list(rules)
    found: set[str] = set()
    for word in words:
        means = {
            r.code for r in rules if word in (r.name, r.certainty) or (word.upper() == word and r.code.startswith(word))
        }
        if not means:
            near = nearest_codes(word, [r.code for r in rules])
            near = near or nearest(word, (text for r in rules for text in (r.code, r.name)))
            raise DoctorError(
                _("{word!r}: no rule has this code, family, name or certainty.", word=word),
                near or _("`doctor rules` lists them."),
            )
        found |= means
    return found


def select_rules(rules: Iterable[Rule], select: Iterable[str] = (), ignore: Iterable[str] = ()) -> list[Rule]:
    """Rules that any word of select names (all without one) and no word of ignore. Raises DoctorError for a word that
    names none.
    """
    rules, select = list(rules), list(select)
    wanted = match_rules(rules, select) if select else {r.code for r in rules}
    wanted -= match_rules(rules, ignore)
    return [r for r in rules if r.code in wanted]


@dataclass
class RuleRun:
    """The outcome of one rule: how many subjects it judged, and why it did not judge the others."""

    rule: Rule
    judged: int = 0
    seconds: float = 0.0
    reasons: dict[str, int] = field(default_factory=dict)  # reason -> how many subjects were not judged for it
    crashed: str = ""

    @property
    def status(self) -> str:
        """One of "crashed", "run", "skipped" (for some reason it judged nothing) and "not applicable" (no subject)."""
        if self.crashed:
            return "crashed"
        return "run" if self.judged else "skipped" if self.reasons else "not applicable"


@dataclass(repr=False)
class Report:
    """Everything that one run found: each output format renders it. `findings` are in the order in which one
    repairs.
    """

    checkpoint: str
    recipe: Recipe
    findings: list[Finding]
    runs: list[RuleRun]
    summary: dict = field(default_factory=dict)  # architecture, parameters, bytes, shards, tensors …: scan/summary.py
    skipped_tensors: dict[str, str] = field(default_factory=dict)
    bytes_read: int = 0
    seconds: float = 0.0
    fail_on: str = "error"
    version: str = __version__
    linears: list = field(default_factory=list)
    extra: dict = field(default_factory=dict)  # tables and series for charts, by name
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

    def __repr__(self) -> str:
        found = ", ".join(f"{self.count(s)} {s}" for s in SEVERITIES if self.count(s)) or "no findings"
        plan = "" if self.recipe.goal == "none" else f" for {self.recipe.label()}"
        return f"<Report on {self.checkpoint}{plan}: {found}>"

    def to_json(self) -> str:
        """As `-f json` writes it, by doctor/report/formats/schema.json."""
        return self._rendered("json")

    def to_markdown(self) -> str:
        """As `-f markdown` writes it."""
        return self._rendered("markdown")

    def to_html(self) -> str:
        """One page that needs no network, as `-f html` writes it."""
        return self._rendered("html")

    def _repr_html_(self) -> str:
        """What a notebook shows: the page in a frame of its own, so that its styles stay inside."""
        page = self.to_html().replace("&", "&amp;").replace('"', "&quot;")
        return f'<iframe srcdoc="{page}" style="width:100%;height:600px;border:0"></iframe>'

    def _rendered(self, name: str) -> str:
        report = importlib.import_module("doctor.report")  # by name: the wing that renders imports this one
        return str(report.render(name, [self], "en"))

    def raise_for_findings(self) -> None:
        """Raise CheckpointNotReady with one line for each finding that makes the run fail."""
        bad = self.failing
        if bad:
            lines = "\n".join(f"{f.code} {f.message}" for f in bad)
            raise CheckpointNotReady(
                plural(
                    "{checkpoint}: not ready for {recipe}: {n} finding\n{lines}",
                    "{checkpoint}: not ready for {recipe}: {n} findings\n{lines}",
                    len(bad),
                    checkpoint=self.checkpoint,
                    recipe=self.recipe.label(),
                    lines=lines,
                )
            )


@uncollected()
def judge(store: Store, rules: Iterable[Rule], until: str = COSTS[-1]) -> tuple[list[Finding], list[RuleRun]]:
    """Run every rule on every subject of its scope; findings come in repair order, consequences after their cause."""
    findings: list[Finding] = []
    runs = []
    rules = _of_container(store, list(rules))
    for entry in rules:
        run = RuleRun(entry)
        runs.append(run)
        if COSTS.index(entry.cost) > COSTS.index(until):
            run.reasons[_("needs {cost}, but only {limit} was asked for", cost=entry.cost, limit=until)] = 1
            continue
        start = time.perf_counter()
        for subject, thing in list(store.subjects(entry.scope).items()):
            try:
                values = tuple(store.values(subject, entry))
                findings.extend(_bounded(run_rule(entry, subject, thing, values)))
                run.judged += 1
            except Unavailable as error:
                reason = error.reason
                run.reasons[reason] = run.reasons.get(reason, 0) + 1
            except (
                MachineError
            ):  # the network or the disk failed: no fault of the rule, and the run must not go on without it
                raise
            except Exception as error:  # a crash of one rule must not hide the findings of the others
                run.crashed = f"{subject}: {type(error).__name__}: {error}"
                if sys.flags.dev_mode:
                    raise
                break
        run.seconds = time.perf_counter() - start
    return in_order(under_causes(findings, rules)), runs


def _bounded(found: Iterator[Finding]) -> Iterator[Finding]:
    """At most MOST_FINDINGS of one rule on one subject, then one that says that there are more."""
    last = None
    for last in islice(found, MOST_FINDINGS):
        yield last
    if last is not None and next(found, None) is not None:
        yield replace(
            last,
            message=_("and more: {n:,} places are listed, the others are not", n=MOST_FINDINGS),
            fix=None,
            evidence={},
        )


# Facts that files of safetensors and JSON give. A GGUF file has none of them: its header is its own configuration.
_NOT_OF_GGUF = frozenset(
    (
        "json_files",
        "tensors",
        "shards",
        "config",
        "tokenizer",
        "tokenizer_config",
        "generation_config",
        "quantization_block",
        "weight_map",
        "missing_shards",
        "stored_weights",
        "merge_proof",
    )
)


def _of_container(store: Store, rules: list[Rule]) -> list[Rule]:
    """The rules that ask what files of this container can answer."""
    gguf = any(thing.gguf for thing in store.subjects("checkpoint").values())
    return [
        rule
        for rule in rules
        if (
            "gguf_models" in rule.facts or not closure(rule.facts) & _NOT_OF_GGUF
            if gguf
            else "gguf_models" not in rule.facts
        )
        and not (gguf and (rule.scope in ("tensor", "shard", "linear") or rule.area in ("Tokenizer", "Config")))
    ]


def in_order(findings: list[Finding]) -> list[Finding]:
    """Consequences last; errors before warnings; then by family in the order of repair, then by code."""
    return sorted(
        findings, key=lambda f: (bool(f.consequence_of), SEVERITIES.index(f.severity), _ORDER.find(f.code[0]), f.code)
    )


def under_causes(findings: list[Finding], rules: Iterable[Rule]) -> list[Finding]:
    """Mark each finding that another finding on the same tensor, file or checkpoint explains. A note explains no
    error: that weights are FP8 is no reason why a layer is missing.
    """
    implied = {r.code: r.implied_by for r in rules if r.implied_by}
    if not implied:
        return findings
    marked = []
    for item in findings:
        causes = implied.get(item.code, ())
        known = (c for c in findings if c.code in causes and (c.severity != "info" or item.severity != "error"))
        cause = next((c for c in known if _touches(c, item)), None)
        marked.append(replace(item, consequence_of=cause.code) if cause else item)
    return marked


def _touches(cause: Finding, effect: Finding) -> bool:
    if cause.subject.startswith("checkpoint:") or effect.subject.startswith("checkpoint:"):
        return True
    return cause.where.file == effect.where.file or (
        cause.where.tensor is not None and cause.where.tensor == effect.where.tensor
    )


def locate(findings: Iterable[Finding], checkpoint: Checkpoint) -> list[Finding]:
    """Fill in line, column and source lines from the text of the files, and the shard of a tensor."""
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
    if spot is None:  # the key is absent: point at the brace of the object that lacks it
        pointer = pointer.rpartition("/")[0]
        spot = file.place(pointer)
        if spot is None:
            return place
        spot = (spot[0], spot[1], 1)
    line, column, length = spot
    frame = file.frame(line)
    return replace(
        place, line=line, column=column, length=min(length, max(len(frame[-1][1]) - column + 1, 1)), frame=frame
    )


_NUMBER = re.compile(r"\.(\d+)(?=\.|$)")


def fold(findings: Iterable[Finding]) -> list[tuple[Finding, list[Finding]]]:
    """Findings that differ only in the decoder layer, as (first, all): one line on the screen, every record in JSON."""
    groups: dict[tuple, list[Finding]] = {}
    for item in findings:
        name = item.where.tensor
        where = (_NUMBER.sub(".N", name),) if name else (item.where.file, item.where.pointer, item.message)
        groups.setdefault((item.code, item.severity, item.consequence_of, item.baseline_state, *where), []).append(item)
    return [(group[0], group) for group in groups.values()]


def folded_name(names: Iterable[str]) -> str:
    """Tensor names that differ in one number, as one: model.layers.{0-3,7}.mlp.down_proj.weight."""
    names = sorted(set(names))
    first = _NUMBER.search(names[0])
    if len(names) == 1 or not first:
        return names[0]
    numbers = [int(m[1]) for m in map(_NUMBER.search, names) if m]
    return names[0][: first.start(1)] + ranges(numbers) + names[0][first.end(1) :]
