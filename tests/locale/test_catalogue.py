"""The catalogue of words is complete, and what machines read does not depend on the language."""

import ast
import json
import re
from pathlib import Path
from string import Formatter

import pytest
from rich.cells import cell_len

from doctor.api import check
from doctor.core.finding import CERTAINTIES, SEVERITIES
from doctor.lint.suppress import OWN_RULES
from doctor.lint.engine import load_rules
from doctor.lint.explain import SECTIONS
from doctor.lint.rule import AREAS
from doctor.lint.testing import tiny
from doctor.locale import catalogue, rule_pages
from doctor.report import FORMATS, render
from doctor.report.formats import html, terminal

HOME = Path(catalogue.__file__).parents[1] / "report"
# Said through a variable: names of areas, severities, headings and labels.
NAMED = {
    *html._KV_HEADLINES.values(),
    *(name for _, name in AREAS),
    *SEVERITIES,
    *CERTAINTIES,
    *(title for _, title in SECTIONS),
}


def texts(function):
    """Every constant text that stands in the first argument of a call of `function` in the reports' code and the
    page.
    """
    found = set()
    for path in sorted(HOME.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == function:
                place = node.args[0 if function == "say" else 1]
                found |= {
                    n.value
                    for n in ast.walk(place)
                    if isinstance(n, ast.Constant) and isinstance(n.value, str) and not isinstance(place, ast.JoinedStr)
                }
    page = (HOME / "formats" / "page.html").read_text(encoding="utf-8")
    found |= set(re.findall(rf'\b{function}\({"" if function == "say" else "[^()]*?, "}"([^"]+)"', page))
    return found


def report(tmp_path):
    case = tiny()
    case.down()[3, 5] = 0x7FC0
    return check(case.write(tmp_path / "某模型"), case.recipe)


def fields(text):
    return {name for _, name, _, _ in Formatter().parse(text) if name}


def test_whatever_is_said_has_a_chinese_translation():
    missing = {t for t in texts("say") | NAMED if t not in catalogue.ZH and t not in ("", "as it is")}
    assert not missing
    assert texts("counted") - {"safe fixes"} <= set(catalogue.NOUNS)


@pytest.mark.parametrize("english", sorted(catalogue.ZH))
def test_a_translation_takes_the_same_values(english):
    assert fields(catalogue.ZH[english]) == fields(english)


@pytest.mark.parametrize(
    ("environment", "lang"),
    [
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_TW"}, "zh"),
        ({"LANG": "en_US.UTF-8"}, "en"),
        ({}, "en"),
        ({"LANG": "C"}, "en"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "C"}, "en"),
        ({"LANG": "de_DE", "LC_MESSAGES": "zh_CN"}, "zh"),
        ({"LANG": "zh_CN", "LC_ALL": ""}, "zh"),
    ],
)
def test_the_locale_decides_the_language(environment, lang, monkeypatch):
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert catalogue.from_environment() == lang


def test_chinese_reports_show_title_reason_and_the_exact_message(tmp_path):
    found = report(tmp_path)
    for name in catalogue.HUMAN:
        text = render(name, [found], "zh")
        assert "权重张量里有 NaN 或 Inf" in text, name
        assert "尚不能量化" in text and "量化器都用一组权重的最大、最小值求缩放因子" in text.replace("\n", "").replace(
            " " * 10, ""
        ), name
        assert "1 NaN among 8,192 values of" in text, name


@pytest.mark.parametrize("name", [f for f in FORMATS if f not in catalogue.HUMAN])
def test_machine_formats_do_not_know_the_language(name, tmp_path):
    found = report(tmp_path)
    assert render(name, [found], "zh") == render(name, [found], "en")


def test_the_json_inside_a_chinese_page_is_the_english_report(tmp_path):
    pages = [render("html", [report(tmp_path / lang)], lang) for lang in catalogue.LANGUAGES]
    data = [json.loads(re.search(r'id="doctor-report">(.*?)</script>', page, re.S)[1]) for page in pages]
    assert data[0]["findings"] == data[1]["findings"]


@pytest.mark.parametrize("width", [60, 80, 100, 120])
def test_no_line_of_a_chinese_screen_is_wider_than_the_screen(width, tmp_path):
    found = report(tmp_path)
    with catalogue.language("zh"):
        lines = terminal.render([found], width).splitlines()
    box = [line for line in lines if line[:1] in "╭│╰" and line]
    assert len({cell_len(line) for line in box}) == 1
    assert not [line for line in lines if cell_len(line) > width and "doctor " not in line]


def test_chinese_lines_do_not_begin_with_a_comma():
    body = terminal.Text(
        "一个缩放因子对应连续的输入，有余数时每行最后一组不满，而没有内核能读不满的组（量化器要么停下，要么保留）。"
    )
    for room in range(16, 60):
        lines = [line.plain for line in terminal.wrap(terminal.console(width=80), body, room)]
        assert "".join(lines) == body.plain
        assert all(cell_len(line) <= room and line[0] not in "，。）" and line[-1] != "（" for line in lines), room


def test_every_page_can_be_shown_in_chinese():
    import io

    from doctor.report.pages import show_page, show_rules

    rules = [*load_rules(), *OWN_RULES]
    with catalogue.language("zh"):
        for entry in rules:
            out = io.StringIO()
            show_page(entry, rules, terminal.console(out, 80))
            assert rule_pages.heading(entry, "zh")[:6] in out.getvalue() and "为什么要紧" in out.getvalue()
        out = io.StringIO()
        show_rules(rules, terminal.console(out, 80))
        assert "张量" in out.getvalue()
