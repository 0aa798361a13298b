"""Statistics of raw bytes: the merge law, both paths alike, every 16-bit code by definition, the fp16 boundaries."""

import math
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from doctor.checkpoint.dtypes import CODE_NUMPY
from doctor.checkpoint.safetensors import ShardFile
from doctor.core.errors import BadCheckpoint
from doctor.scan import counters, native

NUMPY = "0"
LEVELS = [
    name
    for name in native.LEVELS
    if native.level() and native.LEVELS.index(name) <= native.LEVELS.index(native.level())
]
PATHS = [NUMPY, *LEVELS]
DTYPES = [*counters.WIDE, *counters.NARROW]
EXACT = [name for name in counters.Stats._fields if name not in ("sum", "sumsq")]


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    monkeypatch.setenv("DOCTOR_NATIVE", request.param)
    return request.param


def code_type(dtype):
    return np.dtype(CODE_NUMPY[dtype].replace("f", "u"))


def code_bits(dtype):
    return 8 * code_type(dtype).itemsize


def values_of(codes, dtype):
    """float64 values by another road than stats: NumPy's own types, or for 8 bits torch's."""
    if dtype == "BF16":
        return (codes.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if dtype in counters.WIDE:
        return codes.view(f"<f{codes.itemsize}").astype(np.float64)
    torch = pytest.importorskip("torch")
    from doctor.checkpoint.dtypes import DTYPES as KNOWN

    return torch.from_numpy(codes.copy()).view(getattr(torch, KNOWN[dtype].torch)).to(torch.float64).numpy()


def smallest_normal(dtype):
    return {
        "BF16": 2.0**-126,
        "F16": 2.0**-14,
        "F32": 2.0**-126,
        "F64": 2.0**-1022,
        "F8_E4M3": 2.0**-6,
        "F8_E5M2": 2.0**-14,
        "F8_E4M3FNUZ": 2.0**-7,
        "F8_E5M2FNUZ": 2.0**-15,
        "F8_E8M0": 2.0**-127,
    }[dtype]


@np.errstate(all="ignore")
def definition(codes, dtype, offset=0):
    """Stats from float64 values and casts, one word of the definition at a time."""
    x = values_of(codes, dtype)
    finite = x[np.isfinite(x)]
    half = finite.astype(np.float16)
    bad = np.flatnonzero(~np.isfinite(x))
    return counters.Stats(
        numel=x.size,
        n_nan=int(np.isnan(x).sum()),
        n_inf=int(np.isinf(x).sum()),
        n_zero=int((x == 0).sum()),
        n_subnormal=int(((finite != 0) & (np.abs(finite) < smallest_normal(dtype))).sum()),
        n_fp16_overflow=int(np.isinf(half).sum()),
        n_fp16_underflow=int(((half == 0) & (finite != 0)).sum()),
        absmax=float(np.abs(finite).max(initial=0.0)),
        min=float(finite.min()) if finite.size else 0.0,
        max=float(finite.max()) if finite.size else 0.0,
        sum=math.fsum(finite) if np.abs(finite).max(initial=0.0) < 1e300 else float(finite.sum()),
        sumsq=float((finite * finite).sum()),
        first_nonfinite=offset + int(bad[0]) if bad.size else -1,
    )


def assert_same(got, want, sums=1e-6):
    for name in EXACT:
        assert getattr(got, name) == getattr(want, name), name
    if not math.isfinite(want.sumsq):  # squares of F64 may leave float64 on any road
        return
    assert abs(got.sumsq - want.sumsq) <= sums * want.sumsq
    # A sum may cancel to nothing: its scale is that of the absolute values, bounded by Cauchy's inequality.
    assert abs(got.sum - want.sum) <= sums * math.sqrt(want.numel) * math.sqrt(want.sumsq)


def weight_codes(dtype, n, rng):
    """n codes of normal weights of scale 0.02, all finite; for 8 bits any code at all."""
    weights = (rng.standard_normal(n) * 0.02).astype(np.float32)
    if dtype in counters.NARROW:
        return rng.integers(0, 256, n).astype(np.uint8)
    if dtype == "BF16":
        return (weights.view(np.uint32) >> 16).astype(np.uint16)
    return weights.astype(f"<f{code_type(dtype).itemsize}").view(code_type(dtype))


def hard_codes(dtype, n, seed):
    """Weights with none, few, some or mostly random codes, which include NaN, Inf, subnormal, huge and tiny; and
    zeros.
    """
    rng = np.random.default_rng(seed)
    codes = weight_codes(dtype, n, rng)
    where = rng.random(n) < (0, 0.001, 0.05, 0.9)[seed % 4]
    codes[where] = rng.integers(0, 2 ** code_bits(dtype), where.sum(), dtype=codes.dtype)
    if seed % 4:
        codes[rng.random(n) < 0.01] = rng.choice([0, 1 << (code_bits(dtype) - 1)])
    return codes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 2, 31, 1023, 1024, 4096, 4097, 70001])
