"""What `doctor quantize --preflight --recipes FILE` found: a row a recipe."""

from __future__ import annotations

from doctor.core.messages import listed
from doctor.locale.catalogue import counted, say, translated
from doctor.quant.sweep import Sweep, Trial
from doctor.report.drawings import small_percent
from doctor.report.formats.json_report import dumps
from doctor.report.table_page import TablePage
from doctor.report.text import number, seconds, size


def sweep_page(found: Sweep) -> TablePage:
    """The Sweep as every format shows it."""
    best = found.best
    alone = [t.name for t in found.trials if not t.calibrated]
    failing = [t for t in found.trials if t.problem]
    tried = listed(str(i + 1) for i in found.layers)
    return TablePage(
        title=say(
            "{name}: {recipes}", name=found.checkpoint, recipes=counted("{n} recipe", "{n} recipes", len(found.trials))
        ),
        about=[say("tried on layers {layers}; nothing was written", layers=translated(tried))] if found.layers else [],
        mark="ok" if best else "error",
        sentence=say("least error: {name}", name=best.name) if best else say("every recipe would fail"),
        heads=[
            say("recipe"),
            say("median error"),
            say("worst"),
            say("size"),
            say("bits"),
            say("time"),
            say("memory"),
            say("findings"),
        ],
        rows=[_row(trial) for trial in found.trials],
        numbers=frozenset(range(1, 7)),
        droppable=(6, 2),
        more=[say("{name} would fail: {problem}", name=t.name, problem=translated(t.problem)) for t in failing],
        notes=[
            say("median error, worst: of the linears that were tried, as a share of their outputs' energy"),
            *([say("{names}: of the weights alone, no calibration is taken", names=", ".join(alone))] if alone else []),
            say("size, time and memory: of a whole run; `doctor quantize` with one of them, then `doctor verify`"),
        ],
        json=dumps(found.to_dict()),
    )


def _row(trial: Trial) -> list[str]:
    name = trial.name if trial.name == trial.plan else f"{trial.name} ({trial.plan})"
    if not number(trial.error):
        return [name, "✗", "", "", "", "", "", ", ".join(trial.findings)]
    return [
        name,
        small_percent(trial.error),
        small_percent(trial.worst),
        size(trial.bytes),
        f"{trial.bits:.2f}",
        seconds(trial.seconds) if number(trial.seconds) else "",
        size(trial.memory),
        ", ".join(trial.findings),
    ]
