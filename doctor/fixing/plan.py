"""From findings to a repaired checkpoint: collects fixes until nothing more is allowed, refuses conflicts, writes,
proves, commits.

The fixes of one pass become edits, the edits a view, the view is judged by all rules, and so on until a pass brings
nothing new. Nothing is written while planning. `carry_out` stages the view, opens the stage from disk, reads every
changed shard again under all rules, and renames it into place only if the stage says what the plan said.

A fix that causes a finding, or leaves the one it was aimed at, stops the whole plan: the idea that every linter that
rewrites code has arrived at (compare eslint and ruff), with a cap on passes that is a bug of ours when it is reached.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from doctor.checkpoint.directory import Checkpoint
from doctor.checkpoint.safetensors import Shard
from doctor.core.errors import BadCheckpoint, DoctorError, PlanRefused
from doctor.core.facts import CHECKPOINT, STAGES, Store, asks
from doctor.core.finding import Finding, Fix
from doctor.core.recipe import Recipe
from doctor.core.version import __version__
from doctor.edits.donor_registry import open_donor
from doctor.edits.json_edits import json_shown
from doctor.edits.kinds import (
    MISSING,
    PHASES,
    RECIPE_EDITS,
    Edit,
    GrowRows,
    Keep,
    PadTensor,
    Rebase,
    RemoveJson,
    RenameFile,
    SetJson,
    SetRecipe,
    TakeFile,
    TakeTensor,
)
from doctor.edits.overlay import EditedCheckpoint
from doctor.fixing.in_place import kept_name
from doctor.fixing.staging import RECEIPT, Stage, open_stage, sha256
from doctor.lint.engine import RuleRun, judge, locate
from doctor.lint.rule import Rule
from doctor.scan.header import header_facts
from doctor.scan.scan import scan

MAX_PASSES = 10
PROOF_PROMPTS = 4  # rows of token ids on which a proof compares logits (evaluate/proof.py)
SCHEMA = "doctor.receipt/1"
Progress = Callable[[str, int], None]


def no_progress(phase: str, n: int) -> None:
    """Progress that nobody watches. phase: "scan", "write" or "verify"; n: bytes since the last call."""


# looking


@dataclass
class Look:
    """One judgement of one state of the files."""

    checkpoint: Checkpoint
    store: Store
    findings: list[Finding]
    runs: list[RuleRun]
    bytes_read: int = 0
    bytes_known: int = (
        0  # of tensors whose values are known, those that an earlier look read and that are as they were included
    )
    skipped: dict[str, str] = field(default_factory=dict)
    suppressed: list[Finding] = field(default_factory=list)


def look(
    checkpoint: Checkpoint,
    recipe: Recipe,
    rules: list[Rule],
    *,
    facts: Iterable[tuple[str, str, object]] = (),
    stage: str = STAGES[-1],
    before: Look | None = None,
    touched: Iterable[str] = (),
    progress: Callable[[int], None] = lambda n: None,
    hush=None,
) -> Look:
    """Judge a checkpoint; with `before`, only tensors that are new, changed shape or are `touched` are read again.

    hush(findings, runs, checkpoint) -> config.Hushed takes out what the user suppressed: it is neither shown nor fixed.
    """
    store = header_facts(checkpoint, recipe)
    for subject, name, value in facts:
        store.put(subject, name, value)
    result = Look(checkpoint, store, [], [])
    if STAGES.index(stage) >= STAGES.index("values") and any(asks("values", r.facts) for r in rules):
        part: Checkpoint | _Part = checkpoint
        if before is not None:
            kept = _carry(checkpoint, store, before, set(touched))
            part = _Part(checkpoint, kept)
            result.skipped = {n: why for n, why in before.skipped.items() if n in kept}
        scanned = scan(part, store, progress)
        result.bytes_read = scanned.bytes_read
        result.bytes_known = scanned.bytes_read + (
            checkpoint.total_bytes - sum(t.nbytes for s in part.shards.values() for t in s.tensors)
        )
        result.skipped |= scanned.skipped
    findings, result.runs = judge(store, rules, stage)
    result.findings = locate(findings, checkpoint)
    if hush is not None:
        hushed = hush(result.findings, result.runs, checkpoint)
        result.findings, result.suppressed = hushed.findings, hushed.suppressed
    return result


class _Part:
    """What the scan asks of a checkpoint, less the tensors whose facts are known."""

    def __init__(self, checkpoint: Checkpoint, known: set[str]):
        self.tensors, self.open_file = checkpoint.tensors, checkpoint.open_file
        self.shards = {
            n: Shard(n, s.size, s.header_bytes, [t for t in s.tensors if t.name not in known])
            for n, s in checkpoint.shards.items()
        }


def _carry(checkpoint: Checkpoint, store: Store, before: Look, touched: set[str]) -> set[str]:
    """Take over what the last look says of tensors that are as they were; returns their names."""
    linears, old_linears = _linears(store), _linears(before.store)
    digested, compared = _named(store, "digested"), _named(store, "compared")
    kept = set()
    for name, info in checkpoint.tensors.items():
        old = before.checkpoint.tensors.get(name)
        if old is None or name in touched or (old.dtype, old.shape) != (info.dtype, info.shape):
            continue
        if before.checkpoint.origin(old.shard) != checkpoint.origin(info.shard):
            continue
        if linears.get(name) != old_linears.get(name) or (
            name in digested and not before.store.has(f"tensor:{name}", "digests")
        ):
            continue
        kept.add(name)
    paired_before = _named(before.store, "compared")
    kept -= {
        name for name in kept if compared.get(name) != paired_before.get(name) or compared.get(name, name) not in kept
    }
    subjects = [f"tensor:{name}" for name in kept] + [f"linear:{linears[name].name}" for name in kept & linears.keys()]
    store.carry(before.store, subjects)
    called = {checkpoint.origin(n): n for n in checkpoint.shards}
    for name in kept & set(digested):  # digests are kept by file, and a file may have another name now
        found = store.get(f"tensor:{name}", "digests")
        store.put(
            f"tensor:{name}",
            "digests",
            {called.get(before.checkpoint.origin(file), file): digest for file, digest in found.items()},
        )
    return kept


def _named(store: Store, fact: str) -> dict | set:
    return store.get(CHECKPOINT, fact) if store.has(CHECKPOINT, fact) else {}


def _linears(store: Store) -> dict:
    return (
        {linear.tensor: linear for linear in store.get(CHECKPOINT, "spec").linears}
        if store.has(CHECKPOINT, "spec")
        else {}
    )


# planning


@dataclass(frozen=True)
class Consent:
    """What the user allows. unsafe: every unsafe fix but those that go by name; codes: unsafe fixes of these rules, by
    name included; only: no fix of any other rule. recipe: edits of the recipe too (a quantizer's run; a directory has
    none).
    """

    unsafe: bool = False
    codes: frozenset[str] = frozenset()
    only: frozenset[str] = frozenset()
    recipe: bool = False

    def allows(self, code: str, fix: Fix) -> bool:
        if self.only and code not in self.only:
            return False
        return fix.safety == "safe" or code in self.codes or (self.unsafe and not fix.by_name)

    def can_carry_out(self, fix: Fix | None) -> bool:
        """Whether there is anything here that edits could do, asked for or not."""
        return (
            fix is not None
            and bool(fix.edits)
            and fix.safety != "manual"
            and (self.recipe or not any(isinstance(e, RECIPE_EDITS) for e in fix.edits))
        )


@dataclass
class Step:
    """One line of the plan: the fixes of one rule with one title. `waits` says why it is not carried out now.

    diffs: JSON file -> lines of a diff without context. tensors: (names with blocks folded, dtype, old shape or None,
    new shape or None).
    """

    code: str
    name: str
    safety: str
    title: str
    edits: list[Edit] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    number: int = 0
    waits: str = ""
    needs: tuple[str, ...] = ()
    after: int | None = None  # number of the earlier step that changes the same file
    diffs: dict[str, list[str]] = field(default_factory=dict)
    tensors: list[tuple[str, str, tuple[int, ...] | None, tuple[int, ...] | None]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _targets: set[str] = field(default_factory=set, repr=False)

    def add(self, item: Finding) -> None:
        """One more finding that this step cures; an edit it shares with another is there once."""
        self.findings.append(item)
        for edit in item.fix.edits:
            if edit.target not in self._targets:
                self._targets.add(edit.target)
                self.edits.append(edit)

    @property
    def pads(self) -> bool:
        """Whether it claims that outputs stay as they are while shapes change."""
        return any(isinstance(e, (PadTensor, GrowRows)) for e in self.edits)


@dataclass(frozen=True)
class Proof:
    """Logits before and after the edits of a plan. status: "equal" (to the bit), "agrees", "differs" or "not run"."""

    status: str
    detail: str
    max_difference: float | None = None
    largest_logit: float | None = None
    prompts: int = 0
    blocks: int | None = None  # decoder blocks compared, where not all were


@dataclass
class Plan:
    """What would be done. `steps` are carried out; `waiting` and `optional` are not; `for_you` are (finding, number of
    blocks).
    """

    source: Checkpoint
    view: EditedCheckpoint
    recipe: Recipe
    before: Look
    after: Look
    consent: Consent
    steps: list[Step] = field(default_factory=list)
    waiting: list[Step] = field(default_factory=list)  # allowed, but blocked
    optional: list[Step] = field(default_factory=list)  # unsafe and not asked for
    for_you: list[Finding] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # why the plan must not be carried out
    hush: Callable | None = None
    reference: Look | None = None  # what findings are new against, where not against `before`

    @property
    def files_written(self) -> list[str]:
        return sorted(n for n in self.view.changed if n in self.view.entries)

    @property
    def files_linked(self) -> list[str]:
        return sorted(n for n in self.view.entries if n not in self.view.changed and n != RECEIPT)

    @property
    def bytes_to_write(self) -> int:
        return sum(self.view.entries[n].size for n in self.files_written)

    @property
    def bytes_linked(self) -> int:
        return sum(self.view.entries[n].size for n in self.files_linked)

    @property
    def needs_proof(self) -> bool:
        return any(step.pads for step in self.steps)

    def unpadded(self) -> EditedCheckpoint:
        """The view without the steps that change shapes: what a proof compares with, since other steps may change
        outputs.
        """
        return EditedCheckpoint(self.source, compose((s.code, e) for s in self.steps if not s.pads for e in s.edits))


def compose(owned: Iterable[tuple[str, Edit]]) -> list[Edit]:
    """(rule code, edit) pairs as one list in the order of phases; the same edit twice is once, in any order of the
    input.

    Raises PlanRefused where two different edits have one target, naming both rules and both values.
    """
    taken = Taken()
    for code, edit in owned:
        rival = taken.rival(edit)
        if rival is not None:
            raise PlanRefused(_clash(code, edit, *rival), f"Choose one: --only {code} or --only {rival[0]}.")
        taken.add(code, edit)
    return taken.edits()


class Taken:
    """Edits by what they touch. A MoE model has tens of thousands, so rivals are looked up, not searched for."""

    def __init__(self, other: "Taken | None" = None):
        self.by_target: dict[str, tuple[str, Edit]] = dict(other.by_target) if other else {}
        self.values: list[tuple[str, Edit]] = (
            list(other.values) if other else []
        )  # those that may lie around or inside another

    def add(self, code: str, edit: Edit) -> None:
        if edit.target not in self.by_target:
            self.by_target[edit.target] = (code, edit)
            if isinstance(edit, (SetJson, RemoveJson)):
                self.values.append((code, edit))

    def rival(self, edit: Edit) -> tuple[str, Edit] | None:
        """(code, edit) with this edit's target, or with a value around or inside it, that is not the same edit."""
        same = self.by_target.get(edit.target)
        if same is not None:
            return None if same[1] == edit else same
        return next((v for v in self.values if _nested(edit, v[1])), None)

    def edits(self) -> list[Edit]:
        return sorted((edit for _, edit in self.by_target.values()), key=lambda e: (PHASES.index(e.phase), e.target))


