"""What a report was judged for, in words: the plan, how the files are stored, and the options that say it again."""

from dataclasses import replace

from doctor.core.methods import METHODS
from doctor.core.recipe import Recipe
from doctor.formats.schemes import fields_of, name_of, with_others
from doctor.lint.engine import Report
from doctor.locale.catalogue import say
from doctor.report.text import safe


def goal_of(report: Report) -> str:
    """What was judged: "quantize", "serve" or "none"."""
    return "quantize" if report.linears or report.extra.get("comparison") else report.summary.get("goal", "quantize")


def plan_label(report: Report) -> str:
    """`gptq 4-bit g128`, or `NVFP4A16` where a scheme names it; of files that are judged as they are, how they are
    stored; of a 16-bit model that was compared with another, its type.
    """
    dtype, r = str(report.summary.get("dtype", "")).lower(), report.recipe
    if report.extra.get("plain"):
        return dtype
    stored = report.summary.get("stored")
    if report.extra.get("comparison") and stored:  # the recipe knows only what doctor writes
        return safe(stored)
    gpus = [f"tp{r.tp}"] if r.tp > 1 else []
    if goal_of(report) == "quantize":
        scheme = name_of(r)
        return with_others(" ".join([scheme, *gpus]) if scheme else r.label(), r)
    return safe(" ".join([stored or dtype, *gpus]))


def plan_text(report: Report) -> str:
    """`gptq · 4 bit · group 128 · sym → vllm 0.9, tensor parallel 8`."""
    if report.extra.get("plain"):
        return say("none: not quantized")
    r = report.recipe
    if goal_of(report) == "none":
        return say("none: the files alone")
    group = say("per channel") if r.group_size == -1 else say("group {n}", n=r.group_size)
    target = [" ".join(filter(None, (r.runtime, r.runtime_version)))] if r.runtime else []
    target += [r.gpu] if r.gpu else []
    target += [say("tensor parallel {n}", n=r.tp)] if r.tp > 1 or r.runtime else [say("1 GPU")]
    stored = report.summary.get("stored")
    compared = report.extra.get("comparison") and not report.linears
    if goal_of(report) == "serve" or (compared and stored):
        stored = stored or str(report.summary.get("dtype", "")).lower()
        return say("none: served as stored") + f" · {safe(stored)} → {say(', ').join(target)}"
    return (
        " · ".join(
            [with_others(name_of(r) or r.name, r), say("{n} bit", n=r.bits), group, say("sym" if r.sym else "asym")]
        )
        + f" → {say(', ').join(target)}"
    )


def plan_flags(recipe: Recipe, goal: str = "quantize") -> str:
    """The options that differ from the default plan, to paste."""
    default, flags = Recipe(), []
    if goal != "quantize":  # the files say the rest
        return (f" --for {recipe.goal}" if recipe.goal else "") + _where(recipe)
    scheme = name_of(recipe)
    if scheme:
        flags.append(f"--scheme {scheme}")
        default = replace(default, **fields_of(scheme, {}))
    if recipe.method != default.method:
        flags.append(f"--method {recipe.method}")
    for flag, name in (("--bits", "bits"), ("--group-size", "group_size"), ("--tp", "tp")):
        if getattr(recipe, name) != getattr(default, name):
            flags.append(f"{flag} {getattr(recipe, name)}")
    if not scheme and recipe.sym != METHODS[recipe.method].sym:
        flags.append("--sym" if recipe.sym else "--asym")
    if recipe.runtime:
        flags.append("--runtime " + "==".join(filter(None, (recipe.runtime, recipe.runtime_version))))
    return "".join(" " + f for f in flags)


def _where(recipe: Recipe) -> str:
    """The options that say where it will run."""
    gpus = f" --tp {recipe.tp}" if recipe.tp > 1 else ""
    runtime = "==".join(filter(None, (recipe.runtime, recipe.runtime_version)))
    card = f" --gpu {recipe.gpu}" if recipe.gpu else ""
    return gpus + (f" --runtime {runtime}" if runtime else "") + card
