"""C149 duplicate-key: duplicate key in a config file.

Why: readers silently keep the last value, while a person may have read the other one.

Do: delete one of the two.

False alarms: none known.

Fix safety: safe where both values are equal. Unsafe where they differ: the last one, which readers use, is kept. Manual
in a file of more than 1 MiB.

Sources: RFC 8259 section 4: names should be unique.
"""

from doctor.lint.rule import CleanJson, Fix, Place, _, finding, rule
from doctor.lint.testing import tiny

READ = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "quantize_config.json",
)


MOST = 20  # keys of a file that are findings of their own; the fix of any takes them all


@rule("C149", "warning")
def duplicate_key(checkpoint, json_files):
    for name in READ:
        file = json_files.get(name)
        if file is None or file.value is None:
            continue
        fix = _fix(name, file)
        for key in file.duplicates[:MOST]:
            yield finding(
                _("{file} has the key {key!r} twice in one object; readers keep the last", file=name, key=key),
                at=Place(name, pointer=_pointer(file, key)),
                evidence={"key": key},
                fix=fix,
            )
        if len(file.duplicates) > MOST:
            more = len(file.duplicates) - MOST
            yield finding(
                _("{file} has {n:,} more keys twice in one object", file=name, n=more), at=Place(name), fix=fix
            )


def _fix(name, file):
    """Keep the values that readers use, in the whole file: one edit covers all its duplicate keys."""
    if not file.duplicates or file.doc is None:
        return Fix(_("delete one of the two"), (), "manual")
    return Fix(
        _("keep the last value of each key, which readers take"),
        (CleanJson(name),),
        "unsafe" if file.doc.unlike else "safe",
    )


def _pointer(file, key):
    """JSON pointer of the key; None where the file is too large to be indexed."""
    return next((p for p in (file.doc.duplicates if file.doc else ()) if p.rsplit("/", 1)[-1] == key), None)


def bad():
    case = tiny()
    case.damage.append(_repeat)
    return case, "config.json has the key 'model_type' twice in one object; readers keep the last"


def _repeat(folder):
    path = folder / "config.json"
    path.write_text(path.read_text().replace("{", '{\n  "model_type": "gpt2",', 1))


def good():
    return tiny()