def _nested(one: Edit, other: Edit) -> bool:
    if (
        not isinstance(one, (SetJson, RemoveJson))
        or not isinstance(other, (SetJson, RemoveJson))
        or one.file != other.file
    ):
        return False
    return (one.pointer + "/").startswith(other.pointer + "/") or (other.pointer + "/").startswith(one.pointer + "/")


def _clash(code: str, edit: Edit, other_code: str, other: Edit) -> str:
    return f"{edit.target}: {code} wants {_wish(edit)}, {other_code} wants {_wish(other)}; one target takes one edit."


def _wish(edit: Edit) -> str:
    if isinstance(edit, (SetJson, SetRecipe)):
        return json_shown(edit.value)
    if isinstance(edit, RemoveJson):
        return "it removed"
    if isinstance(edit, PadTensor):
        parts = f" in {edit.blocks} parts" if edit.blocks > 1 else ""
        return f"{edit.size}{parts}{'' if edit.spread else ', zeros at the end'}"
    return f"{type(edit).__name__}({', '.join(str(getattr(edit, f.name)) for f in fields(edit) if f.name != 'tensor')})"


class _Choice:
    """The fixes accepted so far, and why others are not."""

    def __init__(self, source: Checkpoint, consent: Consent):
        self.source, self.consent = source, consent
        self.steps: dict[tuple[str, str], Step] = {}
        self.taken = Taken()
        self.rejected: dict[tuple[str, str, str], str] = {}  # (code, title, subject) -> why edits do not fit the files

    def accept(self, findings: list[Finding]) -> list[Edit]:
        """Take every fix of these findings that may go now; returns the edits that are new."""
        found = [f for f in findings if self.consent.can_carry_out(f.fix) and self.consent.allows(f.code, f.fix)]
        taken, chosen = self._collect(found, findings, one_by_one=False)
        try:
            EditedCheckpoint(self.source, taken.edits())
        except PlanRefused:  # some edit does not fit the files: find out which, and go on with the others
            taken, chosen = self._collect(found, findings, one_by_one=True)
        fresh = [e for t, (_, e) in taken.by_target.items() if t not in self.taken.by_target]
        self.taken = taken
        if fresh:
            for item in chosen:
                self.steps.setdefault((item.code, item.fix.title), _step(item)).add(item)
        return fresh

    def _collect(self, found: list[Finding], findings: list[Finding], one_by_one: bool) -> tuple[Taken, list[Finding]]:
        taken, chosen = Taken(self.taken), []
        for item in found:
            if self.blocked(item, findings, taken):
                continue
            try:
                compose((item.code, e) for e in item.fix.edits)
            except PlanRefused as error:
                self.rejected[item.code, item.fix.title, item.subject] = error.message.rstrip(".")
                continue
            trial = Taken(taken) if one_by_one else taken
            for edit in item.fix.edits:
                trial.add(item.code, edit)
            if one_by_one:
                try:
                    EditedCheckpoint(self.source, trial.edits())
                except PlanRefused as error:
                    self.rejected[item.code, item.fix.title, item.subject] = error.message.rstrip(".")
                    continue
            taken = trial
            chosen.append(item)
        return taken, chosen

    def blocked(self, item: Finding, findings: list[Finding], taken: Taken | None = None) -> str:
        """Why a fix cannot go now; "" where it can."""
        if item.consequence_of:
            return f"follows from {item.consequence_of}"
        waits = unmet(item.fix, findings)
        if waits:
            return "waits for " + ", ".join(waits)
        for edit in item.fix.edits:
            rival = (taken or self.taken).rival(edit)
            if rival is not None:
                return "conflict: " + _clash(item.code, edit, *rival).rstrip(".")
        return self.rejected.get((item.code, item.fix.title, item.subject), "")


