// What AWQ's scale search asks of each candidate: D = grid(W * s) / s - W, with the min-max grid of every group. The loss of a
// candidate is then tr(D H D^T), one product with the Hessian; no forward pass.
//
// One warp is one group, read twice: for the bounds and for the codes (the second time from the cache).
#include "core.cuh"

struct Difference {
    const void *W;       // [n, k] in dtype `from`
    const float *s;      // f32[k], > 0
    float *D;            // f32[n, k], NaN where the group is not finite
    i64 n, k;
    int width, from;
};

// W * s of a group without a copy of it.
struct ScaledGroup {
    const void *W;
    const float *s;
    i64 first;
    int width, from, lane;

    INLINE int count() const { return (width - lane + WARP - 1) / WARP; }
    INLINE float w(int i) const { return load_as_f32(W, first + lane + i * WARP, from) * s[lane + i * WARP]; }
    INLINE float cost(int) const { return 1.0f; }
    INLINE float sum(float x) const { return warp_sum(x); }
    INLINE float least(float x) const { return warp_least(x); }
    INLINE float most(float x) const { return warp_most(x); }
};

extern "C" __global__ void __launch_bounds__(128) awq_difference(Difference d, Rule rule)
{
    const int lane = threadIdx.x % WARP;
    const u32 groups = (u32)d.k / (u32)d.width, at = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (at >= d.n * groups)
        return;
    const i64 column = (i64)(at % groups) * d.width, first = (i64)(at / groups) * d.k + column;
    const ScaledGroup group = {d.W, d.s + column, first, d.width, d.from, lane};
    rule.mse = 0;  // known here, so that the search is not compiled in
    Fit<float, ScaledGroup> fit(group, rule);
    fit.run(nullptr);
    const Divisor<float> by(fit.scale);
    for (int i = 0; i < group.count(); i++) {
        const float w = group.w(i), code = code_of(w, by, fit.zero, rule.top);
        const i64 here = first + lane + i * WARP;
        d.D[here] = divide(value_of(code, fit.scale, fit.zero), d.s[column + lane + i * WARP]) - load_as_f32(d.W, here, d.from);
    }
}
HOST_ENTRY(awq_difference)
