"""Rule pages in Chinese: whole where they are there, quoting only what the English page quotes."""

import re

import pytest

from doctor.lint.engine import load_rules
from doctor.lint.suppress import OWN_RULES
from doctor.locale.rule_pages import HEADINGS, HERE, heading, markdown, page, section

RULES = {r.code: r for r in (*load_rules(), *OWN_RULES)}
TRANSLATED = sorted(p.stem for p in (HERE / "zh" / "rules").glob("*.md"))


def test_every_page_belongs_to_a_rule():
    assert set(TRANSLATED) <= set(RULES) and len(TRANSLATED) >= 141


@pytest.mark.parametrize("code", TRANSLATED)
def test_a_chinese_page_is_whole(code):
    entry, chinese = RULES[code], page(code, "zh")
    english = " ".join(entry.doc.split())
    for name, title in HEADINGS["zh"].items():
        text = chinese.get(name, "")
        assert re.search("[\u4e00-\u9fff]", text), f"{code} has no section {title}, the Chinese of {name}"
        assert not re.search("[\u4e00-\u9fff] ?[,;:!?(]", text), f"{code} {title}: ASCII punctuation after Chinese"
        for quoted in re.findall("`([^`]+)`", " ".join(text.split())):
            assert quoted in english, f"{code} {title}: `{quoted}` stands nowhere on the English page"


def test_a_rule_without_a_page_is_shown_in_english():
    entry = RULES["W201"]
    from dataclasses import replace

    other = replace(entry, code="W299")
    assert page("W299", "zh") == {} and heading(other, "zh") == entry.title
    assert section(other, "Why", "zh") == entry.section("Why") and entry.section("Why") in markdown(other, "zh")