def unmet(fix: Fix, findings: Iterable[Finding]) -> list[str]:
    """Codes the fix needs gone that still have a finding on a tensor it edits, or on no tensor in particular."""
    tensors = {e.tensor for e in fix.edits if hasattr(e, "tensor")}
    return sorted(
        {
            f.code
            for f in findings
            if f.code in fix.needs and (not tensors or f.where.tensor is None or f.where.tensor in tensors)
        }
    )


def _step(item: Finding) -> Step:
    return Step(item.code, item.name, item.fix.safety, item.fix.title, needs=item.fix.needs)


def make_plan(
    source: Checkpoint,
    recipe: Recipe,
    rules: list[Rule],
    consent: Consent = Consent(),
    *,
    facts: Iterable[tuple[str, str, object]] = (),
    stage: str = STAGES[-1],
    progress: Progress = no_progress,
    hush: Callable | None = None,
) -> Plan:
    """Judge, collect, judge through the edits, until nothing new is allowed. Reads every tensor once and edited ones
    again.

    Raises BadCheckpoint where there is nothing to look at and DoctorError where fixes never come to rest (a bug of
    ours).
    """
    facts = [*facts, (CHECKPOINT, "asked", consent.codes)]
    first = current = reference = look(
        source, recipe, rules, facts=facts, stage=stage, progress=lambda n: progress("scan", n), hush=hush
    )
    choice = _Choice(source, consent)
    view = EditedCheckpoint(source)
    for _ in range(MAX_PASSES):
        fresh = choice.accept(current.findings)
        if not fresh:
            break
        recipe = with_fields(recipe, fresh)
        view = EditedCheckpoint(source, choice.taken.edits())
        if any(isinstance(e, Rebase) for e in fresh):  # what the base itself shows was not caused here
            reference = current = look(
                view.source, recipe, rules, facts=facts, stage=stage, progress=lambda n: progress("scan", n), hush=hush
            )
        current = look(
            view,
            recipe,
            rules,
            facts=facts,
            stage=stage,
            before=None if _regroups(fresh) else current,
            touched=_touched(fresh, view),
            progress=lambda n: progress("scan", n),
            hush=hush,
        )
    else:
        raise DoctorError(
            f"{source.name}: after {MAX_PASSES} passes fixes still bring new fixes ({', '.join(sorted({s.code for s in choice.steps.values()}))}). "
            "This is a bug of doctor.",
            "Nothing was written; fix one rule at a time with --only.",
        )
    plan = Plan(
        source, view, recipe, first, current, consent, list(choice.steps.values()), hush=hush, reference=reference
    )
    _describe_rest(plan, choice)
    _describe_steps(plan)
    plan.problems = _problems(plan)
    return plan


