"""Whatever of an error stands in a terminal, `doctor explain` leads to the rule that tells its cause, and unrelated errors to none."""

import re
import tomllib
from pathlib import Path

import pytest

from doctor import explain
from doctor.engine import load_rules

RULES = load_rules()
DATA = tomllib.loads((Path(__file__).parents[1] / "fixtures" / "errors.toml").read_text(encoding="utf-8"))
ERRORS = [(e["text"], e["rules"]) for e in DATA["error"]]


def first_three(text):
    return [m.rule.code for m in explain.search(text, RULES)][:3]


def other_numbers(text):
    """The same message of another model: layers, sizes and orders differ; a count that is part of the wording stays."""
    fixed = re.compile(r"= 128|= 64|by 256|10%|\(2\)|\(3\)|1\.0 for|token-0|== 0|< 0|F16|e4m3")
    kept = [m.span() for m in fixed.finditer(text)]
    return re.sub(r"(?<![\w.-])\d+(?!\w)|(?<=layers\.)\d+", lambda m: m[0] if any(a <= m.start() < b for a, b in kept) else str(int(m[0]) + 7), text)


def in_a_log(text):
    return "\n".join(["INFO 11-23 19:00:01 [loader.py:42] Loading weights took 3.21 seconds", "Traceback (most recent call last):",
                      '  File "/opt/venv/lib/python3.12/site-packages/engine/worker.py", line 1021, in load_model',
                      "    self.model = build(config)", f"(Worker pid=4711) ERROR 11-23 19:00:02 [worker.py:7] {text}", ""])


@pytest.mark.parametrize("text, rules", ERRORS, ids=[t[:40] for t, _ in ERRORS])
def test_the_rule_is_among_the_first_three(text, rules):
    assert set(first_three(text)) & set(rules), first_three(text)


@pytest.mark.parametrize("text, rules", ERRORS, ids=[t[:40] for t, _ in ERRORS])
def test_numbers_of_another_model_and_a_log_around_it_change_nothing(text, rules):
    log = in_a_log(other_numbers(text))
    assert set(first_three(log)) & set(rules), first_three(log)


@pytest.mark.parametrize("text, rules", ERRORS, ids=[t[:40] for t, _ in ERRORS])
def test_the_last_line_with_its_exception_is_enough(text, rules):
    line = text if re.match(r"^\w*Error: |^!", text) else f"RuntimeError: {text}"
    assert set(first_three(f"/data/models/my-model-7b: {line}")) & set(rules), first_three(line)


@pytest.mark.parametrize("text", [u["text"] for u in DATA["unrelated"]], ids=lambda t: t[:40])
def test_an_error_of_something_else_leads_to_no_rule(text):
    assert first_three(text) == []
    assert first_three(in_a_log(text)) == []


def test_every_rule_that_the_data_names_exists():
    assert {c for _, rules in ERRORS for c in rules} <= {r.code for r in RULES}


def test_every_way_to_fail_has_rules_that_exist_or_a_reason():
    modes = tomllib.loads((Path(__file__).parents[1] / "fixtures" / "modes.toml").read_text(encoding="utf-8"))["mode"]
    codes = {r.code for r in RULES}
    for mode in modes:
        assert set(mode["rules"]) <= codes, mode
        assert bool(mode["rules"]) != bool(mode.get("why_none")), mode
