"""Codes are links where a terminal makes links of them, and nowhere else."""

import io
import re

import pytest

from doctor.api import check
from doctor.lint.engine import load_rules
from doctor.lint.testing import tiny
from doctor.report import pages
from doctor.report.formats.terminal import show
from doctor.report.screen import console

LINK = re.compile(r"\x1b\]8;[^;]*;(file://[^\x1b]+)\x1b\\+")
TERMINAL = {"TERM": "xterm-256color"}


def screen(work, env, terminal=True):
    file = io.StringIO()
    work(console(file, 100, force_terminal=terminal, _environ=env))
    return file.getvalue()


@pytest.fixture
def found(tmp_path):
    case = tiny("llama")
    case.down()[3, 5] = 0x7FC0
    return lambda out: show(
        [check(case.write(tmp_path / "m") if not (tmp_path / "m").exists() else tmp_path / "m", case.recipe)], out
    )


def test_a_code_links_to_the_file_that_holds_its_page(found):
    links = LINK.findall(screen(found, TERMINAL))
    assert any(x.endswith("/w201_nonfinite_weight.py") for x in links) and all(
        re.match(r"file://[^/]+/", x) for x in links
    )


def test_every_code_of_the_list_is_a_link():
    rules = load_rules()
    links = LINK.findall(screen(lambda out: pages.show_rules(rules, out), TERMINAL))
    assert len(links) == len(rules)


@pytest.mark.parametrize(
    "env, terminal",
    [
        (TERMINAL, False),
        (TERMINAL | {"NO_COLOR": "1"}, True),
        ({"TERM": "dumb"}, True),
        ({"TERM": "linux"}, True),
        ({"TERM": "screen"}, True),
        (TERMINAL | {"CI": "true"}, True),
        (TERMINAL | {"VTE_VERSION": "4205"}, True),
        (TERMINAL | {"FORCE_HYPERLINK": "0"}, True),
    ],
    ids=lambda x: " ".join(x.values()) if isinstance(x, dict) else "",
)
def test_there_is_no_link_in_a_pipe_without_colour_or_where_terminals_garble_it(found, env, terminal):
    assert "\x1b]8" not in screen(found, env, terminal)


def test_links_change_no_visible_character(found):
    bare = re.compile(r"\x1b\]8;[^\x1b]*\x1b\\|\x1b\[[0-9;]*m")
    time = re.compile(r"[\d.]+ s |─+╯")
    assert time.sub("", bare.sub("", screen(found, TERMINAL))) == time.sub(
        "", bare.sub("", screen(found, TERMINAL | {"FORCE_HYPERLINK": "0"}))
    )
