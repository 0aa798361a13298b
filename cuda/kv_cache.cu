// ExLlamaV2's quantized KV cache (exllamav2_ext/cuda/cache_q.cuh), value for value: per 64 neighbours the even and the odd positions
// each take a 32-point Hadamard transform (sums rounded to float16 at every step, 1/32 only on reading); every 32 rotated values
// share absmax; code = round(x / absmax * 2^(b-1) + 2^(b-1)), cut at 2^b - 1, so the positive extreme loses one step;
// the stored scale is absmax / 2^(b-1). Q4 is 4 bits for keys and values, Q8 is 8, Q6 is 8 for keys and 4 for values.
//
// One warp is 64 values, a lane holds one even and one odd: a pair of float16, which one shuffle moves and one instruction adds. 32 values that
// average above 2047 overflow the sum: Inf and NaN are kept. A warp takes SPANS such spans and asks for all of them first.
#include "core.cuh"

enum { SPANS = 4, SPAN = 2 * WARP };

INLINE u32 hadamard(u32 pair, int lane)
{
#pragma unroll
    for (int step = 1; step < WARP; step <<= 1) {
        const u32 other = __shfl_xor_sync(ALL_LANES, pair, step);
        pair = add_f16x2(lane & step ? pair ^ 0x80008000u : pair, other);
    }
    return pair;
}

// NaN becomes 0, as the conversion of a NaN half to an integer does there.
INLINE u32 kv_code(float x, float absmax, float half)
{
    const float share = lane_f16(lane_f16(x / absmax) * half + half);
    return (u32)clamp(lane_round(share), 0.0f, 2.0f * half - 1.0f);
}

extern "C" __global__ void __launch_bounds__(128) kv_store(
    const u32 *x,  // f16[count], in pairs
    u32 *codes,    // u32[count * bits / 32]
    u16 *scales,   // f16[count / 32]
    i64 count,     // a multiple of 64
    int bits)      // 4 or 8
{
    const i64 warp = ((i64)blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    const int lane = threadIdx.x % WARP;
    u32 pairs[SPANS];
#pragma unroll
    for (int span = 0; span < SPANS; span++) {
        const i64 at = (warp * SPANS + span) * SPAN;
        pairs[span] = at < count ? x[at / 2 + lane] : 0;
    }
#pragma unroll
    for (int span = 0; span < SPANS; span++) {
        const i64 at = (warp * SPANS + span) * SPAN;
        if (at >= count)
            return;
        const u32 pair = hadamard(pairs[span], lane);
        const float even = f32_of_f16((u16)pair), odd = f32_of_f16((u16)(pair >> 16));
        float absmax = lane_max(lane_abs(even), lane_abs(odd));
        for (int step = 8; step; step >>= 1)
            absmax = lane_max(absmax, __shfl_xor_sync(ALL_LANES, absmax, step));
        const float half = bits == 4 ? 8.0f : 128.0f;
        u32 word = kv_code(even, absmax, half) | kv_code(odd, absmax, half) << bits;
        const int lanes = 16 / bits;  // that share a word
        for (int step = 1; step < lanes; step <<= 1)
            word |= __shfl_down_sync(ALL_LANES, word, step) << (2 * bits * step);
        if (lane % lanes == 0)
            codes[at / 2 / lanes + lane / lanes] = word;
        if (lane % 16 == 0)
            scales[at / 32 + lane / 16] = f16_code(lane_f16(absmax / half));
    }
}
HOST_ENTRY(kv_store)

extern "C" __global__ void __launch_bounds__(128) kv_load(
    const u32 *codes, const u16 *scales, u32 *x, i64 count, int bits)
{
    const i64 warp = ((i64)blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    const int lane = threadIdx.x % WARP, lanes = 16 / bits, shift = lane % lanes * 2 * bits;
    u32 words[SPANS];
    float held[SPANS];
#pragma unroll
    for (int span = 0; span < SPANS; span++) {
        const i64 at = (warp * SPANS + span) * SPAN;
        words[span] = at < count ? codes[at / 2 / lanes + lane / lanes] : 0;
        held[span] = at < count ? f32_of_f16(scales[at / 32 + lane / 16]) : 0.0f;
    }
    const u32 mask = (1u << bits) - 1u;
    const float half = bits == 4 ? 8.0f : 128.0f;
#pragma unroll
    for (int span = 0; span < SPANS; span++) {
        const i64 at = (warp * SPANS + span) * SPAN;
        if (at >= count)
            return;
        const u32 word = words[span] >> shift;
        const u32 even = f16_code(lane_f16(((float)(word & mask) - half) * held[span]));
        const u32 odd = f16_code(lane_f16(((float)(word >> bits & mask) - half) * held[span]));
        const u32 pair = hadamard(even | odd << 16, lane);
        x[at / 2 + lane] = f16_code(lane_f16(f32_of_f16((u16)pair) * 0.03125f)) | (u32)f16_code(lane_f16(f32_of_f16((u16)(pair >> 16)) * 0.03125f)) << 16;
    }
}
HOST_ENTRY(kv_load)
