"""The plan of a fix as plain text: what each step changes, what waits, what is left to the user, and what was
written.
"""

import os

from doctor.core.messages import listed
from doctor.fixing.plan import Plan
from doctor.fixing.proof import PROOF_PROMPTS, Proof
from doctor.fixing.result import FixResult
from doctor.fixing.step import Step
from doctor.lint.engine import fold
from doctor.locale.catalogue import counted, say, translated
from doctor.report.presentation import Group
from doctor.report.text import pad, safe, size

_INDENT = "   "
_MOST_TENSORS = 12  # lines of changed tensors a step shows; the receipt has them all


def render_plan(result: FixResult) -> str:
    """Text of a dry run, or of what was done. The same input gives the same text: no times, no addresses."""
    plan, done = result.plan, result.receipt_path is not None
    lines: list[str] = []
    for step in [*plan.steps, *plan.waiting]:
        lines += _step(step, plan, result, done)
    for step in plan.optional:
        lines.append(
            f"-  {step.code}  {translated(_word(step))}  {safe(translated(step.title))}   ({_how_to_ask(plan, step)})"
        )
    lines += [_for_you(group, plan) for group in _folded(plan.for_you)]
    lines += [
        f"☠  {say('{code} crashed', code=run.rule.code)}: {safe(translated(run.crashed))}; "
        + say("internal error (a bug in doctor): report it")
        for run in result.report.crashed
    ]
    if lines:
        lines.append("")
    lines += [say("note: {text}", text=safe(translated(note))) for note in result.notes]
    return "\n".join(lines + (_written(result) if done else _not_written(result))) + "\n"


def _step(step: Step, plan: Plan, result: FixResult, done: bool) -> list[str]:
    mark = "✓" if done and not step.waits else f"{step.number}"
    remarks = ([say("(after {n}: same file)", n=step.after)] if step.after else []) + (
        [f"({safe(translated(step.waits))})"] if step.waits else []
    )
    lines = ["  ".join([mark, step.code, pad(translated(_word(step)), 7), safe(translated(step.title)), *remarks])]
    for name, diff in step.diffs.items():
        target = os.path.join(os.path.basename(os.path.normpath(result.output)), name)
        lines += [
            f"{_INDENT}--- {safe(name)}",
            f"{_INDENT}+++ {safe(target)}",
            *(_INDENT + safe(line) for line in diff),
        ]
    shown = step.tensors[:_MOST_TENSORS]
    width = max((len(t[0]) for t in shown), default=0)
    for name, dtype, old, new in shown:
        lines.append(f"{_INDENT}~ {safe(name):<{width}}  {dtype.lower()} {_change(old, new)}")
    if len(step.tensors) > len(shown):
        lines.append(f"{_INDENT}  {say('and {n} more', n=format(len(step.tensors) - len(shown), ','))}")
    lines += [f"{_INDENT}  {safe(translated(note))}" for note in step.notes]
    if step.pads:
        lines.append(f"{_INDENT}  {say('proof: {text}', text=_proof(result.proofs))}")
    return lines


def _change(old: tuple[int, ...] | None, new: tuple[int, ...] | None) -> str:
    if new is None:
        return say("{shape} dropped", shape=list(old or ()))
    if old is None:
        return say("{shape} added", shape=list(new))
    return f"{list(old)} → {list(new)}" if new != old else say("{shape} values change", shape=list(old))


def _proof(proofs: list[Proof]) -> str:
    if not proofs:
        return say("logits on {n} fixed prompts, before and after, must agree to float32 rounding", n=PROOF_PROMPTS)
    return "; ".join(
        f"{'✓' if p.status in ('equal', 'agrees') else '✗'} {safe(translated(p.detail))}"
        if p.status != "not run"
        else say("not run: {text}", text=safe(translated(p.detail)))
        for p in proofs
    )


def _word(step: Step) -> str:
    return "by name" if any(f.fix is not None and f.fix.by_name for f in step.findings) else step.safety


