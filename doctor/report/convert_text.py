"""What `doctor convert` did, as plain text."""

import os

from doctor.locale.catalogue import counted, say, translated
from doctor.quant.convert import Converted
from doctor.report.text import safe, size


def render_conversion(done: Converted) -> str:
    """Formats, sizes, the client's answer, findings, and where it lies. The same input gives the same text."""
    made, out = done.conversion, safe(os.path.normpath(done.output))
    lines = [
        say("✓ {old} → {new}", old=made.old, new=made.new)
        + ": "
        + (
            counted(
                "{n:,} linear; codes, scales and zero points are the same",
                "{n:,} linears; codes, scales and zero points are the same",
                made.linears,
            )
            if made.exact
            else counted(
                "{n:,} weight as a 16-bit float, rounded once",
                "{n:,} weights as 16-bit floats, each rounded once",
                made.linears,
            )
        ),
        say(
            "  tensors {old} → {new}; {files} written, {linked:,} unchanged",
            old=size(done.old_bytes),
            new=size(done.new_bytes),
            files=counted("{n:,} file", "{n:,} files", done.written),
            linked=done.linked,
        ),
    ]
    lines += [f"  {safe(translated(note))}" for note in done.notes]
    lines += [f"✗ {f.code}  {safe(translated(f.message))}" for f in done.report.findings if f.severity == "error"]
    lines += [f"⚠ {f.code}  {safe(translated(f.message))}" for f in done.report.findings if f.severity == "warning"]
    lines.append(
        say(
            "Wrote {out}/ · receipt {receipt} · undo: {undo}",
            out=out,
            receipt=safe(str(done.receipt)),
            undo=say("delete {out}/", out=out),
        )
    )
    return "\n".join(lines) + "\n"
