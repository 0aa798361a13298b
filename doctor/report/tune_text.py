"""What `doctor tune` did, as plain text."""

import os
import shlex
from typing import TYPE_CHECKING

from doctor.locale.catalogue import counted, say, translated
from doctor.report.text import safe

if TYPE_CHECKING:
    from doctor.quant.tuning.tune import Tuned


def render_tuning(done: "Tuned", original: str) -> str:
    """The divergence before and after, what was tuned, findings, and where it lies. The same input gives the same
    text.
    """
    found = done.outcome
    rows = counted("{n} row that was not trained on", "{n} rows that were not trained on", found.watched)
    if done.output is None or done.report is None:
        lines = [
            say("✗ not written: tuning did not lower the divergence on {rows}", rows=rows),
            say(
                "  KL {start:.4f} before, then {seen} in {steps} steps; more or other text may help: --rows, "
                "--calibration",
                start=found.start,
                seen=", ".join(f"{kl:.4f}" for _step, kl in found.progress.watched[1:]) or "-",
                steps=found.steps,
            ),
        ]
        return "\n".join(lines) + "\n"
    out = safe(os.path.normpath(done.output))
    lines = [
        say(
            "✓ tuned: KL {start:.4f} → {end:.4f} nats a token ({change:+.0%}) on {rows}",
            start=found.start,
            end=found.end,
            change=found.end / found.start - 1,
            rows=rows,
        ),
        say(
            "  scales of {scales} and the gains of {gains}; codes, shapes and config are the same · {seconds:.0f} s",
            scales=counted("{n:,} linear", "{n:,} linears", found.scales),
            gains=counted("{n:,} norm", "{n:,} norms", found.gains),
            seconds=done.seconds,
        ),
    ]
    lines += [f"  {safe(translated(note))}" for note in done.notes]
    lines += [f"✗ {f.code}  {safe(translated(f.message))}" for f in done.report.findings if f.severity == "error"]
    lines += [f"⚠ {f.code}  {safe(translated(f.message))}" for f in done.report.findings if f.severity == "warning"]
    lines += [
        say("Wrote {out}/", out=out),
        say("next  {command}", command=f"doctor verify {shlex.quote(original)} {shlex.quote(out)}"),
    ]
    return "\n".join(lines) + "\n"
