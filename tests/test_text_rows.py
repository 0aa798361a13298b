"""Calibration and held-out rows are fixed, full, and have no text in common."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
import text_rows


class Words:
    """A tokenizer whose ids are the words themselves, so that rows can be read."""

    def __init__(self, bos_token_id=None):
        self.bos_token_id = bos_token_id

    def __call__(self, text, add_special_tokens=True, verbose=True):
        bos = [self.bos_token_id] if add_special_tokens and self.bos_token_id else []
        return {"input_ids": bos + text.split()}


def test_no_paragraph_is_both_calibration_and_held_out():
    calibration, heldout = ({text_rows.normal(p) for p in part} for part in text_rows.split_text())
    assert len(calibration) > 1000 and len(heldout) > 500
    assert not calibration & heldout


def test_rows_have_the_length_asked_for_and_do_not_overlap():
    words = [str(i) for i in range(100)]
    rows = text_rows.spread(" ".join(words), Words(), 6, 16)
    assert [len(row) for row in rows] == [16] * 6
    assert len({word for row in rows for word in row}) == 96
    assert [row[0] for row in rows] == ["0", "16", "32", "48", "64", "80"]


def test_rows_start_with_bos_where_the_tokenizer_does():
    rows = text_rows.spread("a b c d e f", Words("<bos>"), 2, 4)
    assert rows == [["<bos>", "a", "b", "c"], ["<bos>", "d", "e", "f"]]


def test_rows_are_the_same_at_every_call():
    first = text_rows.calibration_rows(Words(), 4, 64), text_rows.heldout_rows(Words(), 4, 64)
    text_rows.split_text.cache_clear()
    assert (text_rows.calibration_rows(Words(), 4, 64), text_rows.heldout_rows(Words(), 4, 64)) == first


def test_too_many_rows_are_refused_with_the_number_there_could_be():
    with pytest.raises(ValueError, match="3 rows of 10 tokens: the text has 25 tokens; at most 2 such rows"):
        text_rows.spread("w " * 25, Words(), 3, 10)
