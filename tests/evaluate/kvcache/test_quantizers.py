"""The vectorised cache quantizer against a literal one that goes lane by lane through the kernel's steps."""

import numpy as np
import pytest
import torch

from doctor.evaluate.kvcache.quantizers import Side, read, round_trip, store, truncate_fp8

H = np.float16


def lane_by_lane(values, bits):
    """64 float16 values stored and read back as one warp of 32 lanes does it, two values a lane. Returns (codes,
    scales, values).
    """
    half = 1 << (bits - 1)
    lanes = [[H(values[2 * t]), H(values[2 * t + 1])] for t in range(32)]
    lanes = butterflies(lanes)
    codes, scales = [0] * 64, []
    for first in (0, 16):
        absmax = max(abs(v) for t in range(first, first + 16) for v in lanes[t])
        scales.append(H(absmax * H(1 / half)))
        for t in range(first, first + 16):
            for j in range(2):
                ratio = H(lanes[t][j] / absmax)
                shifted = H(np.float64(ratio) * half + half)
                codes[2 * t + j] = 0 if np.isnan(shifted) else min(max(int(np.rint(shifted)), 0), 2 * half - 1)
    lanes = [[H(H(codes[2 * t + j] - half) * scales[t // 16]) for j in range(2)] for t in range(32)]
    return codes, scales, [H(v * H(1 / 32)) for lane in butterflies(lanes) for v in lane]


def butterflies(lanes):
    step = 1
    while step < 32:
        lanes = [
            [H((-own if t & step else own) + other) for own, other in zip(lanes[t], lanes[t ^ step], strict=True)]
            for t in range(32)
        ]
        step *= 2
    return lanes


def hard_values():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(7, 64, generator=generator)
    x[1, 61] = 214.0  # an outlier channel
    x[2] = 0.0
    x[3] *= 1e-6  # subnormal in float16
    x[4] += 300.0
    x[5] = 3.0  # one rotated value alone is not 0
    x[6] = 2100.0  # the sum of 32 exceeds 65504
    return x.half()


@pytest.mark.parametrize("bits", (2, 4, 6, 8))
def test_every_code_scale_and_value_is_that_of_the_literal_kernel(bits):
    x = hard_values()
    codes, scales = store(x, bits)
    with np.errstate(all="ignore"):
        for row, got_codes, got_scales, got in zip(x.numpy(), codes, scales, read(codes, scales, bits), strict=True):
            want_codes, want_scales, want = lane_by_lane(row, bits)
            assert got_codes.tolist() == want_codes
            np.testing.assert_array_equal(got_scales.numpy(), np.array(want_scales))
            np.testing.assert_array_equal(got.numpy(), np.array(want))


def test_a_sum_beyond_fp16_reads_back_as_nan_and_zeros_as_zeros():
    back = round_trip(hard_values(), 8)
    assert torch.isnan(back[6]).any() and (back[2] == 0).all()


def test_an_isolated_spike_costs_what_the_formula_says():
    """RMS error of the small channels beside a spike A is near A / (2^(b-1) * sqrt(384))."""
    x = torch.randn(4000, 64, generator=torch.Generator().manual_seed(1)) * 0.1
    x[:, 61] += 200.0
    for bits, fraction in ((4, 157), (8, 2508)):
        error = (round_trip(x, bits).float() - x)[:, :60].square().mean().sqrt().item()
        assert 0.5 < error / (200 / fraction) < 1.5


def test_a_row_is_heads_after_heads_and_a_short_span_is_filled():
    """Two heads of 16 values: spans run on over the tokens, the last one half full."""
    x = torch.randn(1, 2, 3, 16, generator=torch.Generator().manual_seed(2))
    flat = torch.cat([x[0, h, t] for t in range(3) for h in range(2)] + [torch.zeros(32)])
    want = torch.cat([round_trip(flat[:64], 4), round_trip(flat[64:], 4)])[:96].float().reshape(3, 2, 16)
    assert torch.equal(Side("int", 4).apply(x)[0], want.transpose(0, 1))


def test_fp8_is_the_upper_byte_of_fp16():
    x = torch.tensor([1.0, 1.24, -1.99, 65504.0, 3e-8, float("inf")])
    assert truncate_fp8(x).tolist() == [1.0, 1.0, -1.75, 57344.0, 0.0, float("inf")]


def test_sixteen_bits_are_float16():
    x = torch.randn(1, 2, 3, 16, generator=torch.Generator().manual_seed(3))
    assert torch.equal(Side("fp16").apply(x), x.half().float())


def test_widths_that_no_cache_has_are_refused():
    with pytest.raises(ValueError, match="9 bits; a quantized cache has 2 to 8"):
        store(torch.zeros(64), 9)
