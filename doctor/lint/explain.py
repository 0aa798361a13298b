"""From an error message, or a whole log, to the rules that find its cause.

Each rule quotes in `seen_as` what other tools print for its defect. A pasted message differs from the quotation in
numbers, names and paths, so both are reduced to the same words first. A quotation that stands in the text is a match;
else the share of its words (rare ones weigh more) that one line has decides. This is a look-up: it says which check
would tell, never that the defect is there.

Some messages come from no file of a checkpoint: two versions that do not fit, a full disk. rules/tables/elsewhere.toml
holds those, each with its cause and its way out.
"""

import difflib
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from doctor.core.facts import COSTS
from doctor.core.tables import table
from doctor.lint.readings import read
from doctor.lint.rule import Rule, Seen

# Share of a quotation's weight that one line must have. Measured on fixtures/errors.toml: the messages of other causes
# reach 0.65 ("out of resource: shared memory" resembles "CUDA out of memory"), the rules' own 0.98 and more.
ENOUGH = 0.7
WHOLE = 0.95  # a quotation that was found whole
MAX_LINES = 4000  # of a log, the last ones: the error stands at its end
_ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)")
_FRAME = re.compile(r"[\u2500-\u257f❱]+")  # of the boxes that tracebacks are drawn in
_PATH = re.compile(r"(?:[A-Za-z]:)?(?:[\\/][\w.@+~-]+){2,}[\\/]?")
_PLACEHOLDER = re.compile(r"\{[^{}]*\}|<[^<>]{1,40}>|%[-0-9.]*[sdfrxg]|…|\.\.\.")
_NUMBER = re.compile(r"[-+]?\b(?:0x[0-9a-f]+|\d+(?:[.,]\d+)*(?:e[-+]?\d+)?)\b")
_WORD = re.compile(r"[a-z_][a-z0-9_]*|#")
# Two numbers that are part of the wording: a matrix that fails at its first row fails for another reason than one that
# fails late.
_FIRST = (re.compile(r"\border 1\b(?![.,]?\d)"), "order one"), (re.compile(r"\[0\]"), "[zero]")
# Of Python, whatever the cause.
_PHRASES = re.compile(
    r"object has no attribute|missing # required positional arguments?|(?:list|tuple|string) index out of range"
    r"|no such file or directory"
)
# What stands before the message itself. Without its "KeyError:" the name of a key is a word like any other.
_HEAD = re.compile(r"^(?!keyerror)(?:[\w.]*(?:error|exception|warning)|assert(?:ion)?)\s*:?\s*")
_MINOR = re.compile(r"leading minor of order (\d+)|\b(\d+)-th leading minor|U\((\d+), ?\3\) is zero", re.I)
_STAMP = re.compile(
    r"^\s*(?:\[[^\]]{0,60}\]\s*|\(\w+ pid=[^)]*\)\s*|\d{4}-\d\d-\d\d[t "
    r"][\d:.,z+]*\s*|(?:info|error|warning|debug)(?:\s*:\s*|\s+(?=[#\[]|\d\d)))+"
)


@dataclass(frozen=True)
class Match:
    """A rule whose quotation the text resembles. score: 1 for a quotation found whole, else the share of its words.

    at: the line's number among those that were searched. read: found by what its names and numbers mean, not by a
    quotation.
    """

    rule: Rule
    seen: Seen
    score: float
    line: str
    at: int = 0
    read: bool = False


@dataclass(frozen=True)
class Elsewhere:
    """A known message whose cause lies in no checkpoint. do: what helps."""

    tool: str
    cause: str
    do: str
    line: str
    score: float
    at: int


def normal(text: str) -> str:
    """Lower case, one blank between words, and # for every number, path, quoted value and placeholder."""
    text = _FRAME.sub(" ", _ANSI.sub("", text)).lower()
    for number, word in _FIRST:
        text = number.sub(word, text)
    text = _PLACEHOLDER.sub(" # ", text)
    text = _PATH.sub(" # ", text)
    text = _NUMBER.sub("#", text)
    text = re.sub("[\"'`\u2018\u2019\u201c\u201d]", "", text)
    return re.sub(r"#(?:[\s,x×]*#)+", "#", re.sub(r"\s+", " ", text)).strip(" .:()")


