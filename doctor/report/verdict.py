"""Whether a checkpoint is ready, what each area established, and what to do next: pure functions over a Report."""

import shlex
from dataclasses import dataclass

from doctor.core.messages import Message, _, plural
from doctor.core.records import ORIGINAL_BROKEN
from doctor.lint.engine import Report
from doctor.lint.rule import AREAS
from doctor.locale.catalogue import counted, say, translated
from doctor.model.directory_kind import KINDS
from doctor.report.closeness import closeness, layers_tried
from doctor.report.presentation import Group, fixable, given_path, tally
from doctor.report.recipe_text import goal_of, plan_flags, plan_label, plan_text  # noqa: F401 - for those that print
from doctor.report.text import count, safe, seconds, size


def ran(report: Report) -> int:
    return sum(r.status == "run" for r in report.runs)


def skipped(report: Report) -> int:
    return sum(r.status == "skipped" for r in report.runs)


def verdict(report: Report) -> tuple[str, str]:
    """(mark, sentence): whether the checkpoint is ready for the recipe, and how far that is known."""
    label = plan_label(report)
    if report.at_or_above("error"):
        return "error", translated(_ending(report, False, label))
    if report.summary.get("interrupted"):
        return "skipped", say("interrupted: no verdict for {plan}", plan=label)
    if report.crashed:
        return "crashed", say(
            "no verdict for {plan}: {rules} crashed",
            plan=label,
            rules=counted("{n:,} rule", "{n:,} rules", len(report.crashed)),
        )
    if report.extra.get("receipt_only"):
        return "skipped", say("quantized to {plan}, by its receipt; nothing was judged", plan=label)
    if not ran(report):
        return "skipped", say("nothing was judged for {plan}", plan=label)
    if report.summary.get("tensors") == 0:
        return "skipped", say("no tensor was judged: no verdict for {plan}", plan=label)
    sentence = translated(_ending(report, True, label)) + ("" if weights_read(report) else say(" (headers only)"))
    if report.at_or_above("warning"):
        return "warning", sentence + say(", with warnings")
    return "ok", sentence


def _ending(report: Report, good: bool, plan: str) -> Message:
    """The sentence for a good or a bad end of a check, a quantization or a comparison."""
    if (compared := report.extra.get("comparison")) and good and not report.linears:
        return closeness(compared, plan)
    if compared and not good and all(f.code == ORIGINAL_BROKEN for f in report.at_or_above("error")):
        return _("no verdict on {plan}: the original itself is broken", plan=plan)
    if (compared and not report.linears) or report.extra.get("own_measure"):
        return _("agrees with its original: {plan}" if good else "does not agree with its original: {plan}", plan=plan)
    if tried := report.extra.get("preflight"):
        return layers_tried(len(tried), plan)
    if report.linears:
        return _("quantized to {plan}" if good else "not quantized to {plan}", plan=plan)
    if good and report.summary.get("selected"):
        return _("nothing found by the selected rules, for {plan}", plan=plan)
    if goal_of(report) == "serve":
        return _("ready to serve: {plan}" if good else "not ready to serve: {plan}", plan=plan)
    if goal_of(report) == "none" and report.summary.get("kind") == "memory":
        return _("no error in the tensors ({plan})" if good else "errors in the tensors ({plan})", plan=plan)
    if goal_of(report) == "none":
        return _("no error in the files ({plan})" if good else "errors in the files ({plan})", plan=plan)
    return _("ready for {plan}" if good else "not ready for {plan}", plan=plan)


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
    return say(
        "{n} new, {gone} gone since {base}" if report.gone else "{n} new since {base}",
        n=new,
        gone=len(report.gone),
        base=safe(report.baseline),
    )


def suppressed(report: Report) -> str:
    """`2 suppressed (1 by the checkpoint itself)`; "" for none."""
    own = sum(f.suppression["from_checkpoint"] for f in report.suppressed if f.suppression)
    if not report.suppressed:
        return ""
    return say("{n} suppressed", n=len(report.suppressed)) + (
        say(" ({n} by the checkpoint itself)", n=own) if own else ""
    )