def test_every_path_counts_by_the_definition(path, dtype, n):
    for seed in range(4):
        codes = hard_codes(dtype, n, seed)
        assert_same(counters.scan(codes.tobytes(), dtype, 7), definition(codes, dtype, 7))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 4097, 300_000])
def test_a_range_of_a_file_is_counted_as_its_bytes_are_and_left_in_the_buffer(path, tmp_path, dtype, n):
    codes = hard_codes(dtype, n, 2)
    (tmp_path / "x").write_bytes(b"header" + codes.tobytes() + b"more")
    buffer = bytearray(codes.nbytes)
    with ShardFile(tmp_path / "x", "x") as file:
        got = counters.read_and_scan(file, 6, memoryview(buffer), dtype, 7)
    assert repr(got) == repr(counters.scan(codes.tobytes(), dtype, 7))  # sums of F64 may be NaN
    assert buffer == codes.tobytes()


def test_a_file_that_ends_or_cannot_be_read_is_named(path, tmp_path):
    (tmp_path / "x").write_bytes(bytes(1000))
    with ShardFile(tmp_path / "x", "x.safetensors") as file:
        with pytest.raises(BadCheckpoint, match=r"x.safetensors: ends at byte 1,000 while 200 more"):
            counters.read_and_scan(file, 200, memoryview(bytearray(1000)), "BF16")
        os.close(file.fileno())
        with pytest.raises(OSError, match="Bad file descriptor"):
            counters.read_and_scan(file, 0, memoryview(bytearray(1000)), "BF16")
        file._fd = -1


def test_a_file_that_is_made_while_it_is_read_is_not_read_past_what_makes_it(path, tmp_path):
    class Doubled(ShardFile):
        def read_into(self, offset, buffer):
            super().read_into(offset, buffer)
            buffer[:] = bytes(255 - b for b in buffer)

    (tmp_path / "x").write_bytes(bytes(64))
    with Doubled(tmp_path / "x", "x") as file:
        assert counters.read_and_scan(file, 0, memoryview(bytearray(64)), "BF16").n_nan == 32


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_all_65536_codes_are_classified_by_their_values(path, dtype):
    codes = np.arange(65536, dtype="<u2")
    with np.errstate(all="ignore"):
        x = values_of(codes, dtype)
        half = x.astype(np.float16)
    finite = np.isfinite(x)
    want = {
        "n_nan": np.isnan(x),
        "n_inf": np.isinf(x),
        "n_zero": x == 0,
        "n_subnormal": (x != 0) & (np.abs(x) < smallest_normal(dtype)),
        "n_fp16_overflow": finite & ~np.isfinite(half),
        "n_fp16_underflow": (x != 0) & (half == 0),
    }
    assert_same(counters.scan(codes, dtype), definition(codes, dtype))
    step = (
        5 if path != NUMPY else 37
    )  # every code was counted above; alone, a sample shows the scalar tail of the loops
    for code in range(0, 65536, step):
        got = counters.scan(codes[code : code + 1], dtype)
        assert {name: getattr(got, name) for name in want} == {name: int(mask[code]) for name, mask in want.items()}
        assert (got.min, got.max) == ((x[code], x[code]) if finite[code] else (0.0, 0.0))


@pytest.mark.parametrize("dtype", list(counters.NARROW))
def test_8_bit_codes_have_the_values_torch_gives_them(dtype):
    codes = np.arange(256, dtype=np.uint8)
    want = values_of(codes, dtype)
    table = counters._table(dtype)
    assert np.array_equal(np.where(table.nan, np.nan, np.where(table.inf, want, table.value)), want, equal_nan=True)
    assert np.array_equal(table.inf, np.isinf(want))


