"""The Trainer's callback: it stops a run at the first weight that is not finite, and only there."""

import math

import pytest
import torch

from doctor.evaluate.training import StopAtNonfinite, first_nonfinite

transformers = pytest.importorskip("transformers")


def step(callback, model, number):
    control, state = transformers.TrainerControl(should_save=True), transformers.TrainerState(global_step=number)
    return callback.on_step_end(None, state, control, model=model)


def test_a_run_stops_at_the_first_weight_that_is_not_finite_and_saves_nothing():
    model, callback = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)), StopAtNonfinite()
    control = step(callback, model, 1)
    assert not control.should_training_stop and control.should_save and callback.found is None
    with torch.no_grad():
        model[1].weight[0, 1], model[1].weight[1, 0] = math.nan, math.inf
    control = step(callback, model, 2)
    assert control.should_training_stop and not control.should_save
    assert (
        callback.found == ("1.weight", 1, 1, 2) and "step 2: 1.weight holds 1 NaN and 1 Inf" in callback.found.message
    )


def test_large_finite_weights_and_integers_are_no_finding():
    big = torch.full((4,), 3e38)  # their sum overflows
    assert (
        first_nonfinite([("big", big), ("ids", torch.arange(3)), ("half", torch.ones(2, dtype=torch.float16))]) is None
    )
    assert first_nonfinite([("big", big), ("bad", torch.tensor([1.0, -math.inf]))])[:3] == ("bad", 0, 1)


def test_it_looks_every_so_many_steps():
    model, callback = torch.nn.Linear(1, 1), StopAtNonfinite(every=10)
    with torch.no_grad():
        model.weight.fill_(math.nan)
    assert not step(callback, model, 9).should_training_stop and step(callback, model, 10).should_training_stop
    with pytest.raises(ValueError, match="must be 1 or more"):
        StopAtNonfinite(every=0)
