"""What a person watches while a run goes on, and what a log gets."""

import io

from doctor.cli import progress
from doctor.core.messages import _, plural


def line(i, count, n=7):
    done = plural(
        "layer {i} of {count}: {n} linear in {seconds:.1f} s",
        "layer {i} of {count}: {n} linears in {seconds:.1f} s",
        n,
        i=i,
        count=count,
        seconds=1.0,
    )
    return _("{done}, about {clock} left", done=done, clock="9 s")


def test_a_log_gets_every_line_as_it_is():
    said = []
    with progress.run_lines(said.append) as show:
        show("check before: 0 errors")
        show(line(1, 2))
    assert said == ["check before: 0 errors", "layer 1 of 2: 7 linears in 1.0 s, about 9 s left"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_bar_of_layers_with_linears_and_only_lines_that_name_something(monkeypatch):
    terminal, said = Terminal(), []
    monkeypatch.setattr("sys.stderr", terminal)
    for name in ("CI", "TERM", "HF_HUB_DISABLE_PROGRESS_BARS", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    with progress.run_lines(said.append) as show:
        show("check before: 0 errors")
        for i in range(1, 4):
            show(line(i, 3))
        show(_("{done}; damp raised: {names}", done=line(3, 3), names="mlp.down_proj"))
    assert [str(text)[:12] for text in said] == ["check before", "layer 3 of 3"]
    assert "28 linears" in terminal.getvalue() and "3/3" in terminal.getvalue()
