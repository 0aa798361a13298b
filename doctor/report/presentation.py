"""What every picture of a Report shares: findings folded over blocks, the verdict, what each area established, what to
do next.

Pure functions over a Report; no terminal, no file. A format that counted or worded these by itself would soon disagree
with the others.
"""

import os
import re
import shlex
from dataclasses import dataclass, field

from doctor.core.finding import Finding, Place
from doctor.core.messages import _, plural
from doctor.lint.engine import Report, fold, folded_name
from doctor.lint.rule import AREAS, Rule, Seen
from doctor.locale import rule_pages
from doctor.locale.catalogue import counted, current, say, translated

FP16_MAX = 65504
MARKS = {"error": "✗", "warning": "!", "info": "i", "ok": "✓", "skipped": "○", "crashed": "☠"}
# C0, C1, bidirectional overrides and line separators: a tensor name may hold them, and a terminal or a log would obey.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


@dataclass
class Group:
    """Findings alike but for the block. `effects` are groups that this one explains."""

    first: Finding
    all: list[Finding]
    effects: list["Group"] = field(default_factory=list)

    @property
    def code(self) -> str:
        return self.first.code

    @property
    def names(self) -> str:
        """The tensors, folded: model.layers.{0-39}.mlp.down_proj.weight; else the place of the first."""
        tensors = [f.where.tensor for f in self.all if f.where.tensor]
        return safe(folded_name(tensors) if tensors else self.first.target)

    @property
    def message(self) -> str:
        """The first finding's sentence; where the others' differ by nothing but the name, with the folded name."""
        own = self.first.where.tensor
        if len(self.all) > 1 and own:
            patterns = {f.message.replace(f.where.tensor or "\0", "\0") for f in self.all}
            if len(patterns) == 1 and own in self.first.message:
                return safe(self.first.message.replace(own, folded_name([f.where.tensor for f in self.all])))
        return safe(self.first.message)

    @property
    def folds_into_message(self) -> bool:
        return len(self.all) == 1 or self.names in self.message

    @property
    def safety(self) -> str:
        """ "safe", "unsafe", "by name" or "manual": who or what can cure it."""
        fix = self.first.fix
        if fix is None or fix.safety == "manual" or not fix.edits:
            return "manual"
        return "by name" if fix.by_name else fix.safety


def groups(report: Report) -> list[Group]:
    """Folded findings in repair order, consequences hung under the first group of the code that explains them, or
    explains that.
    """
    made = [Group(first, every) for first, every in fold(report.findings)]
    roots = [g for g in made if not g.first.consequence_of]
    causes = {g.code: g.first.consequence_of for g in made if g.first.consequence_of}
    for group in made:
        if group.first.consequence_of:
            code, passed = group.first.consequence_of, {group.code}
            while code in causes and code not in passed and not any(r.code == code for r in roots):
                passed.add(code)
                code = causes[code]
            cause = next((r for r in roots if r.code == code), None)
            (cause.effects if cause else roots).append(group)
    return roots


def counts(found: list[Group]) -> dict[str, int]:
    """severity -> folded findings, causes only."""
    return {s: sum(g.first.severity == s for g in found) for s in ("error", "warning", "info")}


def tally(found: list[Group]) -> str:
    """`3 errors, 2 warnings`; `no findings`."""
    many = {
        "error": lambda n: plural("{n:,} error", "{n:,} errors", n),
        "warning": lambda n: plural("{n:,} warning", "{n:,} warnings", n),
        "info": lambda n: plural("{n:,} note", "{n:,} notes", n),
    }
    parts = [translated(many[s](n)) for s, n in counts(found).items() if n]
    return say(", ").join(parts) or say("no findings")


def ran(report: Report) -> int:
    return sum(r.status == "run" for r in report.runs)


def skipped(report: Report) -> int:
    return sum(r.status == "skipped" for r in report.runs)


def verdict(report: Report) -> tuple[str, str]:
    """(mark, sentence): whether the checkpoint is ready for the plan, and how far that is known."""
    label = plan_label(report)
    good, bad = _what_was_asked(report)
    if report.at_or_above("error"):
        return "error", say(bad, plan=label)
    if report.summary.get("interrupted"):
        return "skipped", say("interrupted: no verdict for {plan}", plan=label)
    if report.crashed:
        return "crashed", say(
            "no verdict for {plan}: {rules} crashed",
            plan=label,
            rules=counted("{n:,} rule", "{n:,} rules", len(report.crashed)),
        )
    if not ran(report):
        return "skipped", say("nothing was judged for {plan}", plan=label)
    sentence = say(good, plan=label) + ("" if weights_read(report) else say(" (headers only)"))
    if report.at_or_above("warning"):
        return "warning", sentence + say(", with warnings")
    return "ok", sentence


