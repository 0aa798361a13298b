"""From findings to a fix plan: collects fixes until none is left that is allowed, and refuses conflicts.

The fixes of one pass become edits, the edits an overlay, and all rules run on the overlay, until a pass brings nothing
new. Nothing is written here; `apply` carries a plan out.

A fix that causes a finding, or leaves the one that it targets, stops the whole plan: the idea that every linter that
rewrites code has arrived at (compare eslint and ruff), with a limit of passes that only a bug of doctor reaches.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import DoctorError, PlanRefused
from doctor.core.facts import CHECKPOINT, COSTS
from doctor.core.finding import Finding
from doctor.core.messages import Message, _, plural
from doctor.core.recipe import Recipe
from doctor.edits.kinds import Edit, FileEdit, Keep, Rebase, SetRecipe, TakeFile, TensorEdit
from doctor.edits.overlay import EditedCheckpoint
from doctor.fixing.assess import Assessment, Progress, Suppress, assess, no_progress
from doctor.fixing.consent import Consent
from doctor.fixing.describe import describe_steps
from doctor.fixing.edit_set import compose
from doctor.fixing.proof import Proof
from doctor.fixing.receipt import RECEIPT
from doctor.fixing.selection import Selection
from doctor.fixing.step import Step, fix_of
from doctor.lint.rule import Rule

MAX_PASSES = 10
MOST_PROBLEMS = 5  # of a refused plan that its message quotes


@dataclass
class Plan:
    """What a fix would do. `steps` are carried out; `waiting` and `optional` are not; `for_you` have no fix that
    edits can do.
    """

    source: Checkpoint
    overlay: EditedCheckpoint
    recipe: Recipe
    before: Assessment
    after: Assessment
    consent: Consent
    steps: list[Step] = field(default_factory=list)
    waiting: list[Step] = field(default_factory=list)  # allowed, but blocked
    optional: list[Step] = field(default_factory=list)  # unsafe and not asked for
    for_you: list[Finding] = field(default_factory=list)
    problems: list[Message] = field(default_factory=list)  # why the plan must not be carried out
    suppress: Suppress | None = None
    reference: Assessment | None = None  # the assessment that new findings are counted against, if not `before`

    @property
    def files_written(self) -> list[str]:
        return sorted(n for n in self.overlay.changed if n in self.overlay.entries)

    @property
    def files_linked(self) -> list[str]:
        return sorted(n for n in self.overlay.entries if n not in self.overlay.changed and n != RECEIPT)

    @property
    def bytes_to_write(self) -> int:
        return sum(self.overlay.entries[n].size for n in self.files_written)

    @property
    def bytes_linked(self) -> int:
        return sum(self.overlay.entries[n].size for n in self.files_linked)

    @property
    def needs_proof(self) -> bool:
        return any(step.pads for step in self.steps)

    @property
    def changes_model(self) -> bool:
        """Whether a reader may build or fill another model than before: other tensors, names, index or config.json."""
        return any(not isinstance(e, FileEdit) or e.file == "config.json" for e in self.overlay.edits)

    def unpadded(self) -> EditedCheckpoint:
        """The overlay without the steps that change shapes: a proof compares with it, since other steps may change
        outputs.
        """
        return EditedCheckpoint(self.source, compose((s.code, e) for s in self.steps if not s.pads for e in s.edits))


def make_plan(
    source: Checkpoint,
    recipe: Recipe,
    rules: list[Rule],
    consent: Consent | None = None,
    *,
    facts: Iterable[tuple[str, str, object]] = (),
    stage: str = COSTS[-1],
    progress: Progress = no_progress,
    suppress: Suppress | None = None,
) -> Plan:
    """Assess, select fixes, assess through the edits, until nothing new is allowed.

    Reads every tensor once and edited ones again. Raises BadCheckpoint where there is nothing to read, and DoctorError
    where fixes keep bringing new fixes (a bug in doctor).
    """
    consent = consent or Consent()
    facts = [*facts, (CHECKPOINT, "asked", consent.codes)]

    def run(checkpoint: Checkpoint, before: Assessment | None = None, touched: Iterable[str] = ()) -> Assessment:
        return assess(
            checkpoint,
            recipe,
            rules,
            facts=facts,
            stage=stage,
            before=before,
            touched=touched,
            progress=lambda n: progress("scan", n),
            suppress=suppress,
        )

    first = current = reference = run(source)
    selection = Selection(source, consent)
    overlay = EditedCheckpoint(source)
    for _pass in range(MAX_PASSES):
        new = selection.accept(current.findings)
        if not new:
            break
        recipe = with_fields(recipe, new)
        overlay = EditedCheckpoint(source, selection.accepted.edits())
        if any(isinstance(e, Rebase) for e in new):  # findings of the base model were not caused here
            reference = current = run(overlay.source)
        current = run(overlay, None if _regroups(new) else current, _touched(new, overlay))
    else:
        raise DoctorError(
            _(
                "{source}: after {passes} passes fixes still bring new fixes ({codes}). "
                "This is an internal error (a bug in doctor).",
                source=source.name,
                passes=MAX_PASSES,
                codes=", ".join(sorted({s.code for s in selection.steps.values()})),
            ),
            _("Nothing was written; fix one rule at a time with --only."),
        )
    steps = list(selection.steps.values())
    plan = Plan(source, overlay, recipe, first, current, consent, steps, suppress=suppress, reference=reference)
    _sort_remaining(plan, selection)
    describe_steps(source, [*plan.steps, *plan.waiting])
    plan.problems = _problems(plan)
    return plan


def refuse(plan: Plan, proofs: Iterable[Proof] = ()) -> None:
    """Raises PlanRefused where a plan must not be carried out."""
    problems = [*plan.problems]
    problems += [_("the logits differ: {detail}", detail=p.detail) for p in proofs if p.status == "differs"]
    if not problems:
        return
    text = problems[0]
    for problem in problems[1:MOST_PROBLEMS]:
        text = _("{problem}; {next}", problem=text, next=problem)
    more = len(problems) - MOST_PROBLEMS
    if more > 0:
        text = plural("{problems}; and {n} more problem", "{problems}; and {n} more problems", more, problems=text)
    raise PlanRefused(
        _("{source}: {problems}.", source=plan.source.name, problems=text),
        _("Nothing was written; choose fixes one by one with --only."),
    )


def with_fields(recipe: Recipe, edits: Iterable[Edit]) -> Recipe:
    """The recipe after the edits that are about it."""
    for edit in edits:
        if isinstance(edit, SetRecipe):
            recipe = recipe.with_field(edit.field, edit.value)
        elif isinstance(edit, Keep) and edit.pattern not in recipe.keep:
            recipe = recipe.with_field("keep", (*recipe.keep, edit.pattern))
    return recipe


def finding_key(item: Finding, checkpoint: Checkpoint) -> tuple[str | None, ...]:
    """What makes two findings the same one; a file goes by its name in the source."""
    name = item.subject.removeprefix("shard:")
    subject = f"shard:{checkpoint.origin(name)}" if name != item.subject else item.subject
    return item.code, subject, checkpoint.origin(item.where.file), item.where.tensor, item.where.pointer


def caused(before: Assessment, after: Assessment) -> list[Finding]:
    """Findings that are new after edits. One that no rule could see before (unreadable then) is not new."""
    not_judged = {r.rule.code for r in before.runs if not r.judged}
    known = Counter(finding_key(f, before.checkpoint) for f in before.findings)
    new = []
    for item in after.findings:
        key = finding_key(item, after.checkpoint)
        known[key] -= 1
        seen_before = key[1] in before.store.subjects(item.subject.partition(":")[0])
        if known[key] < 0 and item.code not in not_judged and seen_before:
            new.append(item)
    return new


def _touched(edits: list[Edit], overlay: EditedCheckpoint) -> set[str]:
    """Tensors whose bytes these edits change."""
    files = {overlay.new_name(e.file) for e in edits if isinstance(e, TakeFile)} & overlay.shards.keys()
    tensors = {e.tensor for e in edits if isinstance(e, TensorEdit)}
    return tensors | {t.name for n in files for t in overlay.shards[n].tensors}


def _regroups(edits: list[Edit]) -> bool:
    """Facts counted by group are void once the group size changes."""
    return any(isinstance(e, SetRecipe) and e.field == "group_size" for e in edits)


def _sort_remaining(plan: Plan, selection: Selection) -> None:
    """Sort the findings that remain into waiting, optional and the user's own."""
    waiting: dict[tuple[str, str, str], Step] = {}
    optional: dict[tuple[str, str, str], Step] = {}
    for item in plan.after.findings:
        if not plan.consent.can_carry_out(item.fix):
            plan.for_you.append(item)
            continue
        fix = fix_of(item)
        if plan.consent.allows(item.code, fix):
            group, reason = waiting, selection.blocked(item, plan.after.findings)
        else:
            group, reason = optional, ""
            if plan.consent.only and item.code not in plan.consent.only:
                reason = _("not among --only")
        step = group.setdefault((item.code, fix.title, reason), Step.of(item))
        step.waits = reason
        step.add(item)
    plan.waiting, plan.optional = list(waiting.values()), list(optional.values())


def _problems(plan: Plan) -> list[Message]:
    """Findings that fixes caused, and findings that fixes were meant for and that are still there."""
    if not plan.steps:
        return []
    overlay = plan.overlay
    remaining, allowed = (Counter(finding_key(f, overlay) for f in a.findings) for a in (plan.after, plan.before))
    fixed = {finding_key(f, overlay): f for step in plan.steps for f in step.findings}
    allowed.subtract(finding_key(f, overlay) for step in plan.steps for f in step.findings)
    found = [
        _("{code} is still there after its fix: {message}", code=f.code, message=f.message)
        for key, f in fixed.items()
        if remaining[key] > max(allowed[key], 0)
    ]
    found += [
        _("{code} crashed on the fixed checkpoint, so it cannot be judged", code=code)
        for code in _crashed(plan.after) - _crashed(plan.before)
    ]
    return found + [
        _("{code} appears because of the fixes: {message}", code=f.code, message=f.message)
        for f in caused(plan.reference or plan.before, plan.after)
        if f.severity != "info"  # what is only a note does no harm
    ]


def _crashed(assessment: Assessment) -> set[str]:
    return {run.rule.code for run in assessment.runs if run.crashed}
