// The counts of cuda/host/scan.c for a tensor that already lies on the device: NaN, Inf, zeros, subnormals, what float16 would lose,
// bounds and sums. Bound by memory. Counts, bounds and first_nonfinite are exact; the sums are float64, in no fixed order.
#include "core.cuh"

struct Health {
    u64 counts[6];         // NaN, Inf, zero, subnormal, float16 overflow, float16 underflow
    u64 first_nonfinite;   // index, all ones where there is none
    u32 highest, lowest;   // ordered keys (key_of) of the largest and, complemented, the smallest finite value; 0 if none
    double sum, sumsq;     // over finite values
};

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
    const i64 step = (i64)gridDim.x * blockDim.x;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
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