def _what_was_asked(report: Report) -> tuple[str, str]:
    """The sentences for a good and a bad end of a check, a quantization or a comparison."""
    if report.extra.get("comparison"):
        return "agrees with its original: {plan}", "does not agree with its original: {plan}"
    if report.linears:
        return "quantized to {plan}", "not quantized to {plan}"
    return "ready for {plan}", "not ready for {plan}"


def weights_read(report: Report) -> bool:
    return report.bytes_read > 0


def run_facts(report: Report) -> str:
    """`2 new, 1 gone since base · 61 rules run · 3 skipped · 2 suppressed (1 by the checkpoint itself) · 41 s`."""
    parts = [
        since(report),
        say("{rules} run", rules=counted("{n:,} rule", "{n:,} rules", ran(report))),
        say("{n} skipped", n=skipped(report)) if skipped(report) else "",
        say("{n} crashed", n=len(report.crashed)) if report.crashed else "",
        suppressed(report),
        seconds(report.seconds),
    ]
    return " · ".join(filter(None, parts))


def since(report: Report) -> str:
    """`2 new, 1 gone since base`; "" without a baseline."""
    if not report.baseline:
        return ""
    new = sum(f.baseline_state == "new" for f in report.findings)
    sentence = "{n} new, {gone} gone since {base}" if report.gone else "{n} new since {base}"
    return say(sentence, n=new, gone=len(report.gone), base=safe(report.baseline))


def suppressed(report: Report) -> str:
    """`2 suppressed (1 by the checkpoint itself)`; "" for none."""
    own = sum(f.suppression["from_checkpoint"] for f in report.suppressed if f.suppression)
    if not report.suppressed:
        return ""
    return say("{n} suppressed", n=len(report.suppressed)) + (
        say(" ({n} by the checkpoint itself)", n=own) if own else ""
    )


def relative(file: str) -> str:
    """A path from the working directory, where it lies below it."""
    below = os.path.relpath(file)
    return file if below.startswith("..") else below


def path_of(report: Report, file: str) -> str:
    """Path of a finding's file from the working directory: below the checkpoint, or a configuration file anywhere."""
    if os.path.isabs(file):
        return relative(file)
    root = str(report.summary.get("path") or report.checkpoint).rstrip("/")
    return f"{root}/{file}" if root else file


def what_it_is(report: Report) -> str:
    """`Qwen2ForCausalLM · 14.2 B · bf16 · 8 shards · 28.3 GB`, of what is known."""
    s = report.summary
    parts = [
        s.get("architecture", ""),
        count(s.get("parameters", 0)),
        str(s.get("dtype", "")).lower(),
        counted("{n:,} shard", "{n:,} shards", s.get("shards", 0)),
        size(s.get("bytes", 0)),
    ]
    return safe(" · ".join(p for p in parts if p))


def plan_label(report: Report) -> str:
    """`gptq 4-bit g128`; of a 16-bit model that was compared with another, its type."""
    return str(report.summary.get("dtype", "")).lower() if report.extra.get("plain") else report.recipe.label()


def plan_text(report: Report) -> str:
    """`gptq · 4 bit · group 128 · sym → vllm 0.9, tensor parallel 8`."""
    if report.extra.get("plain"):
        return say("none: not quantized")
    r = report.recipe
    group = say("per channel") if r.group_size == -1 else say("group {n}", n=r.group_size)
    target = [" ".join(filter(None, (r.runtime, r.runtime_version)))] if r.runtime else []
    target += [say("tensor parallel {n}", n=r.tp)] if r.tp > 1 or r.runtime else [say("1 GPU")]
    return (
        " · ".join([r.name, say("{n} bit", n=r.bits), group, say("sym" if r.sym else "asym")])
        + f" → {say(', ').join(target)}"
    )


@dataclass(frozen=True)
class Area:
    """One line of the verdict box."""

    name: str
    mark: str
    text: str


