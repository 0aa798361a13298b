"""What `doctor check` says of a folder of cases: a table of the findings of each and their fixes.

    python tools/list_cases.py CASES [OPTION of check …]

A case is a script that writes a checkpoint, or several, into the directory that is its argument. Where its docstring
names commands, as in "check --runtime vllm --tp 8; --runtime vllm==0.11.0", it is judged by each. Exit code 1 where a
script or a check ends in an error of its own; which finding is right stands in the docstrings.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

PLAN = re.compile(r"((?: ?--(?:runtime|tp|for|group-size|bits) (?!is )[\w=]+(?:\.\w+)*)+)")


def plans_of(script: Path) -> list[list[str]]:
    """The options of each check that a case's docstring names; none where it names no plan, or says "check alone"."""
    text = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    found = [match[1].split() for match in PLAN.finditer(text)]
    alone = not found or "check alone" in text
    return [[]] * alone + [plan for at, plan in enumerate(found) if plan not in found[:at]]


def judged(folder: Path, options: list[str]) -> list[dict] | str:
    """The findings of a check, or the error in which it ends."""
    command = [sys.executable, "-m", "doctor", "check", str(folder), "-f", "json", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        return (done.stderr or done.stdout).strip().splitlines()[-1]
    return [f for f in json.loads(done.stdout)["findings"] if not f.get("consequence_of")]


def rows(script: Path, place: Path, options: list[str]):
    """(command, lines) of each checkpoint of a case."""
    done = subprocess.run([sys.executable, str(script), str(place)], capture_output=True, text=True)
    folders = sorted({path.parent for path in place.rglob("config.json")})
    if done.returncode or not folders:
        yield "", [f"ERROR {(done.stderr.strip().splitlines() or ['it writes no checkpoint'])[-1]}"]
    for folder, own in ((folder, own) for folder in folders for own in plans_of(script)):
        name, plan = folder.relative_to(place).as_posix(), [*own, *options]
        found = judged(folder, plan)
        lines = [f"ERROR {found}"] if isinstance(found, str) else [line(f) for f in found] or ["no finding"]
        yield f"{'' if name == '.' else name + ' '}check {' '.join(plan)}".strip(), lines


def line(found: dict) -> str:
    fix = found.get("fix") or {}
    cure = f"   -> {fix.get('safety')}: {fix.get('title')}" if fix else ""
    return f"{found['severity']} {found['code']} {found['message']}{cure}"


def main() -> int:
    cases, options = Path(sys.argv[1]), sys.argv[2:]
    broken = False
    for script in sorted(cases.glob("*.py")):
        with tempfile.TemporaryDirectory(prefix="doctor-case-") as place:
            for command, lines in rows(script, Path(place), options):
                print(f"{script.stem}: {command}", *(f"    {text}" for text in lines), sep="\n", flush=True)
                broken |= any(text.startswith("ERROR") for text in lines)
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
