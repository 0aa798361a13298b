"""The plan of a fix as plain text: what each step changes, what waits, what is left to the user, and what was written."""

import os

from doctor.api import FixResult
from doctor.engine import fold
from doctor.plan import PROOF_PROMPTS, Plan, Proof, Step
from doctor.report.view import Group, counted, safe, size

_INDENT = "   "
_MOST_TENSORS = 12  # lines of changed tensors a step shows; the receipt has them all


def render_plan(result: FixResult) -> str:
    """Text of a dry run, or of what was done. The same input gives the same text: no times, no addresses."""
    plan, done = result.plan, result.receipt_path is not None
    lines: list[str] = []
    for step in [*plan.steps, *plan.waiting]:
        lines += _step(step, plan, result, done)
    for step in plan.optional:
        lines.append(f"-  {step.code}  {_word(step)}  {safe(step.title)}   ({_how_to_ask(plan, step)})")
    lines += [_for_you(group, plan) for group in _folded(plan.for_you)]
    if lines:
        lines.append("")
    lines += [f"note: {safe(note)}" for note in result.notes]
    return "\n".join(lines + (_written(result) if done else _not_written(result))) + "\n"


def _step(step: Step, plan: Plan, result: FixResult, done: bool) -> list[str]:
    mark = "✓" if done and not step.waits else f"{step.number}"
    remarks = ([f"(after {step.after}: same file)"] if step.after else []) + ([f"({safe(step.waits)})"] if step.waits else [])
    lines = ["  ".join([mark, step.code, f"{_word(step):<7}", safe(step.title), *remarks])]
    for name, diff in step.diffs.items():
        target = os.path.join(os.path.basename(os.path.normpath(result.output)), name)
        lines += [f"{_INDENT}--- {safe(name)}", f"{_INDENT}+++ {safe(target)}", *(_INDENT + safe(line) for line in diff)]
    shown = step.tensors[:_MOST_TENSORS]
    width = max((len(t[0]) for t in shown), default=0)
    for name, dtype, old, new in shown:
        lines.append(f"{_INDENT}~ {safe(name):<{width}}  {dtype.lower()} {_change(old, new)}")
    if len(step.tensors) > len(shown):
        lines.append(f"{_INDENT}  and {len(step.tensors) - len(shown):,} more")
    lines += [f"{_INDENT}  {note}" for note in step.notes]
    if step.pads:
        lines.append(f"{_INDENT}  proof: {_proof(result.proofs)}")
    return lines


def _change(old: tuple[int, ...] | None, new: tuple[int, ...] | None) -> str:
    if old is None:
        return f"{list(new)} added"
    if new is None:
        return f"{list(old)} dropped"
    return f"{list(old)} → {list(new)}" if new != old else f"{list(old)} values change"


def _proof(proofs: list[Proof]) -> str:
    if not proofs:
        return f"logits on {PROOF_PROMPTS} fixed prompts, before and after, must agree to float32 rounding"
    return "; ".join(f"{'✓' if p.status in ('equal', 'agrees') else '✗'} {safe(p.detail)}" if p.status != "not run" else f"not run: {safe(p.detail)}"
                     for p in proofs)


def _word(step: Step) -> str:
    return "by name" if any(f.fix.by_name for f in step.findings) else step.safety


def _how_to_ask(plan: Plan, step: Step) -> str:
    if step.waits:
        return step.waits
    return f"with --unsafe-fixes={step.code}" if _word(step) == "by name" or plan.consent.codes else "with --unsafe-fixes"


def _folded(findings) -> list[Group]:
    return [Group(first, every) for first, every in fold(findings)]


def _for_you(group: Group, plan: Plan) -> str:
    first = group.first
    text = first.fix.title if first.fix is not None and first.fix.safety == "manual" else first.advice or group.message
    unblocks = [str(s.number) for s in plan.waiting if group.code in s.needs]
    return f"-  {group.code}  for you  {safe(text)}" + (f"   (unblocks {', '.join(unblocks)})" if unblocks else "")


def _tally(plan: Plan) -> str:
    cured, total = len(_folded([f for s in plan.steps for f in s.findings])), len(_folded(plan.before.findings))
    now = f"{cured} of {counted(max(total, cured), 'finding')}"
    needs = sorted({code for s in plan.waiting for code in s.needs if s.waits.startswith("waits for") and code in s.waits})
    later = sum(len(_folded(s.findings)) for s in plan.waiting if s.waits.startswith("waits for"))
    return now + (f" now, {later} more once {_and(needs)} {'is' if len(needs) == 1 else 'are'} gone" if needs else "")


def _not_written(result: FixResult) -> list[str]:
    plan = result.plan
    if not plan.steps:
        what = "Nothing to fix" if not plan.before.findings else "No fix can be carried out now"
        return [f"{what}: nothing was written.{_remaining(result)}"]
    lines = [f"Would fix {_tally(plan)}. Would write {counted(len(plan.files_written), 'file')} ({size(plan.bytes_to_write)}), "
             f"link {len(plan.files_linked):,} ({size(plan.bytes_linked)})."]
    lines += [f"Would stop: {safe(problem)}." for problem in plan.problems]
    return [*lines, f"Nothing was written.{_remaining(result)}"]


def _written(result: FixResult) -> list[str]:
    plan = result.plan
    out = os.path.normpath(result.output)
    return [f"Fixed {_tally(plan)}. Wrote {counted(len(plan.files_written), 'file')} ({size(plan.bytes_to_write)}); "
            f"{len(plan.files_linked):,} unchanged ({size(plan.bytes_linked)}).{_remaining(result)}",
            f"Wrote {safe(str(out))}/ · receipt {safe(str(result.receipt_path))} · undo: {_undo(result, safe(str(out)))}"]


def _undo(result: FixResult, out: str) -> str:
    in_place = os.path.abspath(result.output) == os.path.abspath(result.plan.source.root)
    return f"doctor undo {out}; until then {out}.before-fix/ holds what was there" if in_place else f"delete {out}/"


def _remaining(result: FixResult) -> str:
    report = result.report_after
    codes = sorted({f.code for f in report.findings})
    if not codes:
        return " No findings remain." if result.plan.steps else ""
    verb = "would remain" if result.receipt_path is None and result.plan.steps else "remain" if len(codes) > 1 else "remains"
    return f" Exit {0 if report.ok else 1}: {_and(codes)} {verb}."


def _and(words: list[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]

