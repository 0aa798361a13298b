"""A message is a str equal to its English text that keeps its template and values, through pickle and JSON too."""

import copy
import json
import pickle

import numpy as np
import pytest

from doctor.core.messages import Message, _, as_data, from_data, listed, plural

ZH = {
    "{n:,} tensor": "{n:,} 个张量",
    "{what} of {file}": "{file} 的{what}",
    ", ": "、",
    " and ": "和",
    "scale": "缩放因子",
}


def chinese(text):
    return text.rendered(lambda template, many, n: ZH.get(template, template))


MESSAGES = [
    _("plain {braces} stay"),
    _("{share:.1%} of {count:,} are {value}", share=0.5, count=12345, value=float("nan")),
    _("absmax {x:.3g}", x=float("-inf")),
    plural("{n:,} tensor", "{n:,} tensors", 1),
    plural("{n:,} tensor", "{n:,} tensors", np.int64(3000)),
    _("{what} of {file}", what=listed(["a", _("scale"), "b"]), file="x.safetensors"),
    listed([]),
    listed(["one"]),
]


def test_a_message_is_its_english_text():
    assert MESSAGES[1] == "50.0% of 12,345 are nan" and isinstance(MESSAGES[1], str)
    assert [str(m) for m in MESSAGES[3:6]] == ["1 tensor", "3,000 tensors", "a, scale and b of x.safetensors"]
    assert [*MESSAGES[6:]] == ["", "one"] and MESSAGES[0] == "plain {braces} stay"


def test_a_message_is_rendered_with_the_messages_inside_it():
    assert chinese(MESSAGES[4]) == "3,000 个张量"
    assert chinese(MESSAGES[5]) == "x.safetensors 的a、缩放因子和b"


@pytest.mark.parametrize("message", MESSAGES, ids=str)
def test_json_and_pickle_give_the_same_message_again(message):
    stored = json.loads(json.dumps(as_data(message), allow_nan=False))
    for again in (from_data(stored), pickle.loads(pickle.dumps(message)), copy.deepcopy(message)):
        assert type(again) is type(message) and again == message and chinese(again) == chinese(message)


def test_a_plain_text_has_no_data():
    assert as_data("text") is None and from_data("text") == "text"


@pytest.mark.parametrize(
    "template", ["{n.__class__}", "{n[0]}", "{n:9999999}", "{n:>{n}}", "{0}", "{n!r:999}", "{", "{missing}"]
)
def test_data_from_elsewhere_may_not_ask_for_more_than_a_sentence_needs(template):
    with pytest.raises((ValueError, KeyError)):
        from_data({"template": template, "values": {"n": 3}})


def test_a_template_without_its_value_is_refused():
    with pytest.raises(KeyError):
        _("{a} and {b}", a=1)
    assert Message("{a}", {"a": 1}) == "1"
