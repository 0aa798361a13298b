// The counts of cpu/scan.c for a tensor that already lies on the device: NaN, Inf, zeros, subnormals, what float16 would lose,
// bounds and sums. Bound by memory: a thread takes RUN neighbours at once, and counts one by one only where their bounds and the sum of their
// squares say that there is something to count. Counts, bounds and first_nonfinite are exact; the sums are float32 over RUN neighbours
// and float64 above, in no fixed order.
#include "core.cuh"

struct Health {
    u64 counts[6];         // NaN, Inf, zero, subnormal, float16 overflow, float16 underflow
    u64 first_nonfinite;   // index, all ones where there is none
    u32 highest, lowest;   // ordered keys (key_of) of the largest and, complemented, the smallest finite value; 0 if none
    double sum, sumsq;     // over finite values
};

INLINE void load_run(float *x, const void *data, i64 at, int dtype)
{
    if (dtype == F32 && by_sixteen(static_cast<const float *>(data) + at)) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const f32x4 four = reinterpret_cast<const f32x4 *>(static_cast<const float *>(data) + at)[half];
#pragma unroll
            for (int i = 0; i < 4; i++)
                x[half * 4 + i] = four.v[i];
        }
    } else if (dtype != F32 && by_sixteen(static_cast<const u16 *>(data) + at)) {
        const u32x4 eight = *reinterpret_cast<const u32x4 *>(static_cast<const u16 *>(data) + at);
#pragma unroll
        for (int i = 0; i < RUN; i++)
            x[i] = f32_of_code((u16)(eight.v[i / 2] >> i % 2 * 16), dtype);
    } else {
#pragma unroll
        for (int i = 0; i < RUN; i++)
            x[i] = load_as_f32(data, at + i, dtype);
    }
}

// Order of floats as order of unsigned integers; 0 is below every finite value.
INLINE u32 key_of(float x)
{
    const u32 bits = __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

INLINE u64 warp_sum(u64 x)
{
    for (int lane = WARP / 2; lane; lane >>= 1)
        x += __shfl_down_sync(ALL_LANES, x, lane);
    return x;
}

INLINE double warp_sum(double x)
{
    for (int lane = WARP / 2; lane; lane >>= 1)
        x += __shfl_down_sync(ALL_LANES, x, lane);
    return x;
}

INLINE u32 warp_highest(u32 x)
{
    for (int lane = WARP / 2; lane; lane >>= 1) {
        const u32 other = __shfl_down_sync(ALL_LANES, x, lane);
        x = other > x ? other : x;
    }
    return x;
}

extern "C" __global__ void __launch_bounds__(256) health_scan(
    const void *data, Health *out,  // out starts as zeros, first_nonfinite as all ones, and is added to
    i64 count, i64 base,            // base: how many values earlier launches have added to out
    int dtype)
{
    SHARED_MEMORY(Health, warps);  // one a warp
    u64 counts[6] = {0, 0, 0, 0, 0, 0}, first = ~0ull;
    u32 highest = 0, lowest = 0;
    double sum = 0.0, sumsq = 0.0;
    const float normal = dtype == F16 ? 6.103515625e-5f : 1.17549435e-38f;
    const float plain = dtype == F16 ? normal : 2.98023259404989835e-8f;  // from here to 65520 nothing is counted: the float above 2^-25
    const i64 step = (i64)gridDim.x * blockDim.x * RUN;
    for (i64 at = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * RUN; at < count; at += step) {
        if (at + RUN <= count) {
            float x[RUN];
            load_run(x, data, at, dtype);
            float high = x[0], low = x[0], least = lane_abs(x[0]), all = 0.0f, squares = 0.0f;
#pragma unroll
            for (int i = 0; i < RUN; i++) {
                high = lane_max(high, x[i]);
                low = lane_min(low, x[i]);
                least = lane_min(least, lane_abs(x[i]));
                all = all + x[i];
                squares = lane_fma(x[i], x[i], squares);
            }
            if (squares <= 3.4028234663852886e38f && least >= plain && lane_max(high, -low) < 65520.0f) {
                highest = key_of(high) > highest ? key_of(high) : highest;
                lowest = ~key_of(low) > lowest ? ~key_of(low) : lowest;
                sum += all;
                sumsq += squares;
                continue;
            }
        }
        for (i64 i = at; i < at + RUN && i < count; i++) {
            const float x = load_as_f32(data, i, dtype), size = lane_abs(x);
            const bool finite = size <= 3.4028234663852886e38f;
            counts[0] += x != x;
            counts[1] += !finite && x == x;
            counts[2] += size == 0.0f;
            counts[3] += size > 0.0f && size < normal;
            counts[4] += finite && size >= 65520.0f;
            counts[5] += size > 0.0f && size <= 2.98023223876953125e-8f;
            if (finite) {
                const u32 key = key_of(x);
                highest = key > highest ? key : highest;
                lowest = ~key > lowest ? ~key : lowest;
                sum += x;
                sumsq += (double)x * x;
            } else if ((u64)(base + i) < first) {
                first = (u64)(base + i);
            }
        }
    }
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    for (int which = 0; which < 6; which++)
        counts[which] = warp_sum(counts[which]);
    for (int other = WARP / 2; other; other >>= 1) {
        const u64 theirs = __shfl_down_sync(ALL_LANES, first, other);
        first = theirs < first ? theirs : first;
    }
    highest = warp_highest(highest);
    lowest = warp_highest(lowest);
    sum = warp_sum(sum);
    sumsq = warp_sum(sumsq);
    if (lane == 0) {
        for (int which = 0; which < 6; which++)
            warps[warp].counts[which] = counts[which];
        warps[warp].first_nonfinite = first;
        warps[warp].highest = highest;
        warps[warp].lowest = lowest;
        warps[warp].sum = sum;
        warps[warp].sumsq = sumsq;
    }
    __syncthreads();
    if (threadIdx.x)
        return;
    for (u32 other = 0; other < blockDim.x / WARP; other++) {
        for (int which = 0; which < 6; which++)
            atomicAdd(&out->counts[which], warps[other].counts[which]);
        atomicMin(&out->first_nonfinite, warps[other].first_nonfinite);
        atomicMax(&out->highest, warps[other].highest);
        atomicMax(&out->lowest, warps[other].lowest);
        atomicAdd(&out->sum, warps[other].sum);
        atomicAdd(&out->sumsq, warps[other].sumsq);
    }
}
HOST_ENTRY(health_scan)
