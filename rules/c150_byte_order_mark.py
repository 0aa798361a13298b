"""C150 byte-order-mark: JSON file starts with a UTF-8 byte order mark (BOM).

Why: Python's reader refuses a text that begins with it, so transformers cannot load the file. Editors on Windows write
it when they save "UTF-8 with BOM".

Seen as:
- Python: `json.decoder.JSONDecodeError: Unexpected UTF-8 BOM (decode using utf-8-sig)`
- transformers: `is not a valid JSON file`

Do: save the file as UTF-8 without a byte order mark.

False alarms: none known.

Fix safety: safe: three bytes are removed, and the values stay. Manual where the rest of the file is not JSON either.

Sources: RFC 8259 section 8.1; CPython Lib/json/__init__.py.
"""

from doctor.lint.rule import CleanJson, Fix, Place, _, finding, rule
from doctor.lint.testing import tiny


@rule("C150", "error")
def byte_order_mark(checkpoint, json_files):
    for name, file in json_files.items():
        if file.bom:
            yield finding(
                _("{file} begins with a byte order mark (EF BB BF)", file=name),
                at=Place(name, byte=0),
                fix=_fix(name, file),
            )


def _fix(name, file):
    if file.broken is not None:
        return Fix(_("save the file as UTF-8 without a byte order mark"), (), "manual")
    # The edit also keeps only one value of a duplicate key (C149).
    return Fix(_("remove the byte order mark"), (CleanJson(name),), "unsafe" if file.duplicates else "safe")


def bad():
    case = tiny()

    def mark(folder):
        path = folder / "config.json"
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())

    case.damage.append(mark)
    return case, "config.json begins with a byte order mark (EF BB BF)"


def good():
    return tiny()
