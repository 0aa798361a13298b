"""What a quantized KV cache gives back: ExLlamaV2's Q4, Q6 and Q8 to the bit, the same at other widths, and its FP8.

Keys arrive here after RoPE, as engines cache them. Every 64 consecutive values of a token's row [heads * head_dim] are
two interleaved vectors, the even and the odd positions; each goes through a 32-point Hadamard transform without
scaling, so that an outlier is spread before 32 neighbours share one scale. 1/32 is applied on reading. Every step
rounds to float16, as the kernel does, and that is not a detail: the sum of 32 values overflows where they average above
2047, and such a cache reads back NaN.

Source: turboderp/exllamav2 exllamav2/exllamav2_ext/cuda/cache_q.cuh and cache.cu, fp16_to_q, q_to_fp16 and the FP8 pair
of v0.1.5.
"""

from dataclasses import dataclass

import torch

from doctor.quant.solve import cuda

LANES = 32  # points of one transform
SPAN = 2 * LANES  # consecutive values that are transformed together
GROUP = 32  # consecutive rotated values that share a scale
BITS = range(2, 9)


@dataclass(frozen=True)
class Side:
    """How keys, or values, are stored: `kind` is "fp16", "fp8" or "int"; bits counts for "int" only."""

    kind: str
    bits: int = 16

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """x f32[batch, heads, tokens, head_dim] as the cache gives it back, same shape and dtype."""
        if self.kind == "fp16":
            return x.half().to(x.dtype)
        if self.kind == "fp8":
            return truncate_fp8(x).to(x.dtype)
        batch, heads, tokens, dim = x.shape
        rows = x.transpose(1, 2).reshape(batch, tokens * heads * dim)
        back = round_trip(rows, self.bits).to(x.dtype)
        return back.reshape(batch, tokens, heads, dim).transpose(1, 2)


def truncate_fp8(x: torch.Tensor) -> torch.Tensor:
    """float16 of x with all but the upper byte cut off: 1 sign, 5 exponent and 2 mantissa bits, rounded towards 0."""
    return (x.half().contiguous().view(torch.int16) & -256).view(torch.float16)


def round_trip(x: torch.Tensor, bits: int) -> torch.Tensor:
    """x[..., values] stored with `bits` bits and read back, in float16.

    ExLlamaV2 has 4 and 8 bits; other widths from 2 to 8 use the same formula. A last span that is not full is filled
    with 0.
    """
    if x.is_cuda and bits in cuda.KV_BITS and cuda.available(x.device) is None:
        spans = _in_spans(x)
        back = cuda.kv_load(*cuda.kv_store(spans, bits), bits).reshape(spans.shape)
    else:
        back = read(*store(x, bits), bits)
    return back[..., : x.shape[-1]]


def _in_spans(x: torch.Tensor) -> torch.Tensor:
    """float16 of x[..., values], the last span filled with 0."""
    return torch.nn.functional.pad(x.half(), (0, -x.shape[-1] % SPAN))


def store(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes int16[..., spans * 64] of 0 to 2^bits - 1, scales f16[..., spans * 2]) of x[..., values]."""
    if bits not in BITS:
        raise ValueError(f"{bits} bits; a quantized cache has {BITS[0]} to {BITS[-1]}")
    half = 1 << (bits - 1)
    groups = _hadamard(_in_spans(x)).unflatten(-1, (-1, GROUP))
    largest = groups.abs().amax(-1)
    shifted = (
        (groups / largest[..., None]).float() * half + half
    ).half()  # one rounding, as the fused multiply-add has
    # A group of zeros is 0/0; the kernel's conversion makes NaN code 0, and its scale 0 makes that 0 again.
    codes = shifted.float().nan_to_num(0.0).round().clamp(0, 2 * half - 1).to(torch.int16)
    return codes.flatten(-2), largest * (1 / half)


def read(codes: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """float16[..., spans * 64] that the cache gives for codes and scales of `store`."""
    centred = (codes - (1 << (bits - 1))).half().unflatten(-1, (-1, GROUP)) * scales[..., None]
    return _hadamard(centred.flatten(-2)) * (1 / LANES)


def _hadamard(x: torch.Tensor) -> torch.Tensor:
    """Both interleaved 32-point transforms of every 64 values of f16[..., spans * 64], each addition rounded to
    float16.
    """
    x = x.unflatten(-1, (-1, LANES, 2))
    step = 1
    while step < LANES:
        pairs = x.unflatten(-2, (-1, 2, step))
        a, b = pairs[..., 0, :, :], pairs[..., 1, :, :]
        x = torch.stack((a + b, a - b), -3).flatten(-4, -2)
        step *= 2
    return x.flatten(-3)
