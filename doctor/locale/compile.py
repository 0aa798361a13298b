"""Compiles a catalogue: .po to the .mo that gettext reads. It takes Babel, which setup.py has and a run need not have.

setup.py loads this file by its path, before the package is installed: it must import nothing of doctor.
"""

import hashlib
import io
from pathlib import Path

from babel.messages.mofile import write_mo
from babel.messages.pofile import read_po


def compiled(po: bytes) -> bytes:
    """The .mo of a .po; under the id "doctor.po" it holds the SHA-256 of its source."""
    catalog = read_po(io.BytesIO(po))
    catalog.add("doctor.po", hashlib.sha256(po).hexdigest())
    out = io.BytesIO()
    write_mo(out, catalog)
    return out.getvalue()


def compile_all(home: Path) -> list[Path]:
    """Write the .mo of every language below doctor/locale; returns their paths."""
    made = []
    for po in sorted(home.glob("*/LC_MESSAGES/doctor.po")):
        mo = po.with_suffix(".mo")
        mo.write_bytes(compiled(po.read_bytes()))
        made.append(mo)
    return made
