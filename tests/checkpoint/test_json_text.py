import json
import time
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from doctor.checkpoint.json_text import (
    MAX_REPORTED,
    JsonError,
    JsonPlaces,
    cleaned,
    dumps,
    parse,
    parse_bytes,
    pointer,
    remove_value,
    set_value,
)

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(JSON, st.sampled_from([None, 2, "\t"]))
def test_reads_what_json_reads_and_every_span_is_its_value(value, indent):
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    assert parse(text).value == value
    places = JsonPlaces(text)
    for path, inner in walk("", value):
        span = places.find(path)
        assert json.loads(text[span.begin : span.end]) == inner
    assert places.find("/absent/~0") is None


def walk(path, value):
    """(pointer, value) of every value."""
    yield path, value
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from walk(path + pointer(key), inner)


@given(st.binary(max_size=60))
def test_any_bytes_give_a_document_or_a_json_error(data):
    try:
        parse_bytes(data)
    except JsonError as error:
        assert error.line >= 1 and error.column >= 1


@given(st.text(alphabet='{}[]",:0123456789.eE+-truefalsn \n\\u', max_size=40))
def test_accepts_what_the_standard_reader_accepts(text):
    try:
        want = json.loads(text)
    except ValueError:
        with pytest.raises(JsonError):
            parse(text)
    else:
        assert repr(parse(text).value) == repr(want)


def test_duplicates_and_non_standard_numbers_are_reported():
    doc = parse('{"a": 1, "b": {"c": NaN, "c": -Infinity}, "a": 2}')
    assert doc.value["a"] == 2 and doc.duplicates == ["/b/c", "/a"] and doc.non_standard == ["/b/c", "/b/c"]


def test_error_names_line_and_column():
    with pytest.raises(JsonError, match="line 3 column 3"):
        parse('{\n  "a": 1\n  "b": 2\n}')


def test_depth_is_bounded():
    with pytest.raises(JsonError, match="nested deeper"):
        parse("[" * 100_000)


@given(st.dictionaries(st.text(min_size=1), JSON, max_size=5), st.text(min_size=1), JSON, st.sampled_from([None, 2]))
def test_setting_a_key_changes_that_key_alone(document, key, value, indent):
    text = json.dumps(document, indent=indent)
    edited = set_value(text, pointer(key), value)
    assert json.loads(edited) == {**document, key: value}
    assert json.loads(remove_value(edited, pointer(key))) == {k: v for k, v in document.items() if k != key}


def test_the_rest_of_the_text_keeps_its_own_form():
    text = '{\r\n\t"a" :1,\r\n\t"list": [1,2,\r\n3],\r\n\t"z": {}\r\n}\r\n'
    assert set_value(text, "/a", 7) == text.replace('1,\r\n\t"list"', '7,\r\n\t"list"')
    assert json.loads(set_value(text, "/new", True))["new"] is True
    assert set_value(text, "/new", True).startswith(text[: text.index("}\r\n}")])


def test_setting_below_a_missing_parent_is_refused():
    with pytest.raises(KeyError):
        set_value('{"a": 1}', "/b/c", 1)


@pytest.mark.parametrize(
    "text, want",
    [
        ('\ufeff{"a": 1}', '{"a": 1}'),
        ('{"a": 1, "b": 2, "a": 3}', '{"b": 2, "a": 3}'),
        ('{\n  "a": {"x": 1, "x": 2},\n  "a": {"x": 3,\n "x": 4}\n}\n', '{\n  "a": {"x": 4}\n}\n'),
        ('{"a": 1, "a": 2, "a": 3, "c": [{"d": 1, "d": 1}]}', '{"a": 3, "c": [{"d": 1}]}'),
        ('{"a": 1}', '{"a": 1}'),
    ],
)
def test_a_cleaned_text_says_once_what_readers_take(text, want):
    assert cleaned(text) == want
    again = parse(want)
    assert again.value == json.loads(text.removeprefix("\ufeff")) and not again.duplicates and not again.bom


def test_values_of_one_key_are_told_apart_by_kind():
    assert parse('{"a": 1, "a": true}').unlike and parse('{"a": 1, "a": 2}').unlike
    assert not parse('{"a": NaN, "a": NaN, "b": [1], "b": [1]}').unlike


def test_a_lone_surrogate_stays_an_escape():
    assert dumps({"\ud800": "a\udfffü"}) == '{"\\ud800": "a\\udfffü"}'
    edited = set_value('{"a": "\\ud800"}', "/b", "\udc00")
    assert json.loads(edited) == {"a": "\ud800", "b": "\udc00"} and edited.encode("utf-8")


def test_time_and_memory_grow_with_the_text_alone():
    """Long keys above many values: a pointer for each value would take gigabytes."""
    key = "k" * 1000
    text = f'{{"{key}":' * 150 + "[" + "0," * 20_000 + "0]" + "}" * 150
    began = time.process_time()
    tracemalloc.start()
    doc = parse(text)
    JsonPlaces(text).find("/" + key + "/" + key)
    remove_value(text, "/" + key)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert doc.value and peak < 64 * len(text) and time.process_time() - began < 5, peak / len(text)


def test_many_duplicates_are_reported_up_to_a_number_and_in_linear_time():
    text = "{" + ",".join(f'"k{i % 20_000}":{i}' for i in range(40_000)) + "}"
    began = time.process_time()
    doc = parse(text)
    assert len(doc.duplicates) == MAX_REPORTED and len(doc.overwritten) == 20_000
    assert json.loads(cleaned(text)) == doc.value and time.process_time() - began < 2
