"""The catalogue of words is complete, and what machines read does not depend on the language."""

import io
import json
import re
import sys
from string import Formatter

import pytest
import update_translations
from babel.messages.pofile import read_po
from rich.cells import cell_len
from rich.text import Text

from doctor.api import check
from doctor.core.messages import _, listed, plural
from doctor.lint.engine import load_rules
from doctor.lint.suppress import OWN_RULES
from doctor.lint.testing import tiny
from doctor.locale import catalogue, compile, rule_pages
from doctor.report import FORMATS, HUMAN, render, screen
from doctor.report.formats import terminal

PO = catalogue.HOME / "zh" / "LC_MESSAGES" / "doctor.po"


def report(tmp_path):
    case = tiny()
    case.down()[3, 5] = 0x7FC0
    return check(case.write(tmp_path / "某模型"), case.recipe)


def fields(text):
    return {part[1] for part in Formatter().parse(text) if part[1] is not None}


def messages():
    """[(English templates, Chinese)] of the catalogue; Chinese is "" where a template has none."""
    found = [m for m in read_po(io.BytesIO(PO.read_bytes())) if m.id]
    return [((m.id, m.string) if isinstance(m.id, str) else (m.id[0], m.string[0])) for m in found]


def test_the_catalogue_has_every_template_of_the_code_and_no_other():
    assert PO.read_bytes() == update_translations.updated(PO), "run: python tools/update_translations.py"


def test_what_a_screen_says_is_translated():
    """Only what findings say may wait for its translation."""
    left = {m.id for m in read_po(io.BytesIO(PO.read_bytes())) if m.id and not m.string}
    catalog = update_translations.extracted()
    assert not [m for m in left if any(name.startswith("doctor/report/") for name, _ in catalog[m].locations)]


def test_a_translation_takes_the_same_values():
    wrong = [english for english, chinese in messages() if chinese and fields(chinese) != fields(english)]
    assert not wrong


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
    for name in HUMAN:
        text = render(name, [found], "zh")
        assert "权重张量里有 NaN 或 Inf" in text, name
        assert "尚不能量化" in text and "量化器都用一组权重的最大、最小值求缩放因子" in text.replace("\n", "").replace(
            " " * 10, ""
        ), name
        assert "8,192 个值中有 1 个 NaN" in text, name


@pytest.mark.parametrize("name", [f for f in FORMATS if f not in HUMAN])
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
    body = Text(
        "一个缩放因子对应连续的输入，有余数时每行最后一组不满，而没有内核能读不满的组（量化器要么停下，要么保留）。"
    )
    for room in range(16, 60):
        lines = [line.plain for line in screen.wrap(screen.console(width=80), body, room)]
        assert "".join(lines) == body.plain
        assert all(cell_len(line) <= room and line[0] not in "，。）" and line[-1] != "（" for line in lines), room


def test_every_page_can_be_shown_in_chinese():
    from doctor.report.pages import show_page, show_rules

    rules = [*load_rules(), *OWN_RULES]
    with catalogue.language("zh"):
        for entry in rules:
            out = io.StringIO()
            show_page(entry, rules, screen.console(out, 80))
            assert (
                rule_pages.heading(entry, "zh")[:6].lower() in out.getvalue().lower() and "为什么要紧" in out.getvalue()
            )
        out = io.StringIO()
        show_rules(rules, screen.console(out, 80))
        assert "张量" in out.getvalue()


def test_a_catalogue_is_compiled_where_the_compiled_one_is_missing_or_old(tmp_path, monkeypatch, capsys):
    """The .mo is used where it was made from the .po beside it; else Babel compiles in memory; without it, that is
    said.
    """
    folder = tmp_path / "zh" / "LC_MESSAGES"
    folder.mkdir(parents=True)
    header = 'msgid ""\nmsgstr "Content-Type: text/plain; charset=utf-8\\n"\n\n'
    po, mo = folder / "doctor.po", folder / "doctor.mo"
    po.write_text(header + 'msgid "one"\nmsgstr "一"\n', encoding="utf-8")
    monkeypatch.setattr(catalogue, "HOME", tmp_path)

    def one():
        catalogue.catalogue.cache_clear()
        return catalogue.translated("one", "zh")

    try:
        assert one() == "一"
        mo.write_bytes(compile.compiled(po.read_bytes()))
        monkeypatch.setitem(sys.modules, "doctor.locale.compile", None)
        assert one() == "一" and not capsys.readouterr().err
        po.write_text(header + 'msgid "one"\nmsgstr "壹"\n', encoding="utf-8")
        assert one() == "一" and "doctor.mo was made from another doctor.po" in capsys.readouterr().err
        mo.unlink()
        assert one() == "one" and "doctor.mo is not there: texts appear in English" in capsys.readouterr().err
        monkeypatch.undo()
        monkeypatch.setattr(catalogue, "HOME", tmp_path)
        assert one() == "壹"
    finally:
        catalogue.catalogue.cache_clear()


def test_messages_are_translated_with_their_values_and_what_is_missing_is_counted():
    rules = plural("{n:,} rule", "{n:,} rules", 3)
    with catalogue.language("zh") as missing:
        assert catalogue.translated(_("{rules} run", rules=rules)) == "运行 3 条规则"
        assert catalogue.translated(listed(["a", _("error"), "c"])) == "a、错误和c"
        assert not missing
        assert catalogue.translated(_("no such {thing}", thing=rules)) == "no such 3 条规则"
        assert catalogue.translated("model.safetensors") == "model.safetensors"
        assert catalogue.translated(plural("{n} unheard", "{n} unheard of", 2)) == "2 unheard of"
        assert dict(missing) == {"no such {thing}": 1, "{n} unheard": 1} == dict(catalogue.untranslated())
    assert catalogue.translated(rules) == "3 rules" and catalogue.translated(rules, "zh") == "3 条规则"
