// ExLlamaV2's quantized KV cache (exllamav2_ext/cuda/cache_q.cuh), value for value: per 64 neighbours the even and the odd positions
// each take a 32-point Hadamard transform (sums rounded to float16 at every step, 1/32 only on reading); every 32 rotated values
// share absmax; code = round(x / absmax * 2^(b-1) + 2^(b-1)), cut at 2^b - 1, so the positive extreme loses one step;
// the stored scale is absmax / 2^(b-1). Q4 is 4 bits for keys and values, Q8 is 8, Q6 is 8 for keys and 4 for values.
//
// One warp is 64 values, a lane holds one even and one odd. A float16 operation is a float32 one rounded: that is exact here,
// since float32 has more than twice its digits. 32 values that average above 2047 overflow the sum: Inf and NaN are kept.
#include "core.cuh"

INLINE float hadamard(float x, int lane)
{
#pragma unroll
    for (int step = 1; step < WARP; step <<= 1) {
        const float other = __shfl_xor_sync(ALL_LANES, x, step);
        x = lane_f16((lane & step ? -x : x) + other);
    }
    return x;
}

// NaN becomes 0, as the conversion of a NaN half to an integer does there.
INLINE u32 kv_code(float x, float absmax, float half)
{
    const float share = lane_f16(lane_f16(x / absmax) * half + half);
    return (u32)clamp(lane_round(share), 0.0f, 2.0f * half - 1.0f);
}

extern "C" __global__ void __launch_bounds__(128) kv_store(
    const u16 *x,  // f16[count]
    u32 *codes,    // u32[count * bits / 32]
    u16 *scales,   // f16[count / 32]
    i64 count,     // a multiple of 64
    int bits)      // 4 or 8
{
    const i64 thread = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    const int lane = threadIdx.x % WARP;
    if (thread / WARP * 64 >= count)
        return;
    const float even = hadamard(f32_of_f16(x[thread * 2]), lane), odd = hadamard(f32_of_f16(x[thread * 2 + 1]), lane);
    float absmax = lane_max(lane_abs(even), lane_abs(odd));
    for (int step = 8; step; step >>= 1)
        absmax = lane_max(absmax, __shfl_xor_sync(ALL_LANES, absmax, step));
    const float half = bits == 4 ? 8.0f : 128.0f;
    u32 word = kv_code(even, absmax, half) | kv_code(odd, absmax, half) << bits;
    const int lanes = 16 / bits;  // that share a word
    for (int step = 1; step < lanes; step <<= 1)
        word |= __shfl_down_sync(ALL_LANES, word, step) << (2 * bits * step);
    if (lane % lanes == 0)
        codes[thread / lanes] = word;
    if (lane % 16 == 0)
        scales[thread / 16] = f16_code(lane_f16(absmax / half));
}
HOST_ENTRY(kv_store)

extern "C" __global__ void __launch_bounds__(128) kv_load(
    const u32 *codes, const u16 *scales, u16 *x, i64 count, int bits)
{
    const i64 thread = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    const int lane = threadIdx.x % WARP;
    if (thread / WARP * 64 >= count)
        return;
    const int lanes = 16 / bits, shift = (int)(thread % lanes) * 2 * bits;
    const u32 word = codes[thread / lanes] >> shift, mask = (1u << bits) - 1u;
    const float scale = f32_of_f16(scales[thread / 16]), half = bits == 4 ? 8.0f : 128.0f;
    const float even = hadamard(lane_f16(((float)(word & mask) - half) * scale), lane);
    const float odd = hadamard(lane_f16(((float)(word >> bits & mask) - half) * scale), lane);
    x[thread * 2] = f16_code(lane_f16(even * 0.03125f));
    x[thread * 2 + 1] = f16_code(lane_f16(odd * 0.03125f));
}
HOST_ENTRY(kv_load)