def _touched(edits: list[Edit], view: EditedCheckpoint) -> set[str]:
    """Tensors whose bytes these edits change."""
    files = {view.new_name(e.file) for e in edits if isinstance(e, TakeFile)} & view.shards.keys()
    return {e.tensor for e in edits if hasattr(e, "tensor")} | {t.name for n in files for t in view.shards[n].tensors}


def with_fields(recipe: Recipe, edits: Iterable[Edit]) -> Recipe:
    """The recipe after the edits that are about it."""
    for edit in edits:
        if isinstance(edit, SetRecipe):
            recipe = recipe.with_field(edit.field, edit.value)
        elif isinstance(edit, Keep) and edit.pattern not in recipe.keep:
            recipe = recipe.with_field("keep", (*recipe.keep, edit.pattern))
    return recipe


def _regroups(edits: list[Edit]) -> bool:
    """Facts counted by group are void once the group size changes."""
    return any(isinstance(e, SetRecipe) and e.field == "group_size" for e in edits)


def _describe_rest(plan: Plan, choice: _Choice) -> None:
    """Sort the findings that remain into waiting, optional and the user's own."""
    waiting: dict[tuple, Step] = {}
    optional: dict[tuple, Step] = {}
    for item in plan.after.findings:
        fix = item.fix
        if not plan.consent.can_carry_out(fix):
            plan.for_you.append(item)
            continue
        if plan.consent.allows(item.code, fix):
            group, reason = waiting, choice.blocked(item, plan.after.findings)
        else:
            group, reason = (
                optional,
                "" if not plan.consent.only or item.code in plan.consent.only else "not among --only",
            )
        step = group.setdefault((item.code, fix.title, reason), _step(item))
        step.waits = reason
        step.add(item)
    plan.waiting, plan.optional = list(waiting.values()), list(optional.values())