def what_it_is(report: Report) -> str:
    """`decoder LM · Qwen2ForCausalLM · 14.2 B · bf16 · 8 shards · 28.3 GB`, of what is known."""
    return " · ".join(filter(None, (kind_of(report), sizes_of(report))))


def kind_of(report: Report) -> str:
    """`decoder LM`, `diffusers pipeline`: what the directory is."""
    words = KINDS.get(report.summary.get("kind") or "")
    return translated(words) if words else ""


def sizes_of(report: Report) -> str:
    """`Qwen2ForCausalLM · 14.2 B · bf16 · 8 shards · 28.3 GB`, of what is known."""
    s = report.summary
    if report.extra.get("receipt_only"):
        return say("a receipt")
    parts = [s.get("architecture", ""), count(s.get("parameters", 0)), str(s.get("dtype", "")).lower()]
    held = [] if s.get("kind") == "memory" else [counted("{n:,} shard", "{n:,} shards", s.get("shards", 0))]
    parts += [*held, size(s.get("bytes", 0))]
    return safe(" · ".join(p for p in parts if p))


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
                    translated(name),
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
                Area(
                    translated(name), worst, ", ".join(filter(None, (tally(here) if here else "", interrupted(report))))
                )
            )
        elif here:
            worst = next(s for s in ("error", "warning", "info") if any(g.first.severity == s for g in here))
            extra = f"   ({_read(report)})" if name == "Weights" and weights_read(report) else ""
            lines.append(Area(translated(name), worst, tally(here) + extra))
        elif follow := [(g.code, e) for g in found for e in g.effects if e.code in codes]:
            worst = next(s for s in ("error", "warning", "info") if any(e.first.severity == s for _, e in follow))
            lines.append(
                Area(
                    translated(name),
                    worst,
                    say(
                        "follows from {causes}: {codes}",
                        causes=", ".join(dict.fromkeys(c for c, _ in follow)),
                        codes=", ".join(dict.fromkeys(e.code for _, e in follow)),
                    ),
                )
            )
        elif any(r.status == "run" for r in runs) and (reason := _unjudged(name, report)):
            passed = counted("{n:,} rule", "{n:,} rules", sum(r.status == "run" for r in runs))
            text = say("{rules} passed · not judged: {reason}", rules=passed, reason=translated(reason))
            lines.append(Area(translated(name), "skipped", safe(text)))
        elif any(r.status == "run" for r in runs):
            text = _established(name, report, [r for r in runs if r.status == "run"])
            lines.append(
                Area(
                    translated(name),
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
            lines.append(Area(translated(name), "skipped", _why_skipped(runs, _unjudged(name, report))))
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


def _unjudged(name: str, report: Report) -> str:
    """Why the rules that an area stands for judged nothing, though others of it ran; "" where they ran or none was due.

    Tensors and Tokenizer are compared with a config.json that names a model, Geometry is about groups in linears,
    Serving about kernels of a runtime: none of these is there for every directory.
    """
    if name in ("Tensors", "Weights", "Geometry") and not report.summary.get("tensors"):
        return _("no tensor was read")
    if name in ("Tensors", "Tokenizer") and not report.summary.get("architecture"):
        return _("no config.json that names a model")
    fact = {"Geometry": "layout", "Serving": "kernels" if report.recipe.runtime else ""}.get(name)
    asking = [r for r in report.runs if fact and fact in r.rule.facts]
    plain = goal_of(report) == "serve" and not report.summary.get("stored")  # 16-bit weights need no kernel of a format
    if plain or not asking or any(r.status != "skipped" for r in asking):
        return ""
    reasons = [reason for r in asking for reason in r.reasons]
    return max(set(reasons), key=reasons.count)


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
        "Config": say("{what}, {n} layers", what=s.get("architecture") or "config.json", n=s["blocks"])
        if s.get("blocks")  # a model of an encoder and a decoder has two numbers of them
        else s.get("architecture") or "config.json",
        "Tokenizer": say("tokenizer and special tokens agree with config.json"),
        "Weights": _read(report),
        "Geometry": say(
            "{linears} fit {plan}",
            linears=counted("{n:,} linear", "{n:,} linears", max(0, s["linears"] - _kept(report))),
            plan=plan_label(report),
        )
        if s.get("linears")
        else None,
        "Serving": say(
            "nothing against serving with {runtime} on compute capability {least} and up",
            runtime=report.recipe.runtime,
            least=s["capability"],
        )
        if s.get("capability")
        else say("nothing against serving with {runtime}", runtime=report.recipe.runtime)
        if report.recipe.runtime
        else say("nothing against its key-value cache; --runtime judges a runtime")
        if report.recipe.tp > 1
        else say("nothing against its key-value cache; not judged without --runtime, --tp"),
    }.get(name)
    subjects = max(r.judged for r in runs)
    return safe(
        say("{known} ({rules})", known=text, rules=judged)
        if text
        else say("{rules} on {subjects}", rules=judged, subjects=counted("{n:,} subject", "{n:,} subjects", subjects))
    )


def _kept(report: Report) -> int:
    """Linears that a run left in 16 bits."""
    return sum(found["outcome"] == "kept" and found.get("role") != "experts" for found in report.linears)


def _why_skipped(runs: list, known: str) -> str:
    reasons: dict[str, int] = {}
    for run in runs:
        if run.reasons:
            reason = max(run.reasons, key=lambda r: run.reasons[r])
            reasons[reason] = reasons.get(reason, 0) + 1
    reason = known or max(reasons, key=lambda r: reasons[r])
    return safe(
        say(
            "not judged: {reason} ({rules})",
            reason=translated(reason),
            rules=counted("{n:,} rule", "{n:,} rules", sum(reasons.values())),
        )
    )


def next_steps(report: Report, found: list[Group]) -> list[tuple[str, str]]:
    """(command or sentence, what it does), cheapest first."""
    by = fixable([g for g in found if not g.of_recipe])
    by_quantize = [g for g in found if g.of_recipe and g.safety in ("safe", "unsafe")]
    path = shlex.quote(safe(given_path(report)))
    plan = plan_flags(report.recipe, goal_of(report))
    command = f"doctor fix {path}{plan} -o fixed/"
    steps = []
    if report.summary.get("unread"):
        steps.append((f"doctor check {path}{plan} --download", say("every byte; fixes want a directory too")))
    elif by["safe"]:
        steps.append((command, counted("{n:,} safe fix", "{n:,} safe fixes", len(by["safe"]))))
    if by["unsafe"] and not report.summary.get("unread"):
        steps.append(
            (
                f"{command} --unsafe-fixes",
                f"+{len(by['unsafe'])}: " + ", ".join(dict.fromkeys(g.code for g in by["unsafe"])),
            )
        )
    if by_quantize and not report.summary.get("unread"):
        codes = list(dict.fromkeys(g.code for g in by_quantize))
        titles = [translated(g.first.fix.title) for g in by_quantize if g.first.fix]
        steps.append(
            (
                f"doctor quantize {path}{plan} -o quantized/ --unsafe-fixes={','.join(codes)}",
                ", ".join(dict.fromkeys(titles)),
            )
        )
    yours = list(dict.fromkeys(g.code for g in (*by["manual"], *by["by name"]) if g.first.severity != "info"))
    if yours:
        steps.append((f"doctor explain {yours[0]}", say("{n} for you: {codes}", n=len(yours), codes=", ".join(yours))))
    asked_more = report.linears or report.extra.get("comparison") or report.summary.get("kind") == "memory"
    asked_more = asked_more or report.summary.get("selected") or goal_of(report) != "quantize"
    if not steps and not found and not asked_more and not report.crashed and ran(report) and weights_read(report):
        steps.append((f"doctor quantize {path}{plan} -o quantized/", say("when you are ready")))
    return steps


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
            rows.append(
                (run.rule.code, run.rule.name, safe(translated(max(run.reasons, key=lambda r: run.reasons[r]))))
            )
        elif run.status == "not applicable":
            rows.append((run.rule.code, run.rule.name, none_to_judge(run.rule.scope)))
    return rows
