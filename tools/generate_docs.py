"""Writes docs/rules/ (a page a rule, and the table), docs/modes.md and the schema of doctor.toml from where their words
stand: the rule files, fixtures/modes.toml and the reader of doctor.toml. `--check` writes nothing and ends 1 where
something is stale.
"""

import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RULES_HEAD = """# Rules

Written by `make docs` from the rule files. Families: F files and tensors, C config.json and tokenizer, W values of
weights, G sizes against the plan, Q the quantizer's run, K the KV cache, O the quantized result. "looks at" is the
cost: listing and header read no weights.

"""


def pages() -> dict[Path, str]:
    """Path -> content of everything generated."""
    from doctor.lint.config_schema import FILE, config_schema_text
    from doctor.lint.engine import load_rules

    rules = load_rules()
    files = {ROOT / "docs" / "rules" / f"{r.code}.md": page(r) for r in rules}
    files[ROOT / "docs" / "rules" / "README.md"] = RULES_HEAD + rule_table(rules, "") + "\n"
    files[ROOT / "docs" / "modes.md"] = modes()
    files[ROOT / "doctor" / "report" / "formats" / FILE] = config_schema_text()
    return files


def modes() -> str:
    """The table of failures and the rules that see them, from fixtures/modes.toml."""
    entries = tomllib.loads((ROOT / "fixtures" / "modes.toml").read_text(encoding="utf-8"))["mode"]
    seen = sum(bool(e["rules"]) for e in entries)
    lines = [
        "# Ways to fail, and the rules that see them",
        "",
        f"{seen} of {len(entries)} have a rule; the others say why not.",
        "",
        "| what fails | rules |",
        "|---|---|",
    ]
    for entry in entries:
        links = ", ".join(f"[{c}](rules/{c}.md)" for c in entry["rules"])
        lines.append(f"| {cell(entry['what'])} | {links or cell('none: ' + entry['why_none'])} |")
    return "\n".join(lines) + "\n"


def rule_table(rules, folder: str) -> str:
    lines = ["| code | name | what is wrong | severity | looks at |", "|---|---|---|---|---|"]
    lines += [
        f"| [{r.code}]({folder}{r.code}.md) | {r.name} | {cell(r.title)} | {r.severity} | {r.cost} |" for r in rules
    ]
    return "\n".join(lines)


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def page(entry) -> str:
    """One rule's page: its docstring's sections as Markdown, in English and then in Chinese."""
    from doctor.lint.explain import code_span
    from doctor.lint.rule import QUOTATION
    from doctor.locale.rule_pages import HEADINGS, heading
    from doctor.locale.rule_pages import page as translated
    from doctor.report.pages import sentence

    parts = [
        f"# {entry.code} {entry.name}",
        f"{sentence(entry.title)}.",
        f"{entry.severity} · {entry.certainty} · {entry.area.lower()} · looks at: {entry.cost}",
    ]
    heads = {
        "Why": "Why it matters",
        "Seen as": "What other tools say",
        "Do": "What to do",
        "False alarms": "When not to worry",
        "Fix safety": "Fix safety",
        "Sources": "Sources",
    }
    for section, head in heads.items():
        if entry.section(section):
            text = (
                QUOTATION.sub(lambda m: f"- {m[1]}: {code_span(m[3])}", entry.section(section))
                if section == "Seen as"
                else entry.section(section)
            )
            parts.append(f"## {head}\n\n{text}")
    chinese = translated(entry.code, "zh")
    if chinese:
        parts.append(f"---\n\n# 中文\uff1a{heading(entry, 'zh')}")
        parts += [
            f"## {head}\n\n{chinese[name]}"
            for name, head in HEADINGS["zh"].items()
            if name in chinese and name != "Title"
        ]
    return "\n\n".join(parts) + "\n"


def main(arguments: list[str]) -> int:
    files = pages()
    folder = ROOT / "docs" / "rules"
    stale = [p for p, text in files.items() if not p.exists() or p.read_text(encoding="utf-8") != text]
    gone = [p for p in folder.glob("*.md") if p not in files]
    if "--check" in arguments:
        for path in [*stale, *gone]:
            print(f"stale: {path.relative_to(ROOT)}")
        return 1 if stale or gone else 0
    folder.mkdir(parents=True, exist_ok=True)
    for path in stale:
        path.write_text(files[path], encoding="utf-8")
    for path in gone:
        path.unlink()
    print(f"{len(stale)} written, {len(gone)} removed")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