def find(word: str, rules: Iterable[Rule]) -> Rule | None:
    """The rule of a code or a name, in any case; None where there is none."""
    wanted = word.strip().lower()
    return next((r for r in rules if wanted in (r.code.lower(), r.name)), None)


def search(text: str, rules: Iterable[Rule]) -> list[Match]:
    """Rules whose quoted messages the text holds or resembles, best first, and among equals the one that costs least to
    check.

    What the names and numbers of the text say (readings.py) comes before what its words resemble. One match per rule;
    [] for none.
    """
    rules = list(rules)
    log = _Log(text)
    weights = _weights(seen.text for r in rules for seen in r.seen_as)
    best: dict[str, Match] = {}
    for entry in rules:
        for seen in entry.seen_as:
            score, at = log.score(seen.text, weights)
            match = Match(entry, seen, score, log.lines[at].strip() if log.lines else "", at)
            if score >= ENOUGH and (entry.code not in best or _rank(match) > _rank(best[entry.code])):
                best[entry.code] = match
    found = sorted(best.values(), key=lambda m: (*(-x for x in _rank(m)), COSTS.index(m.rule.cost), m.rule.code))
    reading = read(text)
    if reading is None or (reading.symptom and found and found[0].score >= WHOLE):
        return found
    by_code = {r.code: r for r in rules}
    meant = [
        Match(by_code[code], Seen("", reading.line), 1.0, reading.line, reading.at, read=True)
        for code in reading.rules
        if code in by_code
    ]
    return meant + [m for m in found if m.rule.code not in (*reading.rules, *reading.unlike)]


def elsewhere(text: str, lang: str = "en") -> Elsewhere | None:
    """What a message means that no checkpoint causes: the last one that stands in the text whole; None for none."""
    log, found = _Log(text), None
    for entry in table("elsewhere")["message"]:
        for quote in entry["texts"]:
            score, at = log.score(quote, {})
            if score >= WHOLE and (found is None or (score, at) > (found.score, found.at)):
                cause, do = (entry.get(f"{key}_{lang}", entry[key]) for key in ("cause", "do"))
                found = Elsewhere(entry["tool"], cause, do, log.lines[at].strip(), score, at)
    return found


def minor(text: str) -> int | None:
    """The order of the leading minor at which a Cholesky factorization failed, from 1, of the last one in the text;
    None for none.
    """
    found = _MINOR.findall(_ANSI.sub("", text))
    return int(next(filter(None, found[-1]))) if found else None


def _rank(match: Match) -> tuple[float, int, int]:
    """The error stands at the end of a log. Of two quotations found whole the longer one says more; of resemblances
    none does.
    """
    return match.score, match.at, len(normal(match.seen.text)) if match.score >= WHOLE else 0


def _weights(quotes: Iterable[str]) -> dict[str, float]:
    """Word -> how much it tells: words that stand in many quotations tell little; numbers tell nothing."""
    bags = [set(_words(normal(quote))) for quote in quotes]
    seen = Counter(w for bag in bags for w in bag)
    return {w: math.log((len(bags) + 1) / n) + 0.1 for w, n in seen.items()}


def _words(line: str) -> list[str]:
    return [w for w in _WORD.findall(_PHRASES.sub(" ", line)) if w != "#"]


class _Log:
    """The lines of a text that are searched, reduced to words once for all quotations."""

    def __init__(self, text: str):
        self.lines = [line for line in text.splitlines() if line.strip()][-MAX_LINES:]
        self.tidy = [_STAMP.sub("", normal(line)) for line in self.lines]
        self.words = [Counter(_words(line)) for line in self.tidy]
        self.joined = " ".join(self.tidy)

    def score(self, text: str, weights: dict[str, float]) -> tuple[float, int]:
        """(score, index of the line) of the best place of one quotation."""
        quote = normal(text)
        bare = _HEAD.sub("", quote)
        for wanted, score in ((quote, 1.0), (bare, 0.98)):
            enough = len(wanted) >= (
                8 if wanted is quote else 12
            )  # of a shorter one only a line of its own is the message
            for at in range(len(self.tidy) - 1, -1, -1):
                if (enough and wanted in self.tidy[at]) or (wanted is quote and wanted == self.tidy[at]):
                    return score, at
        if len(bare) >= 16 and bare in self.joined:  # wrapped over lines
            return 0.95, len(self.lines) - 1
        want = Counter(_words(quote))
        return max(
            (
                (_overlap(bare, want, line, have, weights), at)
                for at, (line, have) in enumerate(zip(self.tidy, self.words, strict=True))
            ),
            default=(0.0, 0),
        )


