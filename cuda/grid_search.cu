// The grid of every group of W[n, k]: min-max, or the least weighted squared error over the candidates that
// doctor/quant/solve/grid.py tries, in its order. The candidates' factors are grid.py's own, handed over as an array.
//
// One warp is one group, a lane holds every 32nd weight. Groups up to 128 wide stay in registers, wider ones (group_size
// -1) are read again for each candidate, from the cache. Bound by arithmetic: about 30 candidates of a division, a
// rounding and six more operations a weight.
#include "core.cuh"

struct Search {
    const float *W;           // f32[n, k], rows `row_stride` apart
    const float *cost;        // f32[k] or nullptr
    const float *candidates;  // f32[ratios + fine]
    float *scale;             // f32[n, k / width], NaN where the group is not finite
    int *zero;                // i32[n, k / width]
    i64 n, k, row_stride;
    int width;
};

// In 32 bits (the launcher checks): a division in 64 is a subroutine, and registers spill around its call.
INLINE bool find_group(const Search &s, i64 &at, i64 &row, i64 &first)
{
    const u32 groups = (u32)s.k / (u32)s.width, mine = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    at = mine;
    row = mine / groups;
    first = (i64)(mine % groups) * s.width;
    return at < s.n * groups;
}

template <class Group> INLINE void search(const Search &s, const Rule &rule, const Group &group, i64 at)
{
    Fit<float, Group> fit(group, rule);
    fit.run(s.candidates);
    if (threadIdx.x % WARP == 0) {
        s.scale[at] = fit.scale;
        s.zero[at] = (int)fit.zero;
    }
}

template <int EACH> INLINE void search_in_registers(const Search &s, const Rule &rule)
{
    i64 at, row, first;
    if (!find_group(s, at, row, first))
        return;
    WarpGroup<EACH> group;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int column = threadIdx.x % WARP + i * WARP;
        group.weights[i] = column < s.width ? s.W[row * s.row_stride + first + column] : 0.0f;
        group.costs[i] = column >= s.width ? 0.0f : s.cost ? s.cost[first + column] : 1.0f;
    }
    search(s, rule, group, at);
}

// One kernel for each count of weights a lane: with all in one, ptxas spills the barriers that keep lanes together.
extern "C" __global__ void __launch_bounds__(128) grid_search_1(Search s, Rule rule) { search_in_registers<1>(s, rule); }
extern "C" __global__ void __launch_bounds__(128) grid_search_2(Search s, Rule rule) { search_in_registers<2>(s, rule); }
extern "C" __global__ void __launch_bounds__(128) grid_search_4(Search s, Rule rule) { search_in_registers<4>(s, rule); }

extern "C" __global__ void __launch_bounds__(128) grid_search_wide(Search s, Rule rule)
{
    i64 at, row, first;
    if (!find_group(s, at, row, first))
        return;
    const WideWarpGroup group = {s.W + row * s.row_stride + first, s.cost ? s.cost + first : nullptr, s.width,
                                 (int)(threadIdx.x % WARP)};
    search(s, rule, group, at);
}
HOST_ENTRY(grid_search_1)
HOST_ENTRY(grid_search_2)
HOST_ENTRY(grid_search_4)
HOST_ENTRY(grid_search_wide)
