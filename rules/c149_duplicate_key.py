"""C149 duplicate-key: a config file states one key twice.

Why: readers keep the last value without a word, and the other one is what a person may have seen and believed.

Do: delete one of the two.

False alarms: none known.

Fix safety: safe where both values are equal; unsafe where they differ: the last one, which readers take, is kept.
Manual in a file of more than 1 MiB.

Sources: RFC 8259 section 4: names should be unique.
"""

from doctor.lint.rule import CleanJson, Fix, Place, finding, rule
from doctor.lint.testing import tiny

READ = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "quantize_config.json",
)


@rule("C149", "warning")
def duplicate_key(checkpoint, json_files):
    for name in READ:
        file = json_files.get(name)
        if file is None or file.value is None:
            continue
        fix = _fix(name, file)
        for key in file.duplicates:
            yield finding(
                f"{name} states {key!r} twice in one object; the last one counts",
                at=Place(name, pointer=_pointer(file, key)),
                evidence={"key": key},
                fix=fix,
            )


def _fix(name, file):
    """Keep what readers take, in the whole file: the second reading of a key is not a place of its own."""
    if not file.duplicates or file.doc is None:
        return Fix("delete one of the two", (), "manual")
    return Fix(
        "keep the last value of each key, which readers take",
        (CleanJson(name),),
        "unsafe" if file.doc.unlike else "safe",
    )


def _pointer(file, key):
    """Where the key stands, None where the text is too large for places."""
    return next((p for p in (file.doc.duplicates if file.doc else ()) if p.rsplit("/", 1)[-1] == key), None)


def bad():
    case = tiny()
    case.damage.append(_repeat)
    return case, "config.json states 'model_type' twice in one object; the last one counts"


def _repeat(folder):
    path = folder / "config.json"
    path.write_text(path.read_text().replace("{", '{\n  "model_type": "gpt2",', 1))


def good():
    return tiny()