@pytest.mark.parametrize(
    "dtype, below, at",
    [
        ("F32", np.nextafter(np.float32(65520), np.float32(0)), np.float32(65520)),
        ("F64", np.nextafter(65520.0, 0.0), 65520.0),
    ],
)
def test_65520_overflows_fp16_and_the_value_below_does_not(path, dtype, below, at):
    for sign in (1, -1):
        got = (
            counters.scan(np.array([sign * below, sign * at, np.inf]), dtype)
            if dtype == "F64"
            else counters.scan(np.array([sign * below, sign * at, np.inf], np.float32), dtype)
        )
        assert (got.n_fp16_overflow, got.n_inf) == (1, 1)


@pytest.mark.parametrize("numpy_type, dtype", [(np.float32, "F32"), (np.float64, "F64")])
def test_a_tie_at_two_to_the_minus_25_goes_to_even_zero(path, numpy_type, dtype):
    tie = numpy_type(2.0**-25)
    above = np.nextafter(tie, numpy_type(1))
    for sign in (1, -1):
        got = counters.scan(np.array([sign * tie, sign * above, 0.0, -0.0], numpy_type), dtype)
        assert (got.n_fp16_underflow, got.n_zero) == (1, 2)


def test_bf16_boundaries_lie_between_neighbouring_codes(path):
    # 0x477f = 65280 fits, 0x4780 = 65536 overflows; 0x3300 = 2^-25 underflows, 0x3301 does not.
    got = counters.scan(np.array([0x477F, 0x4780, 0xC780, 0x3300, 0xB300, 0x3301], np.uint16), "BF16")
    assert (got.n_fp16_overflow, got.n_fp16_underflow) == (2, 2)


@settings(max_examples=60, deadline=None)
@given(dtype=st.sampled_from(DTYPES), n=st.integers(0, 9000), seed=st.integers(0, 2**16), data=st.data())
def test_merging_the_parts_of_any_split_gives_the_whole(dtype, n, seed, data):
    codes = hard_codes(dtype, n, seed)
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=6)))
    for path in PATHS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DOCTOR_NATIVE", path)
            total = counters.EMPTY
            for begin, end in zip([0, *cuts], [*cuts, n], strict=True):
                total = total.merge(counters.scan(codes[begin:end], dtype, begin))
            assert_same(total, counters.scan(codes, dtype))


@settings(max_examples=60, deadline=None)
@given(dtype=st.sampled_from(DTYPES), n=st.integers(1, 20000), seed=st.integers(0, 2**16), shift=st.integers(1, 15))
def test_paths_agree_at_every_address(dtype, n, seed, shift):
    codes = hard_codes(dtype, n, seed)
    buffer = memoryview(b"\xff" * shift + codes.tobytes() + b"\xff" * 9)[shift : shift + codes.nbytes]
    results = []
    for path in PATHS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DOCTOR_NATIVE", path)
            results.append(counters.scan(buffer, dtype))
    for got in results[1:]:
        assert_same(got, results[0])


CONSTANTS = [(dtype, value) for dtype in ("BF16", "F16", "F32") for value in (1.0, 1.99609375, -0.0137, 3e-5, 60000.0)]


@pytest.mark.parametrize(
    "dtype, constant", [*CONSTANTS, ("BF16", 1e-25), ("F32", 1e-25), ("BF16", 1e18), ("F32", 1e30)]
)
def test_sums_of_a_constant_do_not_drift(path, dtype, constant):
    """The worst case of float32 partial sums: every rounding goes the same way."""
    value = np.float16(constant) if dtype == "F16" else np.float32(constant)
    code = value.view(code_type(dtype)) if dtype != "BF16" else value.view(np.uint32) >> 16
    codes = np.full(50000, code, code_type(dtype))
    assert_same(counters.scan(codes, dtype), definition(codes, dtype), sums=1.5e-6)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_one_planted_value_in_a_large_tensor_is_found_where_it_lies(path, dtype):
    codes = weight_codes(dtype, 50000, np.random.default_rng(0))
    codes[31234] = counters.WIDE[dtype].inf + 1
    codes[40000] = counters.WIDE[dtype].inf | 1 << (code_bits(dtype) - 1)
    got = counters.scan(codes, dtype, 1000)
    assert (got.n_nan, got.n_inf, got.first_nonfinite) == (1, 1, 32234)