def _describe_steps(plan: Plan) -> None:
    """Number the steps and show what each changes, in the order in which they are carried out."""
    before, edits = EditedCheckpoint(plan.source), []
    files: dict[str, int] = {}
    for number, step in enumerate([*plan.steps, *plan.waiting], 1):
        step.number = number
        try:
            after = EditedCheckpoint(plan.source, compose((step.code, e) for e in [*edits, *step.edits]))
        except PlanRefused:
            continue  # a waiting step whose edits do not fit: its reason says so
        _describe_step(step, before, after)
        for name in step.diffs:
            step.after = step.after or files.get(name)
            files.setdefault(name, number)
        if not step.waits:
            before, edits = after, [*edits, *step.edits]


def _describe_step(step: Step, before: EditedCheckpoint, after: EditedCheckpoint) -> None:
    for name in sorted(after.json):
        old, new = before.json.get(name), after.json[name]
        if old is None or old.raw != new.raw:
            if any(isinstance(e, Rebase) or (isinstance(e, TakeFile) and e.file == name) for e in step.edits):
                continue  # another checkpoint's files, not changed ones
            step.diffs[name] = diff_lines(
                "" if old is None else old.raw.decode("utf-8", "replace"), new.raw.decode("utf-8", "replace")
            )
    for name in sorted(after.texts):
        old, new = before.read_file(name), after.texts[name]
        if old != new:
            step.diffs[name] = diff_lines(old.decode("utf-8", "replace"), new.decode("utf-8", "replace"))
    touched = sorted({e.tensor for e in step.edits if hasattr(e, "tensor")})
    step.notes += [
        f"{e.file}: {after.entries[after.new_name(e.file)].size:,} bytes, sha256 {e.sha256}"
        for e in step.edits
        if isinstance(e, TakeFile) and after.new_name(e.file) in after.entries
    ]
    step.notes += [f"{e.file} → {e.to}" for e in step.edits if isinstance(e, RenameFile)]
    changes: dict[tuple, list[str]] = {}
    for name in touched:
        old, new = before.tensors.get(name), after.tensors.get(name)
        if old is not None or new is not None:
            kinds = dict.fromkeys(t.dtype.name for t in (old, new) if t is not None)
            changes.setdefault((" → ".join(kinds), old.shape if old else None, new.shape if new else None), []).append(
                name
            )
    for (dtype, old_shape, new_shape), names in changes.items():
        step.tensors += [(folded, dtype, old_shape, new_shape) for folded in fold_names(names)]
    step.tensors.sort(key=lambda t: t[0])
    pads = {
        (before.tensors[e.tensor].shape[e.axis], e.size, e.spread)
        for e in step.edits
        if isinstance(e, PadTensor) and e.tensor in before.tensors
    }
    for old_size, size, spread in sorted(pads):
        where = "spread evenly, so no group of neighbours is all zero" if spread else "at the end of each part"
        step.notes.append(f"{size - old_size:,} zero channels, {old_size:,} → {size:,}, {where}")
    grown = {
        (before.tensors[e.tensor].shape[0], e.size)
        for e in step.edits
        if isinstance(e, GrowRows) and e.tensor in before.tensors
    }
    step.notes += [
        f"{size - old:,} rows more, {old:,} → {size:,}, each the mean of the others" for old, size in sorted(grown)
    ]


