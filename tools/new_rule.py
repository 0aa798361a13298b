"""Starts a rule: writes rules/CODE_name.py with every part that a rule has. CONTRIBUTING.md leads through the rest.

    python tools/new_rule.py                              the families, and the next free code of each
    python tools/new_rule.py C190 zero-initializer-range       the file of one rule

What stands in capitals is to be filled in. The tests of the rule fail until it is.
"""

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = {
    "F": "files, headers and tensors against config.json",
    "C": "config.json and the tokenizer",
    "W": "values of weights",
    "G": "sizes against the plan and the runtime",
    "Q": "the quantizer's own run",
    "K": "the KV cache",
    "O": "the quantized result",
}
TEMPLATE = '''"""{code} {name}: WHAT IS WRONG, IN AT MOST 70 CHARACTERS.

Why: WHAT FOLLOWS FROM IT, AND WHERE.

Seen as:
- TOOL: `THE EXACT ERROR THAT IT PRINTS`

Do: WHAT TO DO BY HAND.

False alarms: WHEN NOT TO WORRY.

Fix safety: manual; WHY NOTHING CAN DO IT SAFELY.

Sources: OWNER/REPOSITORY PATH, OR A PAPER'S SECTION.
"""

from doctor.lint.rule import _, finding, rule
from doctor.lint.testing import tiny


@rule("{code}", "{severity}"{certainty})
def {function}({scope}{facts}):
    if False:  # WHAT IS WRONG; `doctor facts` lists what to ask for
        yield finding(_("{{what}}: WHAT IT IS; WHAT IT MUST BE", what={scope}))


def bad():
    case = tiny()
    # SPOIL ONE THING
    return case, "THE WHOLE MESSAGE OF THE FINDING"


def good():
    return tiny()
'''


def next_codes(folder: Path) -> dict[str, str]:
    """Family letter -> the code after the last one in use: codes are never used again."""
    taken = [path.name[:4].upper() for path in folder.glob("[a-z][0-9][0-9][0-9]_*.py")]
    return {f: f"{f}{max((int(c[1:]) for c in taken if c[0] == f), default=0) + 1:03}" for f in FAMILIES}


def write(folder: Path, code: str, name: str, severity: str, scope: str, facts: list[str]) -> Path:
    """The new file. Raises SystemExit for a code or name that no rule can have, or that one has already."""
    if not re.fullmatch(f"[{''.join(FAMILIES)}][0-9]{{3}}", code):
        raise SystemExit(f"{code}: a code is one of {', '.join(FAMILIES)} and three digits.")
    if not re.fullmatch("[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise SystemExit(f"{name}: a name is lower-case words with hyphens, and reads after `allow`.")
    for other in folder.glob("[a-z][0-9][0-9][0-9]_*.py"):
        if other.stem[:4].upper() == code or other.stem[5:] == name.replace("-", "_"):
            raise SystemExit(
                f"{other.name} is there already; the next free codes: {', '.join(next_codes(folder).values())}."
            )
    path = folder / f"{code.lower()}_{name.replace('-', '_')}.py"
    text = TEMPLATE.format(
        code=code,
        name=name,
        severity=severity,
        certainty="" if severity == "error" else ', certainty="likely"',
        function=name.replace("-", "_"),
        scope=scope,
        facts="".join(f", {fact}" for fact in facts),
    )
    path.write_text(text, encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("code", nargs="?", help="such as C190; none lists the free ones")
    parser.add_argument("name", nargs="?", help="the defect in lower-case words, such as zero-initializer-range")
    parser.add_argument("facts", nargs="*", help="what the rule asks for, by the names of `doctor facts`")
    parser.add_argument("--severity", choices=("error", "warning", "info"), default="warning")
    parser.add_argument("--scope", choices=("checkpoint", "shard", "tensor", "linear"), default="checkpoint")
    parser.add_argument("--into", type=Path, default=ROOT / "rules", metavar="DIR", help="another folder of rules")
    options = parser.parse_args()
    if options.code is None or options.name is None:
        for family, code in next_codes(options.into).items():
            print(f"{code}   {FAMILIES[family]}")
        sys.exit(0)
    path = write(options.into, options.code, options.name, options.severity, options.scope, options.facts)
    print(f"Wrote {path}. Fill in what stands in capitals.")


if __name__ == "__main__":
    main()
