"""Laws of the edits' arithmetic: padding keeps every value, in order, and shows it again when the zeros are taken
out.
"""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from doctor.checkpoint.codecs import encode, from_codes, nonfinite_mask, to_bf16
from doctor.checkpoint.dtypes import DTYPES
from doctor.checkpoint.safetensors import TensorInfo
from doctor.edits.arithmetic import apply, edited_info, pad_positions, pad_runs
from doctor.edits.kinds import MISSING, PadTensor, ReplaceNonfinite


def info_of(codes, dtype="BF16"):
    return TensorInfo("w", DTYPES[dtype], codes.shape, "model.safetensors", 0, codes.nbytes)


sizes = st.tuples(st.integers(1, 60), st.integers(0, 40), st.integers(1, 4), st.booleans())


@given(sizes)
def test_padding_places_are_increasing_and_alike_in_each_block(drawn):
    part, more, blocks, spread = drawn
    old, new = part * blocks, (part + more) * blocks
    places = pad_positions(old, new, blocks, spread)
    assert len(places) == old and (np.diff(places) > 0).all() and places[-1] < new
    first = places[:part]
    for i in range(blocks):
        assert (places[i * part : (i + 1) * part] == first + i * (part + more)).all()


@given(sizes)
def test_padding_runs_name_the_same_places(drawn):
    part, more, blocks, spread = drawn
    old, new = part * blocks, (part + more) * blocks
    periods, runs = pad_runs(old, new, blocks, spread)
    found = [p * (new // periods) + place + i for p in range(periods) for a, b, place in runs for i in range(b - a)]
    assert found == pad_positions(old, new, blocks, spread).tolist()


@given(st.integers(1, 300), st.integers(0, 300))
def test_spread_padding_leaves_no_long_run_of_zeros(old, more):
    new = old + more
    full = np.zeros(new, int)
    full[pad_positions(old, new, 1, True)] = 1
    longest = max((len(list(g)) for value, g in itertools.groupby(full.tolist()) if value == 0), default=0)
    assert longest <= -(-more // old)


@settings(max_examples=60)
@given(sizes, st.integers(1, 5), st.sampled_from([0, 1]))
def test_padding_keeps_every_value_and_adds_only_zeros(drawn, other, axis):
    part, more, blocks, spread = drawn
    old, new = part * blocks, (part + more) * blocks
    shape = (old, other) if axis == 0 else (other, old)
    codes = np.arange(1, old * other + 1, dtype=np.uint16).reshape(shape)
    kept = codes.copy()
    edit = PadTensor("w", axis, new, blocks, spread)
    padded = apply(codes, info_of(codes), [edit])
    assert padded.shape == edited_info(info_of(codes), [edit]).shape
    places = pad_positions(old, new, blocks, spread)
    assert (np.take(padded, places, axis) == codes).all()
    assert np.count_nonzero(padded) == codes.size
    assert (codes == kept).all()


def test_edits_apply_in_phase_order_whatever_the_order_given():
    codes = np.array([[0x7FC0, 0x3F80], [0x3F80, 0xFF80]], np.uint16)
    edits = [PadTensor("w", 1, 4), ReplaceNonfinite("w")]
    one, two = (apply(codes, info_of(codes), e) for e in (edits, edits[::-1]))
    assert (one == two).all() and (one == np.array([[0, 0, 0x3F80, 0], [0x3F80, 0, 0, 0]])).all()


@pytest.mark.parametrize(
    "dtype, bad, good",
    [
        ("F16", [0x7C00, 0xFE00], [0x7BFF, 0]),
        ("BF16", [0x7F80, 0xFFC0], [0x7F7F, 0]),
        ("F8_E5M2", [0x7C, 0xFD], [0x7B, 0]),
        ("F8_E4M3", [0x7F, 0xFF], [0x7E, 0]),
        ("F8_E4M3FNUZ", [0x80], [0x7F, 0]),
        ("F8_E8M0", [0xFF], [0xFE, 0]),
    ],
)
def test_nonfinite_codes_are_known_in_every_type(dtype, bad, good):
    kind = np.uint16 if "16" in dtype else np.uint8
    assert nonfinite_mask(np.array(bad, kind), dtype).all() and not nonfinite_mask(np.array(good, kind), dtype).any()


def test_a_type_without_zero_is_refused():
    with pytest.raises(ValueError, match="F8_E8M0 has no code for 0"):
        encode(0.0, "F8_E8M0")


@given(st.integers(0, 0xFFFF))
def test_bf16_codes_survive_the_way_through_float(code):
    value = from_codes(np.array([code], np.uint16), "BF16")
    back = to_bf16(value)[0]
    assert back == code or (np.isnan(value[0]) and np.isnan(from_codes(back[None], "BF16")[0]))


def test_padding_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="cannot pad 6 to 9 in 2 blocks"):
        pad_positions(6, 9, 2, True)
    assert repr(MISSING) == "MISSING"