def diff_lines(old: str, new: str, most: int = 40) -> list[str]:
    """A diff without context, as `@@ -5,1 +5,1 @@` and `-`/`+` lines; long lines and long diffs are cut, and say so."""
    import difflib

    a, b = old.splitlines(), new.splitlines()
    head = 0
    while head < min(len(a), len(b)) and a[head] == b[head]:
        head += 1
    tail = 0
    while tail < min(len(a), len(b)) - head and a[-1 - tail] == b[-1 - tail]:
        tail += 1
    a, b = a[head : len(a) - tail], b[head : len(b) - tail]
    # Worked out for what differs alone: a tokenizer.json has hundreds of thousands of lines.
    codes = (
        difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes()
        if max(len(a), len(b)) <= 2000
        else [("replace", 0, len(a), 0, len(b))]
    )
    lines = []
    for tag, a0, a1, b0, b1 in codes:
        if tag == "equal":
            continue
        lines.append(f"@@ -{head + a0 + 1},{a1 - a0} +{head + b0 + 1},{b1 - b0} @@")
        lines += ["-" + _clipped(line, b[b0:b1][i : i + 1]) for i, line in enumerate(a[a0:a1])]
        lines += ["+" + _clipped(line, a[a0:a1][i : i + 1]) for i, line in enumerate(b[b0:b1])]
    if len(lines) > most:
        lines = [*lines[: most - 1], f"and {len(lines) - most + 1:,} more lines"]
    return lines


