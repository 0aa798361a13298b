"""`doctor render` shows what a command saved as the command itself would have."""

import json
import math
from contextlib import suppress

import pytest

from doctor.cli.main import main
from doctor.core.from_json import rebuilt
from doctor.core.messages import _
from doctor.evaluate.ranking_report import Apart, Contender, Difference, Ranking
from doctor.lint.testing import tiny
from doctor.quant.sweep import Sweep, Trial
from doctor.report.ranking_text import ranking_page
from doctor.report.sweep_text import sweep_page
from doctor.report.table_page import render_table

NAN, NONE = math.nan, (math.nan, math.nan)


def run(capsys, *words: str) -> str:
    with suppress(SystemExit):
        main(list(words))
    return capsys.readouterr().out


def ranking() -> Ranking:
    good = Contender("a", "x/a", "gptq 4-bit g128", 10, 4.5, 0.1, (0.09, 0.11), 0.5, 9.0, 1.1, (1.0, 1.2), 0.9, NONE, 0)
    bad = Contender("b", "x/b", "awq 4-bit g64", 11, 4.6, NAN, NONE, NAN, NAN, NAN, NONE, NAN, NONE, 7)
    apart = Difference("b", Apart(NAN, NONE, NAN, NONE, NAN, NONE), False)
    return Ranking("m", 40, 8.0, "texts of doctor", 4, 512, 2044, [good, bad], [apart], 1.5, {"cpu": "x"}, "9")


def sweep() -> Sweep:
    problem = _("disk: {need} at {place}", need="2.00 GiB", place="/out")
    tried = Trial(
        "g64", "gptq 4-bit g64", True, 0.01, 0.05, "model.layers.0.mlp.up_proj", 10, 4.7, 60.0, 1 << 30, ("Q402",)
    )
    return Sweep("m", 100, (0, 3), [tried, Trial("x", "x", True, NAN, NAN, "", 0, NAN, NAN, 0, (), problem)], "9")


@pytest.mark.parametrize("found, page", [(ranking(), ranking_page), (sweep(), sweep_page)])
def test_a_saved_table_reads_as_it_was_shown(tmp_path, capsys, found, page):
    (tmp_path / "r.json").write_text(page(found).json)
    run(capsys, "render", str(tmp_path / "r.json"), "-f", f"full:{tmp_path / 'r.txt'}", "--lang", "en")
    assert (tmp_path / "r.txt").read_text() == render_table(page(found))
    assert "<table" in run(capsys, "render", str(tmp_path / "r.json"), "-f", "html")


def test_saved_advice_reads_as_it_was_shown_in_another_language_too(tmp_path, capsys):
    model, saved = str(tiny("llama").write(tmp_path / "m")), str(tmp_path / "a.json")
    shown = run(capsys, "advise", model, "--memory", "2GB", "-f", "full", "-f", f"json:{saved}")
    assert run(capsys, "render", saved) == shown and "would not run" in shown
    assert "无法运行" in run(capsys, "render", saved, "--lang", "zh")


def test_a_damaged_result_is_refused_with_the_place(tmp_path, capsys):
    document = json.loads(ranking_page(ranking()).json)
    document["models"][1]["kl_span"] = [1]
    (tmp_path / "r.json").write_text(json.dumps(document))
    with pytest.raises(SystemExit) as end:
        main(["render", str(tmp_path / "r.json")])
    assert end.value.code == 2
    assert "report.models[1].kl_span has 1 values, must have 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "kind, value", [(int, True), (int, "NaN"), (float, "much"), (str, 1), (list[int], "1"), (Apart, [])]
)
def test_a_value_of_another_type_is_no_value(kind, value):
    with pytest.raises(ValueError, match="report"):
        rebuilt(kind, value)