def _how_to_ask(plan: Plan, step: Step) -> str:
    if step.waits:
        return translated(step.waits)
    named = _word(step) == "by name" or plan.consent.codes
    return say("with --unsafe-fixes={code}", code=step.code) if named else say("with --unsafe-fixes")


def _folded(findings) -> list[Group]:
    return [Group(first, every) for first, every in fold(findings)]


def _for_you(group: Group, plan: Plan) -> str:
    first = group.first
    text = translated(
        first.fix.title if first.fix is not None and first.fix.safety == "manual" else first.advice or group.message
    )
    unblocks = [str(s.number) for s in plan.waiting if group.code in s.needs]
    return f"-  {group.code}  {say('for you')}  {safe(text)}" + (
        say("   (unblocks {steps})", steps=", ".join(unblocks)) if unblocks else ""
    )


def _tally(plan: Plan) -> str:
    fixed, total = len(_folded([f for s in plan.steps for f in s.findings])), len(_folded(plan.before.findings))
    now = say("{n} of {findings}", n=fixed, findings=counted("{n:,} finding", "{n:,} findings", max(total, fixed)))
    needs = sorted(
        {code for s in plan.waiting for code in s.needs if s.waits.startswith("waits for") and code in s.waits}
    )
    later = sum(len(_folded(s.findings)) for s in plan.waiting if s.waits.startswith("waits for"))
    if not needs:
        return now
    return now + say(
        " now, {n} more once {codes} is gone" if len(needs) == 1 else " now, {n} more once {codes} are gone",
        n=later,
        codes=listed(needs),
    )


def _not_written(result: FixResult) -> list[str]:
    plan = result.plan
    if not plan.steps:
        return [say("{what}: nothing was written.", what=_nothing(plan)) + _remaining(result)]
    lines = [
        say(
            "Would fix {tally}. Would write {files} ({size}); {linked} unchanged ({linked_size}).",
            tally=_tally(plan),
            **_sizes(plan),
        )
    ]
    lines += [say("Would stop: {problem}.", problem=safe(translated(problem))) for problem in plan.problems]
    return [*lines, say("Nothing was written.") + _remaining(result)]


def _nothing(plan: Plan) -> str:
    return say("Nothing to fix") if not plan.before.findings else say("No fix can be carried out now")


def _sizes(plan: Plan) -> dict[str, str]:
    return {
        "files": counted("{n:,} file", "{n:,} files", len(plan.files_written)),
        "size": size(plan.bytes_to_write),
        "linked": f"{len(plan.files_linked):,}",
        "linked_size": size(plan.bytes_linked),
    }


def _written(result: FixResult) -> list[str]:
    plan = result.plan
    out = os.path.normpath(result.output)
    fixed = say(
        "Fixed {tally}. Wrote {files} ({size}); {linked} unchanged ({linked_size})."
        if plan.steps
        else "{what}: the output is a copy of all {linked} files ({linked_size}).",
        what=_nothing(plan),
        tally=_tally(plan),
        **_sizes(plan),
    )
    return [
        fixed + _remaining(result),
        say(
            "Wrote {out}/ · receipt {receipt} · undo: {undo}",
            out=safe(str(out)),
            receipt=safe(str(result.receipt_path)),
            undo=_undo(result, safe(str(out))),
        ),
    ]


def _undo(result: FixResult, out: str) -> str:
    in_place = os.path.abspath(result.output) == os.path.abspath(result.plan.source.root)
    return say(
        "doctor undo {out}; until then {out}.before-fix/ holds what was there" if in_place else "delete {out}/", out=out
    )


def _remaining(result: FixResult) -> str:
    report = result.report_after
    codes = sorted({f.code for f in report.findings} | {run.rule.code for run in report.crashed})
    ahead = result.receipt_path is None and result.plan.steps
    if not codes:
        return (
            (say(" No findings would remain.") if ahead else say(" No findings remain.")) if result.plan.steps else ""
        )
    return say(
        " Exit {code}: {codes} would remain."
        if ahead
        else " Exit {code}: {codes} remain."
        if len(codes) > 1
        else " Exit {code}: {codes} remains.",
        code=2 if report.crashed else 0 if report.ok else 1,
        codes=listed(codes),
    )