def areas(report: Report, found: list[Group]) -> list[Area]:
    """A line for each area that has rules in this run: what was found, else what was established, else why nothing
    was.
    """
    lines = []
    for name in dict.fromkeys(area for _first, area in AREAS):
        runs = [r for r in report.runs if r.rule.area == name]
        if not runs or all(r.status == "not applicable" for r in runs):
            continue
        codes = {r.rule.code for r in runs}
        here = [g for g in found if g.code in codes]
        left_out = sum(r.status == "skipped" for r in runs)
        if any(r.crashed for r in runs):
            lines.append(
                Area(
                    say(name),
                    "crashed",
                    say(
                        "{rules} crashed",
                        rules=counted("{n:,} rule", "{n:,} rules", sum(bool(r.crashed) for r in runs)),
                    ),
                )
            )
        elif name == "Weights" and report.summary.get("interrupted"):
            worst = next(
                (s for s in ("error", "warning", "info") if any(g.first.severity == s for g in here)), "skipped"
            )
            lines.append(
                Area(say(name), worst, ", ".join(filter(None, (tally(here) if here else "", interrupted(report)))))
            )
        elif here:
            worst = next(s for s in ("error", "warning", "info") if any(g.first.severity == s for g in here))
            extra = f"   ({_read(report)})" if name == "Weights" and weights_read(report) else ""
            lines.append(Area(say(name), worst, tally(here) + extra))
        elif follow := [(g.code, e) for g in found for e in g.effects if e.code in codes]:
            worst = next(s for s in ("error", "warning", "info") if any(e.first.severity == s for _, e in follow))
            lines.append(
                Area(
                    say(name),
                    worst,
                    say(
                        "follows from {causes}: {codes}",
                        causes=", ".join(dict.fromkeys(c for c, _ in follow)),
                        codes=", ".join(dict.fromkeys(e.code for _, e in follow)),
                    ),
                )
            )
        elif any(r.status == "run" for r in runs):
            text = _established(name, report, [r for r in runs if r.status == "run"])
            lines.append(
                Area(
                    say(name),
                    "ok",
                    text
                    + (
                        " · " + say("{rules} skipped", rules=counted("{n:,} rule", "{n:,} rules", left_out))
                        if left_out
                        else ""
                    ),
                )
            )
        else:
            lines.append(Area(say(name), "skipped", _why_skipped(runs)))
    return lines


def interrupted(report: Report) -> str:
    """What was read before Ctrl-C and what was not looked at; "" where the run came to its end."""
    stop = report.summary.get("interrupted")
    return (
        say(
            "interrupted: {read} of {total} read, {tensors} not looked at",
            read=size(stop["bytes_read"]),
            total=size(stop["bytes"]),
            tensors=counted("{n:,} tensor", "{n:,} tensors", stop["tensors_left"]),
        )
        if stop
        else ""
    )


def _read(report: Report) -> str:
    return say("{n} values read, {size}", n=count(report.summary.get("parameters", 0)), size=size(report.bytes_read))


def _established(name: str, report: Report, runs: list) -> str:
    s = report.summary
    judged = counted("{n:,} rule", "{n:,} rules", len(runs))
    tensors = counted("{n:,} tensor", "{n:,} tensors", s.get("tensors", 0))
    text = {
        "Files": say(
            "{shards}, {size}, {tensors}",
            shards=counted("{n:,} shard", "{n:,} shards", s.get("shards", 0)),
            size=size(s.get("bytes", 0)),
            tensors=tensors,
        ),
        "Tensors": say("{tensors} as config.json asks", tensors=tensors),
        "Config": say("{what}, {n} blocks", what=s.get("architecture") or "config.json", n=s.get("blocks") or "?"),
        "Tokenizer": say("tokenizer and special tokens agree with config.json"),
        "Weights": _read(report),
        "Geometry": say(
            "{linears} fit {plan}",
            linears=counted("{n:,} linear", "{n:,} linears", s["linears"]),
            plan=plan_label(report),
        )
        if s.get("linears")
        else None,
        "Serving": say("nothing against serving with {runtime}", runtime=report.recipe.runtime)
        if report.recipe.runtime
        else say("nothing against serving with any runtime"),
    }.get(name)
    subjects = max(r.judged for r in runs)
    return safe(
        say("{known} ({rules})", known=text, rules=judged)
        if text
        else say("{rules} on {subjects}", rules=judged, subjects=counted("{n:,} subject", "{n:,} subjects", subjects))
    )


