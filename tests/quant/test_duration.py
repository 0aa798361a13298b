"""How long a run takes is said before it begins: work from headers over rates that are measured here."""

import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
from plan import dense

from doctor import api
from doctor.core.recipe import Recipe
from doctor.lint.testing import tiny
from doctor.quant.duration import steps
from doctor.quant.rates import Rates, measured
from doctor.quant.tuning.wanted import AUTO, OFF, comparing_work

SPEC = tiny("llama").spec
RECIPE = Recipe(group_size=32)
RATES = Rates(wide=1e9, narrow=1e8, solving=1e9, reading=1e9, writing=1e8)
ASKED = {
    "source": 10**9,
    "output": 10**8,
    "rows": 64,
    "length": 512,
    "sampled": 640,
    "trained": 8,
    "through": 4,
    "a_step": 4,
    "compared": 4,
}


def seconds(rates=RATES, **changes):
    return {str(step.name): step.seconds for step in steps(SPEC, RECIPE, rates, **{**ASKED, **changes})}


def test_each_step_grows_with_what_it_depends_on_alone():
    before = seconds()
    assert len(before) == 7 and all(0 < x < math.inf for x in before.values())
    for change, step in (
        ({"rows": 128}, "outputs and Hessians of all layers"),
        ({"sampled": 1280}, "rows that the model writes"),
        ({"compared": 8}, "comparing it with the original"),
    ):
        after = seconds(**change)
        assert [name for name in after if after[name] != before[name]] == [step]
        assert after[step] == pytest.approx(2 * before[step])


def test_what_is_not_done_or_not_known_is_no_step():
    assert "tuning of scales" not in seconds(trained=0) and "rows that the model writes" not in seconds(sampled=0)
    unknown = seconds(replace(RATES, writing=0.0, reading=0.0, solving=0.0, narrow=0.0))
    assert list(unknown) == [
        "start, check and rehearsal",
        "outputs and Hessians of all layers",
        "tuning of scales",
        "comparing it with the original",
    ]


def test_rates_are_measured_in_two_seconds_and_leave_nothing(tmp_path):
    from doctor.checkpoint.directory import Checkpoint

    checkpoint = Checkpoint.open(tiny("llama").write(tmp_path / "m"))
    began = time.process_time()
    found = measured(checkpoint, SPEC, RECIPE, tmp_path / "out", 16)
    assert time.process_time() - began < 6  # 2 where nothing else runs
    assert all(0 < rate < math.inf for rate in vars(found).values()), found
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert measured(checkpoint, SPEC, Recipe(method="rtn", group_size=32), tmp_path / "out", 0).solving == 0


def test_a_plan_says_the_time_of_each_step(tmp_path):
    folder = tiny("llama").write(tmp_path / "m")
    plan = api.plan_quantize(folder, tmp_path / "out", RECIPE, rows=16, compare_rows=4, device="cpu")
    shown = json.loads(json.dumps(plan.as_dict()))
    assert (
        shown["seconds"] == pytest.approx(sum(step["seconds"] for step in shown["steps"])) and len(shown["steps"]) > 4
    )
    assert next(line for line in plan.lines() if line.startswith("time    about "))
    refused = api.plan_quantize(folder, tmp_path / "out", RECIPE, memory=1 << 20, device="cpu")
    assert refused.problems and refused.seconds is None  # a run that cannot begin takes no time


def test_a_plan_says_what_rules_find_unless_fixes_are_asked_for(tmp_path):
    folder, recipe = tiny("llama").write(tmp_path / "m"), Recipe(group_size=48)
    plan = api.plan_quantize(folder, tmp_path / "out", recipe, rows=16, device="cpu")
    assert {str(problem)[:5] for problem in plan.problems} == {"G301:"} and plan.seconds is None
    assert plan.lines()[-1].startswith("would fail: G301: ")
    fixed = api.plan_quantize(folder, tmp_path / "out", recipe, rows=16, device="cpu", fixed=True)
    assert not fixed.problems and fixed.seconds


def test_a_plan_of_a_7b_shape_on_a_card_says_what_tuning_takes(tmp_path, monkeypatch):
    """A card of 60 T float32 operations a second, two a product: an H100 as it is sold."""
    card = Rates(wide=3e13, narrow=1e11, solving=5e12, reading=2e9, writing=1e9)
    monkeypatch.setattr("doctor.quant.quantize.measured", lambda *_any: card)
    folder = dense("llama", 32, 4096, 11008, 32, 32, 32000).write(tmp_path / "m")
    plans = {
        tune: api.plan_quantize(folder, tmp_path / "o", Recipe(), tune=tune, memory=64 << 30) for tune in (AUTO, OFF)
    }
    named = {str(step.name): step.seconds for step in plans[AUTO].steps}
    tuning = named["tuning of scales"]
    assert 10 < tuning < 600 and plans[AUTO].tuned_rows >= 16
    assert "tuning of scales" not in {str(step.name) for step in plans[OFF].steps}
    assert plans[AUTO].seconds - plans[OFF].seconds == pytest.approx(tuning)
    least, most = plans[AUTO].tuning_on_device
    weights = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    assert most - least == weights and 1 << 30 < least < 8 << 30  # a card of 8 GB reads codes again
    assert any("while scales are tuned" in line for line in plans[AUTO].lines())
    assert not any("tuned" in line for line in plans[OFF].lines())


def test_work_of_many_experts_is_counted_at_once():
    linear = next(x for x in SPEC.linears if x.role == "down")
    many = replace(SPEC, linears=tuple(linear._replace(expert=n % 256) for n in range(50_000)))
    began = time.process_time()
    assert comparing_work(many, 1) > 0 and time.process_time() - began < 2
