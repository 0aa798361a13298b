"""`doctor compare`: models of one original are ranked by their divergence, and chance is no rank."""

import json
import math

import pytest
import torch
from click.testing import CliRunner
from noisy_models import noisy

from doctor import compare
from doctor.cli.main import cli
from doctor.core.errors import DoctorError, NotQuantizable
from doctor.evaluate.scores import Tally, TextSums, apart
from doctor.lint.testing import tiny
from doctor.report.ranking_text import ranking_page
from doctor.report.table_page import render_table, table_html, table_markdown

ROWS = {"rows": 8, "context": 48}
SHARES = {"far": 0.3, "near": 0.05, "twin": 0.05}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    original = tiny("llama").write(folder / "original")
    return original, [noisy(folder / name, share, i) for i, (name, share) in enumerate(SHARES.items())]


def test_the_closest_comes_first_and_a_clear_difference_is_told_from_chance(models):
    original, (far, near, twin) = models
    seen = []
    found = compare([far, near, twin], original, progress=lambda *step: seen.append(step), **ROWS)
    assert [m.name for m in found.models][2] == "far" and {"near", "twin"} == {m.name for m in found.models[:2]}
    by_name = {d.name: d for d in found.differences}
    assert by_name["far"].clear and by_name["far"].apart.kl_span[0] > 0
    close = next(d for d in found.differences if d.name != "far")
    assert not close.clear and close.apart.kl_span[0] < 0 < close.apart.kl_span[1]
    assert [m.kl for m in found.models] == sorted(m.kl for m in found.models)
    assert found.rows == 8 and found.tokens == 8 * 47 and found.ok
    assert seen[:2] == [("compare", 1, 2), ("compare", 2, 2)] and seen[-1] == ("score", 8, 8)
    for model in found.models:
        assert model.kl_span[0] < model.kl < model.kl_span[1]
        assert model.ratio_span[0] < model.ratio < model.ratio_span[1]


def test_figures_are_those_of_verify(models):
    from doctor import verify

    original, (_far, near, _twin) = models
    one = verify(original, near, rows=8, context=48, memory=0).extra["comparison"]
    ours = compare([near], original, **ROWS).models[0]
    for name, value in (("kl_mean", ours.kl), ("kl_p99", ours.kl_p99), ("perplexity_quantized", ours.perplexity)):
        assert one[name] == pytest.approx(value, rel=1e-6)
    assert tuple(one["kl_span"]) == pytest.approx(ours.kl_span) and one["top1_agreement"] == ours.top1


def test_the_command_writes_every_format_and_exits_0_for_a_choice(models, tmp_path):
    original, (far, near, _twin) = models
    outputs = [f"{kind}:{tmp_path / kind}" for kind in ("json", "markdown", "html")]
    flags = ["--rows", "8", "--context", "48", "-f", "full", *(x for o in outputs for x in ("-f", o))]
    done = CliRunner().invoke(cli, ["compare", str(far), str(near), "--original", str(original), *flags])
    assert done.exit_code == 0, done.output
    assert "near is closer to its original, by more than the spread" in done.output
    assert "far against near: KL +" in done.output and "larger than the spread" in done.output
    data = json.loads((tmp_path / "json").read_text())
    assert data["schema"] == "doctor.compare/1" and [m["name"] for m in data["models"]] == ["near", "far"]
    assert data["differences"][0]["clear"] is True and data["differences"][0]["kl"] > 0
    assert "| near |" in (tmp_path / "markdown").read_text()
    page = (tmp_path / "html").read_text()
    assert (
        page.startswith("<!DOCTYPE html>")
        and "by more than the spread" in page
        and "://" not in page.split("<script")[0]
    )


def test_nan_is_never_the_closest_and_ends_with_1(models, tmp_path):
    original, (_far, near, _twin) = models
    broken = noisy(tmp_path / "broken", 0.0, spoil="model.layers.1.mlp.down_proj.weight")
    found = compare([broken, near], original, **ROWS)
    assert [m.name for m in found.models] == ["near", "broken"] and not found.ok
    assert math.isnan(found.models[1].kl) and not found.differences[0].clear
    page = ranking_page(found)
    assert page.mark == "error" and "broken: logits with NaN or Inf" in render_table(page)
    assert "broken: not compared" in table_markdown(page) and "NaN" in table_html(page)
    flags = ["--original", str(original), "--rows", "3", "--context", "16"]
    assert CliRunner().invoke(cli, ["compare", str(broken), str(near), *flags]).exit_code == 1


def test_what_cannot_be_compared_is_refused_by_headers(models, tmp_path):
    original, (far, near, _twin) = models
    other = tiny("qwen2").write(tmp_path / "other")
    with pytest.raises((NotQuantizable, DoctorError), match="other"):
        compare([near, other], original)
    with pytest.raises(DoctorError, match="--rows 0: must be 1 or more"):
        compare([near, far], original, rows=0)
    with pytest.raises(DoctorError, match="no quantized model"):
        compare([], original)
    alone = CliRunner().invoke(cli, ["compare", str(near), "--original", str(original)])
    assert alone.exit_code == 2 and "give two quantized models or more" in alone.output


def test_two_of_one_name_are_told_apart_by_their_paths(models, tmp_path):
    original, _ = models
    pair = [noisy(tmp_path / side / "q4", share) for side, share in (("left", 0.05), ("right", 0.3))]
    found = compare(pair, original, rows=2, context=16)
    assert [m.name for m in found.models] == [str(p) for p in pair]
    assert math.isnan(found.models[0].kl_span[0]) and not found.differences[0].clear  # of two rows
    said = render_table(ranking_page(found))
    assert "fewer than 3 rows" in said and "too few rows to tell the models apart" in said
    assert "within the spread" not in said  # of which nothing is known


def test_parts_of_a_row_are_one_row_of_a_spread():
    draw = torch.Generator().manual_seed(0)
    whole, parts = Tally(), Tally()
    for row in range(4):
        a, b, ids = torch.randn(40, 9, generator=draw), torch.randn(40, 9, generator=draw), torch.arange(40) % 9
        whole.add(a, b, ids)
        for at in range(0, 40, 16):
            parts.add(a[at : at + 16], b[at : at + 16], ids[at : at + 16], row)
    assert len(parts.texts) == 4
    for one, other in zip(whole.texts, parts.texts, strict=True):
        assert one == pytest.approx(other)
    assert parts.spread().kl == pytest.approx(whole.spread().kl)


def test_pairing_sees_a_difference_that_the_spreads_of_the_two_hide():
    one, other = Tally(), Tally()
    for i in range(12):  # rows from easy to hard; the second model is worse by a tenth on each
        kl = 10.0 * (i + 1)
        one.texts.append(TextSums(100, 200.0, 200 + kl, kl, 100, 90))
        other.texts.append(TextSums(100, 200.0, 200 + 1.1 * kl, 1.1 * kl, 100, 89))
    found = apart(one, other)
    assert one.spread().kl[1] > other.spread().kl[0] and found.kl_span[0] > 0
    assert found.kl == pytest.approx(0.1 * 0.65) and found.top1 == pytest.approx(-0.01)
    same = apart(one, one)
    assert same.kl == 0 and same.kl_span == (0, 0) and same.ratio == 1