def _why_skipped(runs: list) -> str:
    reasons: dict[str, int] = {}
    for run in runs:
        if run.reasons:
            reason = max(run.reasons, key=run.reasons.get)
            reasons[reason] = reasons.get(reason, 0) + 1
    reason = max(reasons, key=reasons.get)
    return safe(
        say(
            "skipped: {reason} ({rules})",
            reason=translated(reason),
            rules=counted("{n:,} rule", "{n:,} rules", sum(reasons.values())),
        )
    )


def results(report: Report) -> list[tuple[str, str]]:
    """(what, numbers) of a quantization or a comparison; [] after a check."""
    lines = []
    done = [x for x in report.linears if isinstance(x, dict)]
    if done:
        kinds = {o: sum(x.get("outcome") == o for x in done) for o in dict.fromkeys(x.get("outcome", "") for x in done)}
        solves = [x["solve"] for x in done if x.get("solve")]
        raised = sum(s["damp_used"] > s["damp_asked"] for s in solves)
        better = [
            s["loss"] / s["rtn_loss"]
            for s in solves
            if number(s["loss"]) and number(s["rtn_loss"]) and s["rtn_loss"] > 0
        ]
        text = ", ".join(f"{n:,} {o}" for o, n in kinds.items())
        text += say("; damp raised for {n}", n=raised) if raised else ""
        text += (
            say("; error {share} of plain rounding's (median)", share=f"{sorted(better)[len(better) // 2]:.0%}")
            if better
            else ""
        )
        lines.append((say("linears"), text))
    c = report.extra.get("comparison")
    if c:
        before, after = c["perplexity_original"], c["perplexity_quantized"]
        change = f" ({_change(after / before)})" if number(before) and number(after) and before > 0 else ""
        span = say(
            "{change} on {tokens} tokens, {context} at a time",
            change=change,
            tokens=f"{c['tokens']:,}",
            context=f"{c['context']:,}",
        )
        lines.append((say("perplexity"), f"{figure(before)} → {figure(after)}{span}"))
        lines += [(say("blocks"), _blocks(c["own_errors"], c["block_errors"]))] if c.get("own_errors") else []
        lines.append(
            (
                say("divergence"),
                say(
                    "KL {mean} nats on average, {p99} at the 99th percentile; same next token {top1}",
                    mean=figure(c["kl_mean"]),
                    p99=figure(c["kl_p99"]),
                    top1=percent(c["top1_agreement"]),
                ),
            )
        )
        if number(c.get("entropy_quantized")) or number(c.get("entropy_original")):
            lines.append(
                (
                    say("entropy"),
                    say(
                        "{before} → {after} nats a token; one and the same first choice at most {one_before} → {one_after}",
                        before=figure(c["entropy_original"]),
                        after=figure(c["entropy_quantized"]),
                        one_before=percent(c["one_choice_original"]),
                        one_after=percent(c["one_choice"]),
                    ),
                )
            )
        lines.append(
            (
                say("replies"),
                say(
                    "{tokens}, longest repeat {repeat}, token 0 {share}",
                    tokens=counted("{n:,} token", "{n:,} tokens", c["generated"]),
                    repeat=c["longest_repeat"],
                    share=percent(c["token0_share"]),
                )
                if c["generated"]
                else say("not generated: {reason}", reason=_no_replies(report)),
            )
        )
        if c.get("half"):
            lines.append((say("float16"), _sixteen_bits(c["half"])))
    return [(label, safe(text)) for label, text in lines]