def _clipped(line: str, other: list[str], width: int = 160) -> str:
    """A long line, cut to the place where it first differs from its counterpart."""
    if len(line) <= width:
        return line
    first = next((i for i, (x, y) in enumerate(zip(line, other[0])) if x != y), 0) if other else 0
    begin = max(min(first - width // 4, len(line) - width), 0)
    return ("…" if begin else "") + line[begin : begin + width] + ("…" if begin + width < len(line) else "")


def fold_names(names: Iterable[str]) -> list[str]:
    """Tensor names alike but for numbers, as few lines as say exactly the same:
    layers.{0-1}.mlp.experts.{0-3}.up_proj.weight.
    """
    import itertools
    import re

    from doctor.lint.rule import ranges

    number = re.compile(r"(?<=\.)\d+(?=\.|$)")
    groups: dict[str, list[tuple[int, ...]]] = {}
    for name in names:
        groups.setdefault(number.sub("\0", name), []).append(tuple(map(int, number.findall(name))))
    lines = []
    for pattern, found in groups.items():
        columns = [sorted(set(c)) for c in zip(*found)]
        whole = set(itertools.product(*columns)) == set(found)
        rows = [columns] if whole else [[[i] for i in row] for row in sorted(set(found))]
        for row in rows:
            parts = pattern.split("\0")
            lines.append(parts[0] + "".join(ranges(n) + text for n, text in zip(row, parts[1:])))
    return sorted(lines)


def _key(item: Finding, checkpoint: Checkpoint) -> tuple:
    """What makes two findings the same one; a file goes by its name on disk."""
    subject = (
        f"shard:{checkpoint.origin(name)}"
        if (name := item.subject.removeprefix("shard:")) != item.subject
        else item.subject
    )
    return item.code, subject, checkpoint.origin(item.where.file), item.where.tensor, item.where.pointer


def _problems(plan: Plan) -> list[str]:
    """Findings that fixes caused, and findings that fixes were aimed at and that are still there."""
    if not plan.steps:
        return []
    view = plan.view
    remaining, allowed = (Counter(_key(f, view) for f in seen.findings) for seen in (plan.after, plan.before))
    cured = {_key(f, view): f for step in plan.steps for f in step.findings}
    allowed.subtract(_key(f, view) for step in plan.steps for f in step.findings)
    found = [
        f"{f.code} is still there after its fix: {f.message}"
        for key, f in cured.items()
        if remaining[key] > max(allowed[key], 0)
    ]
    found += [
        f"{code} crashed on what the fixes give, so it cannot tell whether all is well"
        for code in _crashed(plan.after) - _crashed(plan.before)
    ]
    return found + [
        f"{f.code} appears because of the fixes: {f.message}" for f in caused(plan.reference or plan.before, plan.after)
    ]


def _crashed(seen: Look) -> set[str]:
    return {run.rule.code for run in seen.runs if run.crashed}


def caused(before: Look, after: Look) -> list[Finding]:
    """Findings that are new after edits. One that no rule could have seen before (unreadable then) is not new."""
    blind = {r.rule.code for r in before.runs if not r.judged}
    known = Counter(_key(f, before.checkpoint) for f in before.findings)
    new = []
    for item in after.findings:
        key = _key(item, after.checkpoint)
        known[key] -= 1
        seen_before = key[1] in before.store.subjects(item.subject.partition(":")[0])
        if known[key] < 0 and item.code not in blind and seen_before:
            new.append(item)
    return new


# carrying out


@dataclass
class Outcome:
    """What carry_out left on disk."""

    output: Path
    receipt: Path
    look: Look
    notes: list[str]


def carry_out(
    plan: Plan,
    output: Path,
    rules: list[Rule],
    *,
    copy: bool = False,
    overwrite: bool = False,
    in_place: bool = False,
    proofs: Iterable[Proof] = (),
    facts: Iterable[tuple[str, str, object]] = (),
    stage: str = STAGES[-1],
    progress: Progress = no_progress,
) -> Outcome:
    """Write the plan's view to `output`, judge it again from disk, commit. Raises PlanRefused, MachineError,
    BadCheckpoint.
    """
    proofs = list(proofs)
    refuse(plan, proofs)
    with open_stage(
        plan.view, output, copy=copy, overwrite=overwrite, in_place=in_place, progress=lambda n: progress("write", n)
    ) as staged:
        staged.write()
        again, digests = _verify(plan, staged, rules, list(facts), stage, progress)
        receipt = _receipt(plan, staged, digests, again, proofs)
        staged.add(RECEIPT, (json.dumps(receipt, indent=2, ensure_ascii=False) + "\n").encode())
        staged.commit()
    return Outcome(staged.output, staged.output / RECEIPT, again, staged.notes)


def refuse(plan: Plan, proofs: Iterable[Proof] = ()) -> None:
    """Raises PlanRefused where a plan must not be carried out."""
    differs = [p.detail for p in proofs if p.status == "differs"]
    problems = [*plan.problems, *(f"the logits differ: {d}" for d in differs)]
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise PlanRefused(
            f"{plan.source.name}: {'; '.join(problems[:5])}{more}.",
            "Nothing was written; choose fixes one by one with --only.",
        )


def _verify(
    plan: Plan, staged: Stage, rules: list[Rule], facts: list, stage: str, progress: Progress
) -> tuple[Look, dict]:
    """Open the stage from disk, read every changed shard, and demand what the plan saw; also the digests for the
    receipt.
    """
    only = plan.source.only
    disk = Checkpoint.open(staged.path / only if only else staged.path)
    changed = [n for n in plan.files_written if n in disk.entries]
    touched = {t.name for n in changed if n in disk.shards for t in disk.shards[n].tensors}
    with ThreadPoolExecutor(2) as pool:  # hashing leaves Python's lock, so it runs beside the scan
        after = {n: pool.submit(sha256, staged.path / n) for n in changed}
        origin = _origin(plan)
        before = {
            n: pool.submit(_sha256_if_readable, origin.path(old))
            for n in changed
            if (old := plan.view.origin(n)) in origin.entries
        }
        again = look(
            disk,
            plan.recipe,
            rules,
            facts=facts,
            stage=stage,
            before=plan.after,
            touched=touched,
            progress=lambda n: progress("verify", n),
            hush=plan.hush,
        )
        digests = {n: (before[n].result() if n in before else None, after[n].result()) for n in changed}
    for edit in plan.view.edits:
        name = plan.view.new_name(edit.file) if isinstance(edit, TakeFile) else None
        if name in plan.view.substituted and digests[name][1] != edit.sha256:
            raise BadCheckpoint(
                f"{edit.file}: came with sha256 {digests[name][1]}; the plan was made for {edit.sha256}.",
                "Nothing was kept; run the command again.",
            )
    expected = Counter(_key(f, disk) for f in plan.after.findings)
    unexpected = [f for f in again.findings if not expected[_key(f, disk)]]
    if unexpected:
        raise PlanRefused(
            f"{staged.output}: the stage shows {unexpected[0].code}, which the plan did not: {unexpected[0].message}.",
            "Nothing was kept. This is a bug of doctor, or something wrote to the files meanwhile.",
        )
    for name in sorted(touched):
        subject = f"tensor:{name}"
        if again.store.has(subject, "stats") and again.store.get(subject, "stats") != plan.after.store.get(
            subject, "stats"
        ):
            raise BadCheckpoint(
                f"{name}: its values on the stage are not those that were planned.",
                "Nothing was kept; run the command again.",
            )
    return again, digests


def _sha256_if_readable(path: Path) -> str | None:
    """None for a file that cannot be read, which is then what was cured."""
    try:
        return sha256(path)
    except OSError:
        return None


def _origin(plan: Plan) -> Checkpoint:
    """Whose files the view changes: the source, or what an adapter is merged into."""
    other = next((e for e in plan.view.edits if isinstance(e, Rebase)), None)
    return plan.source if other is None else open_donor(other.root)


def _taken_from(plan: Plan, base) -> dict:
    """The base as the receipt holds it: its name, never a path, and the sha256 of each file that something was taken
    from.
    """
    edits = plan.view.edits
    files = {e.file for e in edits if isinstance(e, TakeFile)}
    files |= {
        base.checkpoint.tensors[e.tensor].shard for e in edits if isinstance(e, TakeTensor) and e.root == base.root
    }
    if any(isinstance(e, Rebase) for e in edits):
        files |= {old for n in plan.view.changed if (old := plan.view.origin(n)) in base.checkpoint.entries}
    return {"name": base.name, "files": {n: base.checkpoint.sha256(n) for n in sorted(files)}}


def _receipt(plan: Plan, staged: Stage, digests: dict, again: Look, proofs: list[Proof]) -> dict:
    """The receipt: what was done to which file, and what was found before and after. The same input gives the same
    text.
    """
    base = plan.before.store.get(CHECKPOINT, "base") if plan.before.store.has(CHECKPOINT, "base") else None
    names = {str(plan.source.root): plan.source.name, **({base.root: base.name} if base is not None else {})}
    receipt = {
        "schema": SCHEMA,
        "doctor": __version__,
        "source": plan.source.name,
        "recipe": plan.recipe.label(),
        "steps": [
            {
                "code": s.code,
                "name": s.name,
                "safety": s.safety,
                "title": s.title.replace(base.text, base.name) if base is not None else s.title,
                "edits": [
                    _edit_data(e, names) for e in sorted(s.edits, key=lambda e: (PHASES.index(e.phase), e.target))
                ],
            }
            for s in plan.steps
        ],
        "written": [
            {"file": n, "bytes": plan.view.entries[n].size, "sha256_before": old, "sha256_after": new}
            for n, (old, new) in sorted(digests.items())
        ],
        "unchanged": [
            {"file": f.name, "bytes": f.size, "how": f.how}
            for f in sorted(staged.files, key=lambda f: f.name)
            if f.how != "written"
        ],
        "not_carried": dict(sorted(staged.not_carried.items())),
        "bytes_written": sum(f.size for f in staged.files if f.how in ("written", "copied")),
        "findings_before": [_finding_data(f) for f in plan.before.findings],
        "findings_after": [_finding_data(f) for f in again.findings],
        "proofs": [asdict(p) for p in proofs],
    }
    if base is not None and any(hasattr(e, "root") for e in plan.view.edits):
        receipt["base"] = _taken_from(plan, base)
    if staged.in_place:
        receipt["kept"] = kept_name(staged.output).name
    earlier = plan.source.value(RECEIPT)
    if earlier is not None and earlier.get("schema") == SCHEMA:
        receipt["previous"] = earlier
    return receipt


def _edit_data(edit: Edit, names: dict[str, str]) -> dict:
    """An edit as data; other checkpoints by their names, because a path says nothing on another machine."""
    values = {f.name: getattr(edit, f.name) for f in fields(edit)}
    if "root" in values:
        values["root"] = names[values["root"]]
    return {"kind": type(edit).__name__, **{k: v for k, v in values.items() if v is not MISSING}}


def _finding_data(item: Finding) -> dict:
    return {"code": item.code, "severity": item.severity, "where": item.target, "message": item.message}