@pytest.mark.parametrize(
    "codes, low, high",
    [
        ([0x3F80, 0x4000], 1, 2),
        ([0xBF80, 0xC000], -2, -1),
        ([0x8000], 0, 0),
        ([0x7FC0], 0, 0),
        ([0xFF80, 0xBF80], -1, -1),
        ([0x7F80, 0x4000], 2, 2),
    ],
)
def test_bounds_of_one_signed_tensors_and_of_none(path, codes, low, high):
    got = counters.scan(np.array(codes, np.uint16), "BF16")
    assert (got.min, got.max, got.absmax) == (low, high, max(-low, high))
    assert math.copysign(1, got.min) == (1 if low >= 0 else -1), "minus zero is reported as 0.0"


def test_bounds_survive_a_merge_with_a_chunk_of_nan(path):
    nan, two = counters.scan(b"\xc0\x7f", "BF16"), counters.scan(b"\x00\x40", "BF16", 1)
    for merged in (nan.merge(two), two.merge(nan)):
        assert (merged.min, merged.max, merged.numel, merged.n_nan) == (2.0, 2.0, 2, 1)
    assert nan.merge(two).first_nonfinite == 0


def test_fields_are_plain_numbers_that_json_takes(path):
    for dtype in DTYPES:
        got = counters.scan(hard_codes(dtype, 100, 3), dtype)
        assert {type(v) for v in got} <= {int, float}, dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k, group", [(128, 32), (100, 32), (96, -1), (7, 1), (64, 100)])
def test_zero_groups_are_counted_before_and_after_fp16(path, dtype, k, group):
    rng = np.random.default_rng(k)
    codes = hard_codes(dtype, 40 * k, 1).reshape(40, k)
    width = k if group == -1 else group
    tiny = {"BF16": 0x3300, "F32": 0x33000000, "F64": 0x3E6 << 52}.get(dtype, 0)
    for _ in range(12):
        row, start = rng.integers(40), rng.integers(-(-k // width)) * width
        codes[row, start : start + width] = rng.choice([0, tiny])
    with np.errstate(all="ignore"):
        x = values_of(codes, dtype)
        half = x.astype(np.float16)
    zero = fp16 = 0
    first = None
    for row in range(40):
        for number, start in enumerate(range(0, k, width)):
            part = slice(start, start + width)
            if (half[row, part] == 0).all():
                first = first or (row, number)
                zero, fp16 = (zero + 1, fp16) if (x[row, part] == 0).all() else (zero, fp16 + 1)
    assert counters.group_zeros(codes, dtype, k, group) == (zero, fp16, first)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, k", [(1, 1), (33, 65), (64, 128), (0, 8)])
def test_absmax_of_rows_and_columns(path, dtype, rows, k):
    codes = hard_codes(dtype, rows * k, 2).reshape(rows, k)
    with np.errstate(all="ignore"):
        magnitudes = np.abs(values_of(codes, dtype)).reshape(rows, k)
    magnitudes = np.where(np.isfinite(magnitudes), magnitudes, np.inf)
    by_row, by_column = counters.row_col_absmax(codes, dtype, k)
    assert np.array_equal(by_row, magnitudes.max(axis=1)) and np.array_equal(
        by_column, magnitudes.max(axis=0, initial=0)
    )
    assert by_row.dtype == by_column.dtype == (np.float64 if dtype == "F64" else np.float32)


def test_a_row_of_nan_is_not_a_row_of_zeros(path):
    by_row, by_column = counters.row_col_absmax(np.array([[0x7FC0, 0], [0, 0]], np.uint16), "BF16", 2)
    assert by_row.tolist() == [math.inf, 0] and by_column.tolist() == [math.inf, 0]


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F8_E4M3"])
@pytest.mark.parametrize("n", [0, 1, 70001])
def test_code_hist_counts_every_code(path, dtype, n):
    codes = hard_codes(dtype, n, 5)
    assert np.array_equal(
        counters.code_hist(codes.tobytes(), dtype), np.bincount(codes, minlength=2 ** code_bits(dtype))
    )


def test_part_of_an_element_and_unknown_types_are_refused():
    with pytest.raises(ValueError, match="3 bytes are no whole number of BF16 elements of 2 bytes"):
        counters.scan(b"abc", "BF16")
    with pytest.raises(ValueError, match="I64 is not one of BF16, F16"):
        counters.scan(b"", "I64")
    with pytest.raises(ValueError, match="3 elements are no whole number of rows of 2"):
        counters.group_zeros(b"abcdef", "F16", 2, 1)
    assert not counters.can_scan("I64") and counters.can_scan("F8_E4M3")