def _blocks(own: list, carried: list) -> str:
    """The error of each block alone, and what is carried along to the end."""
    finite = sorted(e for e in own if number(e))
    worst = max(range(len(own)), key=lambda i: own[i] if number(own[i]) else float("inf"))
    return say(
        "each alone off by {median} (median), block {worst} the most by {most}; carried along to the last block {last}",
        median=percent(finite[len(finite) // 2]) if finite else "NaN",
        worst=worst,
        most=percent(own[worst]),
        last=percent(carried[-1]),
    )


def _change(ratio: float) -> str:
    """`+5.0%`; a factor from eleven times on, where percents only count digits."""
    return f"{ratio - 1:+.1%}" if ratio <= 11 else f"× {ratio:.2g}"


def _no_replies(report: Report) -> str:
    given = report.extra.get("reply_bytes")
    if number(given):
        return say(
            "a whole model in float32 does not fit the {size} GiB given to it; --memory raises it",
            size=f"{given / 2**30:.1f}",
        )
    return translated(report.extra.get("not_generated") or "") or say("no prompts")


def _sixteen_bits(half: dict) -> str:
    """Whether the original fits float16, and what rounding to each 16-bit type does to its predictions."""
    shift = say(
        "KL of the original rounded to float16 {fp16}, to bfloat16 {bf16}",
        fp16=figure(half["kl_float16"]),
        bf16=figure(half["kl_bfloat16"]),
    )
    if half["first"] is not None:
        place, size = half["first"]
        return (
            say(
                "overflows: {place} reaches {size}, float16 ends at 65,504",
                place=translated(place),
                size=thousands(size),
            )
            + "; "
            + shift
        )
    used = percent(half["absmax"] / FP16_MAX) if number(half["absmax"]) else half["absmax"]
    return (
        say(
            "the original fits: its largest activation is {size}, {share} of the range",
            size=thousands(half["absmax"]),
            share=used,
        )
        + f" ({translated(half['place'])}); "
        + shift
    )


def thousands(value: object) -> str:
    return f"{value:,.0f}" if number(value) and abs(value) >= 1000 else figure(value)


def number(value: object) -> bool:
    """Whether this is a finite number (JSON reports hold NaN as a string)."""
    return isinstance(value, (int, float)) and value == value and abs(value) != float("inf")


def figure(value: object) -> str:
    return f"{value:.4g}" if number(value) else str(value)


def percent(value: object) -> str:
    return f"{value:.1%}" if number(value) else str(value)


def why(entry: Rule) -> str:
    """First paragraph of the page's Why, as one line."""
    return _first(entry, "Why")


def _first(entry: Rule, section: str) -> str:
    return one_line(rule_pages.section(entry, section, current()).split("\n\n")[0])


def headline(group: Group, entry: Rule | None) -> tuple[str, str]:
    """(what is wrong, the exact message): in English the message says both; in Chinese the rule's title goes before
    it.
    """
    if current() != "en" and entry is not None:
        return rule_pages.heading(entry, current()), group.message
    return group.message, ""


def page_rule(report: Report, code: str) -> Rule | None:
    return next((r.rule for r in report.runs if r.rule.code == code), None)


def elsewhere(entry: Rule, report: Report, most: int = 2) -> list[Seen]:
    """What other tools print for the same defect: the runtime's own words first, then the method's tools."""
    wanted = [_letters(report.recipe.runtime)] if report.recipe.runtime else []
    wanted += report.recipe.solver.tools

    def rank(seen: Seen) -> int:
        tool = _letters(seen.tool)
        return next((i for i, w in enumerate(wanted) if w in tool), len(wanted))

    ranked = sorted(entry.seen_as, key=rank)
    first_of_tool = list({s.tool: s for s in reversed(ranked)}.values())[::-1]
    others = [s for s in ranked if s not in first_of_tool]
    return (sorted(first_of_tool, key=rank) + others)[:most]


def _letters(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def cures(group: Group, entry: Rule | None, report: Report) -> list[tuple[str, str]]:
    """(label, sentence): `fix` safe, `fix!` changes numbers or shapes, `you` is for the user, `do` the page's advice in
    Chinese.

    A fix waits only for codes that the report holds.
    """
    fix, advice = group.first.fix, group.first.advice
    lines = []
    if current() == "zh" and entry is not None:
        lines.append(("do", _first(entry, "Do")))
    if group.safety == "safe":
        lines.append(("fix", translated(fix.title)))
    elif group.safety == "unsafe":
        standing = {f.code for f in report.findings}
        needs = [code for code in fix.needs if code in standing]
        once = " (once {codes} is gone)" if len(needs) == 1 else " (once {codes} are gone)"
        waits = say(once, codes=" and ".join(needs) if not current() == "zh" else "、".join(needs)) if needs else ""
        lines.append(("fix!", translated(fix.title) + waits))
    elif group.safety == "by name":
        lines.append(
            (
                "fix!",
                say(
                    "{title}: a guess, only by name with --unsafe-fixes={code}",
                    title=translated(fix.title),
                    code=group.code,
                ),
            )
        )
    elif fix is not None:
        lines.append(("you", translated(fix.title)))
    if advice:
        lines.append(("you", translated(advice)))
    if not lines and entry is not None:
        lines.append(("you", _first(entry, "Do")))
    return [(label, safe(text)) for label, text in lines]


def table(item: Finding) -> tuple[tuple, ...]:
    """The finding's table, the heads of its rows in the reader's language."""
    return tuple((translated(str(row[0])), *row[1:]) for row in item.facts_table)


def fixable(found: list[Group]) -> dict[str, list[Group]]:
    """safety -> groups."""
    return {s: [g for g in found if g.safety == s] for s in ("safe", "unsafe", "by name", "manual")}


def next_steps(report: Report, found: list[Group]) -> list[tuple[str, str]]:
    """(command or sentence, what it does), cheapest first."""
    by = fixable(found)
    path = shlex.quote(safe(str(report.summary.get("path") or report.checkpoint)))
    plan = plan_flags(report.recipe)
    command = f"doctor fix {path}{plan} -o fixed/"
    steps = []
    if report.summary.get("unread"):
        steps.append((f"doctor check {path}{plan} --download", "every byte; fixes want a directory too"))
    elif by["safe"]:
        steps.append((command, counted("{n:,} safe fix", "{n:,} safe fixes", len(by["safe"]))))
    if by["unsafe"] and not report.summary.get("unread"):
        steps.append(
            (
                f"{command} --unsafe-fixes",
                f"+{len(by['unsafe'])}: " + ", ".join(dict.fromkeys(g.code for g in by["unsafe"])),
            )
        )
    yours = list(dict.fromkeys(g.code for g in (*by["manual"], *by["by name"]) if g.first.severity != "info"))
    if yours:
        steps.append((f"doctor explain {yours[0]}", say("{n} for you: {codes}", n=len(yours), codes=", ".join(yours))))
    asked_more = report.linears or report.extra.get("comparison")
    if not steps and not found and not asked_more and not report.crashed and ran(report) and weights_read(report):
        steps.append((f"doctor quantize {path}{plan} -o quantized/", say("when you are ready")))
    return steps


def plan_flags(recipe) -> str:
    """The options that differ from the default plan, to paste."""
    from doctor.core.recipe import Recipe

    default, flags = Recipe(), []
    if recipe.method != default.method:
        flags.append(f"--method {recipe.method}")
    for flag, name in (("--bits", "bits"), ("--group-size", "group_size"), ("--tp", "tp")):
        if getattr(recipe, name) != getattr(default, name):
            flags.append(f"{flag} {getattr(recipe, name)}")
    if not recipe.sym:
        flags.append("--asym")
    if recipe.runtime:
        flags.append("--runtime " + "==".join(filter(None, (recipe.runtime, recipe.runtime_version))))
    return "".join(" " + f for f in flags)


def plan_row(row: dict) -> str:
    """What a row of the matrix is called; a step stands under its plan."""
    return row["plan"] if row["step"] == "as it is" else f"… {translated(row['step'])}"


def blockers(cells: list[dict]) -> str:
    """`W201; 2+ GPUs also G302`."""
    everywhere = set.intersection(*(set(c["codes"]) for c in cells))
    more: dict[str, list[int]] = {}
    for cell in cells:
        for code in sorted(set(cell["codes"]) - everywhere):
            more.setdefault(code, []).append(cell["tp"])
    gpus: dict[tuple, list[str]] = {}
    for code, counts in more.items():
        gpus.setdefault(tuple(counts), []).append(code)
    last = cells[-1]["tp"]
    parts = [", ".join(sorted(everywhere))] if everywhere else []
    for counts, codes in gpus.items():
        upward = (
            list(counts) == [c["tp"] for c in cells if c["tp"] >= counts[0]] and counts[-1] == last and len(counts) > 1
        )
        where = f"{counts[0]}+" if upward else ", ".join(map(str, counts))
        parts.append(
            say("{n} GPUs also {codes}" if everywhere else "{n} GPUs {codes}", n=where, codes=", ".join(codes))
        )
    return "; ".join(parts)


def subjects(n: int, scope: str) -> str:
    """`3 tensors`, of what a rule judged."""
    many = {
        "checkpoint": lambda: plural("{n:,} checkpoint", "{n:,} checkpoints", n),
        "shard": lambda: plural("{n:,} shard", "{n:,} shards", n),
        "tensor": lambda: plural("{n:,} tensor", "{n:,} tensors", n),
        "linear": lambda: plural("{n:,} linear", "{n:,} linears", n),
    }
    return translated(many[scope]())


def none_to_judge(scope: str) -> str:
    """Why a rule of this scope judged nothing."""
    reasons = {
        "checkpoint": _("no checkpoint to judge"),
        "shard": _("no shard to judge"),
        "tensor": _("no tensor to judge"),
        "linear": _("no linear to judge"),
    }
    return translated(reasons[scope])


def skip_reasons(report: Report) -> list[tuple[str, str, str]]:
    """(code, name, reason) of every rule that judged nothing."""
    rows = []
    for run in report.runs:
        if run.status == "skipped":
            rows.append((run.rule.code, run.rule.name, safe(translated(max(run.reasons, key=run.reasons.get)))))
        elif run.status == "not applicable":
            rows.append((run.rule.code, run.rule.name, none_to_judge(run.rule.scope)))
    return rows


def anchor(finding: Finding) -> tuple[str, int, int]:
    """(file, line, column) for readers that know only text: tensors point at line 1."""
    where = finding.where
    return where.file or "config.json", where.line or 1, where.column or 1


def spot(where: Place) -> str:
    """`:5:19`, `:5` where no column is known, or nothing: what follows a file's name."""
    return "".join(f":{n}" for n in (where.line, where.column if where.line else None) if n)


def fingerprint(finding: Finding) -> str:
    """Stable name of one defect: code and place, no numbers."""
    return f"{finding.code}:{finding.target}"


# numbers and text


def count(n: float) -> str:
    """1234567 -> 1.2 M."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if n >= limit:
            return f"{n / limit:.1f} {unit}"
    return f"{int(n)}"


def size(n: int) -> str:
    """Bytes in powers of ten, as download pages write them."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n >= limit:
            value = n / limit
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}"
    return f"{n} bytes"


def seconds(value: float) -> str:
    if value >= 120:
        return f"{value / 60:.0f} min"
    return f"{value:.0f} s" if value >= 10 else f"{value:.1f} s"


def pad(text: str, cells: int) -> str:
    """Text with blanks behind it to a width in cells, of which a Chinese character takes two."""
    from rich.cells import cell_len

    return text + " " * (cells - cell_len(text))


def one_line(text: str) -> str:
    return " ".join(text.split())


def safe(text: str) -> str:
    """Text with control characters written out, so that a file's contents cannot steer a terminal or forge a log
    line.
    """
    return _CONTROL.sub(
        lambda m: f"\\x{ord(m[0]):02x}" if ord(m[0]) < 256 else f"\\u{ord(m[0]):04x}", str(text)
    ).replace("\n", " ")


def window(line: str, column: int, length: int, width: int) -> tuple[str, int]:
    """A long line cut around the marked part: (text, 1-based column in it). Minified JSON is one line of any length."""
    if len(line) <= width:
        return line, column
    begin = max(0, min(column - 1 - width // 4, len(line) - width + 2))
    head, tail = "…" if begin else "", "…"
    part = line[begin : begin + width - 2]
    if begin + width - 2 >= len(line):
        tail = ""
    return head + part + tail, column - begin + len(head)


def level(values: list, top: float) -> str:
    """One character per value: · for 0, eighths of a bar below top, ? for what is no number."""
    bars = "▁▂▃▄▅▆▇█"
    out = []
    for value in values:
        if value is None or isinstance(value, str) or value != value:
            out.append("?" if value is not None else " ")
        elif not value or top <= 0:
            out.append("·")
        else:
            out.append(bars[min(int(abs(value) / top * 8), 7)] if abs(value) != float("inf") else "█")
    return "".join(out)


def squeeze(values: list, width: int) -> list:
    """At most `width` values: neighbours become their largest, so that nothing high is lost."""
    if len(values) <= width:
        return list(values)

    def largest(part: list):
        odd = [v for v in part if isinstance(v, str) or (v is not None and v != v)]
        return odd[0] if odd else max((v for v in part if v is not None), key=abs, default=None)

    edges = [i * len(values) // width for i in range(width + 1)]
    return [largest(values[a:b]) for a, b in zip(edges, edges[1:], strict=False)]
