"""Brings doctor/locale/LANGUAGE/LC_MESSAGES/doctor.po up to date with the code (`make translations`).

A template is the first argument of `_` and `say`, and the first two of `plural` and `counted`, in doctor/, rules/ and
the HTML page, and what a fact says; where it is a choice (`a if c else b`), each of its branches. A translation stays
while its template does; one whose template is gone is dropped. `--check` writes nothing and exits 1 where a catalogue
is out of date.
"""

import ast
import io
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from babel.messages.catalog import Catalog
from babel.messages.extract import extract_from_file
from babel.messages.pofile import read_po, write_po

ROOT = Path(__file__).parents[1]
LOCALE = ROOT / "doctor" / "locale"
KEYWORDS = {"_": None, "say": None, "plural": (1, 2), "counted": (1, 2)}


def python_templates(file, keywords, comment_tags, options) -> Iterator[tuple]:
    """An extraction method for Babel: unlike its own it sees messages in f-strings, and every branch of a choice."""
    for node in ast.walk(ast.parse(file.read())):
        if described := _fact(node):
            yield node.lineno, "_", " ".join(described.split()), []
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        if name in keywords and node.args:
            wanted = len(KEYWORDS[name] or (1,))
            choices = [list(_constants(argument)) for argument in node.args[:wanted]]
            for texts in zip(*choices, strict=False):
                yield node.lineno, name, texts if wanted > 1 else texts[0], []


def _fact(node: ast.AST) -> str:
    """What a fact says, where a node declares one: the last argument of `provide`, the docstring below `@fact`."""
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "provide" and len(node.args) == 4:
        return next(_constants(node.args[3]), "")
    marks = node.decorator_list if isinstance(node, ast.FunctionDef) else []
    declared = any(isinstance(mark, ast.Call) and getattr(mark.func, "id", "") == "fact" for mark in marks)
    return (ast.get_docstring(node) or "") if declared else ""


def _constants(node: ast.expr) -> Iterator[str]:
    if isinstance(node, ast.IfExp):
        yield from _constants(node.body)
        yield from _constants(node.orelse)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value:
        yield node.value


# Tables whose sentences are shown: (file, list of rows, keys).
_TABLES = (
    ("rules/tables/published.toml", "misread", ("what", "cause", "advice")),
    ("rules/tables/quality.toml", "scheme", ("published",)),
)
_METHODS = {".py": python_templates, ".html": "jinja2.ext:babel_extract"}


def sources() -> list[Path]:
    """Every file that may hold templates."""
    found = [*(ROOT / "doctor").rglob("*.py"), *(ROOT / "doctor").rglob("*.html"), *(ROOT / "rules").glob("*.py")]
    return sorted(found)


def extracted() -> Catalog:
    """All templates of the code, without translations; each with the files that say it."""
    catalog = Catalog()
    for path in sources():
        for _line, message, _comments, context in extract_from_file(
            _METHODS[path.suffix], path, KEYWORDS, options={"silent": "false"}
        ):
            catalog.add(message, locations=[(path.relative_to(ROOT).as_posix(), None)], context=context)
    for file, rows, keys in _TABLES:
        for row in tomllib.loads((ROOT / file).read_text(encoding="utf-8")).get(rows, ()):
            for key in (key for key in keys if key in row):
                catalog.add(row[key], locations=[(file, None)])
    return catalog


def updated(po: Path) -> bytes:
    """The text of a catalogue as it must be."""
    catalog = read_po(io.BytesIO(po.read_bytes()), locale=po.parents[1].name)
    fresh = extracted()
    result = Catalog(locale=po.parents[1].name, project="checkpoint-doctor", fuzzy=False, header_comment=_HEADER)
    for message in sorted((m for m in fresh if m.id), key=lambda m: (m.locations, str(m.id))):
        old = catalog.get(message.id[0] if message.pluralizable else message.id)
        string = old.string if old else ""
        if message.pluralizable and isinstance(string, str):
            string = (string,)
        if not message.pluralizable and not isinstance(string, str):
            string = string[0]
        result.add(message.id, string, locations=message.locations)
    out = io.BytesIO()
    write_po(out, result, width=0, omit_header=False, include_lineno=False)
    lines = out.getvalue().decode().splitlines(keepends=True)
    return "".join(x for x in lines if not x.startswith(_VARY)).encode()


_HEADER = "# Messages of doctor. Made by tools/update_translations.py: edit the msgstr alone."
_VARY = tuple(f'"{name}' for name in ("POT-Cr", "PO-Rev", "Last-Tr", "Language-T", "Report-M", "Generated", "Project"))


def main(arguments: list[str]) -> int:
    from doctor.locale.compile import compile_all

    stale = []
    for po in sorted(LOCALE.glob("*/LC_MESSAGES/doctor.po")):
        text = updated(po)
        if text != po.read_bytes():
            stale.append(po)
            if "--check" not in arguments:
                po.write_bytes(text)
        catalog = read_po(io.BytesIO(text))
        left = sum(not any(m.string if m.pluralizable else [m.string]) for m in catalog if m.id)
        print(f"{po.relative_to(ROOT)}: {sum(bool(m.id) for m in catalog)} templates, {left} without a translation")
    if "--check" in arguments:
        return 1 if stale else 0
    compile_all(LOCALE)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
