"""A preflight quantizes two decoder layers, writes nothing, and says what would fail and how long the rest takes."""

import json
import random

import numpy as np
import pytest

from doctor import api
from doctor.cli.main import main
from doctor.core.recipe import Recipe
from doctor.lint.testing import encode, tiny
from doctor.quant import budget, preflight

RECIPE = Recipe(group_size=32)


@pytest.fixture
def text(tmp_path):
    rng = random.Random(0)
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "\n".join(json.dumps({"input_ids": [1] + [rng.randrange(3, 96) for _ in range(63)]}) for _ in range(64))
    )
    return path


def flown(case, tmp_path, text, recipe=RECIPE):
    case.write(tmp_path / "m")
    return api.quantize(tmp_path / "m", tmp_path / "o", recipe, calibration=text, max_seq_length=64, preflight=True)


def test_it_quantizes_the_first_and_the_last_layer_and_writes_nothing(tmp_path, text):
    result = flown(tiny("llama"), tmp_path, text)
    forecast = result.forecast
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "rows.jsonl"] and result.output is None
    assert {r["block"] for r in result.linears} == {0, 1} and {r["outcome"] for r in result.linears} == {"gptq"}
    assert (forecast.tried, forecast.tried_rows, forecast.rows, forecast.problems) == ((0, 1), preflight.ROWS, 64, ())
    assert result.report.ok and 0 < forecast.seconds < 600
    text = "\n".join(forecast.lines())
    assert (
        "layer 2 got the outputs of layer 1, not its own inputs" in text
        and "measured on layer 1 and 2 of 2 with 32 of 64 rows" in text
    )


def test_what_would_fail_hours_later_fails_now(tmp_path, text):
    case = tiny("llama")
    case.tensors["model.layers.1.input_layernorm.weight"][:] = encode(np.full(64, 3e38), "BF16")
    result = flown(case, tmp_path, text)
    assert not result.report.ok and "Q401" in {f.code for f in result.report.findings}
    assert any(line.startswith("would fail: ") for line in result.forecast.lines())


def test_rtn_takes_no_rows(tmp_path, text):
    forecast = flown(tiny("llama"), tmp_path, text, Recipe(method="rtn", group_size=32)).forecast
    assert (forecast.rows, forecast.need.hidden, forecast.need.hessians) == (0, 0, 0)


def test_time_grows_with_layers_and_with_rows(tmp_path, text, monkeypatch):
    """Half the rows tried and two of two layers: forwards count double, solving counts once."""
    case = tiny("llama")
    case.write(tmp_path / "m")
    from doctor.checkpoint.directory import Checkpoint
    from doctor.model.spec import build_spec
    from doctor.quant.job import Result

    checkpoint = Checkpoint.open(tmp_path / "m")
    records = [{"seconds": 3.0}, {"seconds": 1.0}]
    monkeypatch.setattr(preflight, "try_layers", lambda *a, **k: (Result(Recipe(), tuple(records)), [5.0, 3.0]))
    spec = build_spec(checkpoint.value("config.json"), checkpoint.tensors)
    forecast, _ = preflight.preflight(
        checkpoint,
        spec,
        RECIPE,
        tmp_path / "o",
        [[1] * 8] * 64,
        None,
        [],
        memory=None,
        device="cpu",
        around=10.0,
        progress=print,
    )
    # 4 s of solving, and 4 s of forwards that would be 8 with all rows: 6 a layer. Opening: the clock ran less than
    # the 8 s claimed.
    assert forecast.seconds == pytest.approx(10 + 2 * 6 - 2 * 8, abs=0.5)


def test_the_command_line_prints_it_and_exits_by_it(tmp_path, text, capsys):
    tiny("llama").write(tmp_path / "m")
    args = [
        "quantize",
        str(tmp_path / "m"),
        "-o",
        str(tmp_path / "o"),
        "--group-size",
        "32",
        "--calibration",
        str(text),
        "--max-seq-length",
        "64",
    ]
    with pytest.raises(SystemExit) as ended:
        main([*args, "--preflight"])
    out = capsys.readouterr().out
    assert (
        ended.value.code == 0
        and "\ntime    about " in out
        and "memory  " in out
        and "\nGPU     up to " in out
        and "disk    " in out
    )
    with pytest.raises(SystemExit) as ended:
        main([*args, "--plan", "--memory", "100MB"])
    out = capsys.readouterr().out
    assert ended.value.code == 1 and "would fail: memory: " in out and "time" not in out


def test_a_plan_states_the_memory_in_which_the_model_writes_rows(tmp_path):
    folder = tiny("llama").write(tmp_path / "m")
    options = {"recipe": RECIPE, "rows": 64, "max_seq_length": 32}
    whole = api.plan_quantize(folder, tmp_path / "o", **options)
    line = next(x for x in whole.lines() if "writes a part of the calibration rows" in x)
    assert whole.peak >= whole.sampling > budget.constant() and f"{whole.sampling / 2**30:.2f} GiB" in line
    given = api.plan_quantize(folder, tmp_path / "o", **options, calibration="rows.jsonl")
    assert given.sampling == 0 and not any("writes a part" in x for x in given.lines())
    assert (
        api.plan_quantize(folder, tmp_path / "o", **options, memory=whole.sampling - 1).sampling == 0
    )  # then it writes none
