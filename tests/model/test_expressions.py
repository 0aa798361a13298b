"""Expressions of the tables: sizes, and conditions on a decoder layer's number."""

import pytest

from doctor.model.expressions import evaluate, holds, keys_of

CONFIG = {"first": 2, "kinds": ["a", "b", "a", "b"], "step": 2, "own": [1], "pattern": "M-E*"}


@pytest.mark.parametrize(
    "condition, layers",
    [
        ("i >= first", [2, 3]),
        ("kinds[i] == 'b'", [1, 3]),
        ("kinds[i] in ('a', 'c')", [0, 2]),
        ("(i + 1) % step == 0", [1, 3]),
        ("i not in own and (i + 1) % step == 0", [3]),
        ("i in own or not i", [0, 1]),
        ("pattern[i] == 'E'", [2]),
    ],
)
def test_a_condition_is_true_for_its_layers(condition, layers):
    assert [i for i in range(4) if holds((condition,), CONFIG.get, i)] == layers


def test_what_config_json_does_not_say_is_neither_true_nor_false():
    assert holds(("absent[i] == 'a'",), CONFIG.get, 0) is None
    assert holds(("kinds[i] == 'a'",), CONFIG.get, 9) is None, "a list shorter than the model"
    assert holds(("absent > 0", "i >= first"), CONFIG.get, 3) is True, "the next condition answers"


@pytest.mark.parametrize(
    "bad", ["i.real", "__import__('os')", "i if first else 0", "[i for i in own]", "1 +", "first < i < 3"]
)
def test_other_python_is_not_run(bad):
    assert holds((bad,), CONFIG.get, 0) is None and evaluate(bad, {"first": 2}.get) is None


def test_names_come_in_order_and_once_and_the_layers_number_is_none():
    assert keys_of("2 * b * a + b * i") == ("b", "a")