def _overlap(bare: str, want: Counter, line: str, have: Counter, weights: dict[str, float]) -> float:
    rest = _HEAD.sub("", line)
    if len(rest) >= 12 and len(rest.split()) >= 2 and rest in bare:  # a part of the message was pasted
        return 0.7 + 0.25 * len(rest) / len(bare)
    if len(want) < 2:
        return 0.0
    total = sum(weights.get(w, 0) * n for w, n in want.items())
    shared = [w for w in want if w in have]
    got = sum(weights.get(w, 0) * min(want[w], have[w]) for w in shared)
    # Two words in common are chance; half of the line being about something else is too.
    return 0.94 * got / total if total and len(shared) >= 3 else 0.0


def nearest(text: str, rules: Iterable[Rule], most: int = 3) -> list[Rule]:
    """Rules by shared words with code, name, title and quotations, for a text that matches none."""
    rules = list(rules)
    words = set(_WORD.findall(normal(text))) - {"#"}
    bags = {
        r.code: set(_WORD.findall(normal(" ".join([r.name.replace("-", " "), r.title, *(s.text for s in r.seen_as)]))))
        - {"#"}
        for r in rules
    }
    common = Counter(w for bag in bags.values() for w in bag)

    def rank(entry: Rule) -> float:
        shared = sum(1 / common[w] for w in words & bags[entry.code])
        return shared + difflib.SequenceMatcher(None, text.lower()[:60], entry.name).ratio() * 0.5

    return sorted(rules, key=lambda r: (-rank(r), r.code))[:most]


def decider(entry: Rule) -> str:
    """The command that tells whether this rule's defect is there."""
    if "machine" in entry.needs:
        return "doctor quantize CKPT -o OUT --plan"
    if entry.cost in ("listing", "header", "tokenizer"):
        return f"doctor check CKPT --select {entry.code} --stage {entry.cost}"
    if entry.cost == "values":
        return f"doctor check CKPT --select {entry.code}"
    if entry.cost == "output":
        return "doctor verify CKPT QUANTIZED --text FILE"
    return "doctor quantize CKPT -o OUT --calibration FILE"


def relatives(entry: Rule, rules: Iterable[Rule], most: int = 4) -> list[Rule]:
    """Rules that explain it, that it explains, or that end in the same message elsewhere."""
    quotes = {normal(s.text) for s in entry.seen_as}
    found = [
        r
        for r in rules
        if r.code != entry.code
        and (r.code in entry.implied_by or entry.code in r.implied_by or quotes & {normal(s.text) for s in r.seen_as})
    ]
    return found[:most]


SECTIONS = (
    ("Why", "Why it matters"),
    ("Do", "Ways out"),
    ("False alarms", "When not to worry"),
    ("Fix safety", "How safe the fix is"),
    ("Sources", "Sources"),
)


def code_span(text: str) -> str:
    """Markdown's inline code, between as many backticks as the text needs."""
    fence = "`"
    while fence in text:
        fence += "`"
    pad = " " if text[:1] == "`" or text[-1:] == "`" else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def paragraphs(text: str) -> list[str]:
    """A section's text with its line breaks undone: paragraphs and list items, one string each."""
    out: list[str] = []
    for block in text.split("\n\n"):
        for line in block.splitlines():
            bullet = line.lstrip().startswith(("- ", "* "))
            if bullet or not out or out[-1] == "":
                if out and out[-1] == "":
                    out.pop()
                out.append(line.strip())
            else:
                out[-1] += " " + line.strip()
        out.append("")
    return [p for p in out if p]
