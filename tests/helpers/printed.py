"""Commands that doctor prints: where they are found, and how many of them a test ran."""

import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
RAN: list[tuple[str, str, str]] = []  # (command, where it is printed, what a test did with it)


def texts():
    """(file name, command) of every `doctor …` in code spans and blocks of what people read, each command once."""
    files = [
        ROOT / "README.md",
        ROOT / "README.zh.md",
        *sorted((ROOT / "docs").rglob("*.md")),
        *sorted(ROOT.glob("*.md")),
    ]
    files += [*sorted((ROOT / "rules").rglob("*.py")), *sorted((ROOT / "rules" / "tables").glob("*.toml"))]
    files += [*sorted((ROOT / "doctor").rglob("*.py")), *sorted((ROOT / "doctor" / "locale").rglob("*.md"))]
    files += [*sorted((ROOT / "doctor" / "locale").rglob("*.po"))]
    seen = set()
    for file in files:
        text = file.read_text(encoding="utf-8")
        found = re.findall(r"`(doctor [a-z][^`\n]*)`", text)
        if file.suffix == ".md":
            found += re.findall(r"^(?:    |\$ )(doctor [a-z][^\n#]*)", text, re.MULTILINE)
            found += [
                line
                for block in re.findall(r"```(?:sh|bash|console)?\n(.*?)```", text, re.DOTALL)
                for line in block.splitlines()
                if re.match(r"doctor [a-z]", line)
            ]
        for command in (re.sub(r"\s{2,}.*", "", c).strip() for c in found):
            if command not in seen and "{" not in command:
                seen.add(command)
                yield file.name, command


def record(properties: list, command: str, where: str, did: str) -> None:
    """A test's user_properties take what it did: "run", or "options" where the words name no whole command."""
    properties.append(("printed", (command, where, did)))


def summary(terminalreporter) -> None:
    """How many printed commands a run of the tests ran; with -v each of them."""
    if not RAN:
        return
    counts = Counter(did for _command, _where, did in set(RAN))
    told = ", ".join(f"{n} {did}" for did, n in sorted(counts.items(), reverse=True))
    terminalreporter.write_line(f"printed commands: {len(set(RAN))} found, {told}")
    if terminalreporter.verbosity > 0:
        for command, where, did in sorted(set(RAN), key=lambda row: row[1:]):
            terminalreporter.write_line(f"  {did:8} {where:24} {command}")
