// GPTQ's inner loop: up to 128 columns of every row in one launch, where a loop of tensor operations needs some twenty
// launches a column. doctor/quant/gptq.py (_round_columns) is the definition.
//
// One thread is one row. T is W transposed, so a warp reads 32 neighbours. The block of U lies in shared memory and is
// read by broadcast; a thread's own errors lie beside it. Sixteen columns at a time are in registers: they first take
// every earlier correction of the block, then one another's, unrolled. What the block owes to later columns is one
// product of matrices, and the host's business.
//
// Static grids: owner[j] names the group of column j, in any order. On the fly (width > 0): when the first column of a group comes
// up, the group's weights are brought up to date in T and its grid is fitted on them; then groups are runs of `width`
// columns, a multiple of 16 that divides 128, and `begin` is the start of a group.
//
// Shared memory: 64 KiB for U and 512 bytes a thread. The only barrier stands before rows past n leave.
#include "core.cuh"

enum { BLOCK = 128, SUB = 16 };

struct Columns {
    float *T;            // f32[k, n]; with width > 0 the block's rows are written
    const float *U;      // f32[k, k], upper triangular
    const int *owner;    // i32[k]
    float *scale;        // f32[G, n]
    float *zero;         // f32[G, n]
    u8 *codes;           // u8[k, n]
    float *errors;       // f32[128, n]: (w - value) / U_jj of the block's columns
    const float *cost;   // f32[k] or nullptr; on the fly only
    const float *candidates;
    i64 n, k;
    int begin, count;    // the block: columns begin .. begin + count, count <= 128
    int width;           // 0: static grids
};

// U[begin + i, begin + j] to u[i * BLOCK + j] on and above the diagonal, by fours where rows are aligned.
INLINE void fill(float *u, const Columns &c)
{
    const bool by_fours = c.k % 4 == 0 && c.begin % 4 == 0;
    for (int quad = threadIdx.x; quad < c.count * (BLOCK / 4); quad += blockDim.x) {
        const int i = quad / (BLOCK / 4), j = quad % (BLOCK / 4) * 4;
        if (j + 3 < i)
            continue;
        const float *from = c.U + (c.begin + i) * c.k + c.begin + j;
        f32x4 four = {{0.0f, 0.0f, 0.0f, 0.0f}};
        if (by_fours && j + 3 < c.count)
            four = *reinterpret_cast<const f32x4 *>(from);
        else
            for (int lane = 0; lane < 4; lane++)
                if (j + lane < c.count)
                    four.v[lane] = from[lane];
        *reinterpret_cast<f32x4 *>(u + i * BLOCK + j) = four;
    }
}

// Columns first .. first + SUB of this row, corrected for the errors of columns from .. until of the block.
INLINE void load_corrected(float (&w)[SUB], const Columns &c, i64 row, int first, int from, int until, const float *u,
                           const float *mine, int threads)
{
#pragma unroll
    for (int j = 0; j < SUB; j++)
        w[j] = first + j < c.count ? c.T[(c.begin + first + j) * c.n + row] : 0.0f;
    for (int i = from; i < until; i++) {
        const float e = -mine[i * threads];
#pragma unroll
        for (int quad = 0; quad < SUB / 4; quad++) {
            const f32x4 four = *reinterpret_cast<const f32x4 *>(u + i * BLOCK + first + quad * 4);
#pragma unroll
            for (int lane = 0; lane < 4; lane++)
                w[quad * 4 + lane] = lane_fma(e, four.v[lane], w[quad * 4 + lane]);
        }
    }
}

INLINE void open_group(const Columns &c, const Rule &rule, i64 row, int first, const float *u, const float *mine, int threads)
{
    for (int part = first; part < first + c.width; part += SUB) {
        float w[SUB];
        load_corrected(w, c, row, part, first - first % BLOCK, first, u, mine, threads);
#pragma unroll
        for (int j = 0; j < SUB; j++)
            c.T[(c.begin + part + j) * c.n + row] = w[j];
    }
    const ThreadGroup group = {c.T + (c.begin + first) * c.n + row, c.n, c.cost ? c.cost + c.begin + first : nullptr, c.width};
    Fit<float, ThreadGroup> fit(group, rule);
    fit.run(c.candidates);
    const i64 at = c.owner[c.begin + first] * c.n + row;
    c.scale[at] = fit.scale;
    c.zero[at] = fit.zero;
}

extern "C" __global__ void __launch_bounds__(128) gptq_block(Columns c, Rule rule)
{
    SHARED_MEMORY(float, u);
    const int threads = blockDim.x;
    const i64 row = (i64)blockIdx.x * threads + threadIdx.x;
    float *mine = u + BLOCK * BLOCK + threadIdx.x;  // error of column i: mine[i * threads]
    fill(u, c);
    __syncthreads();
    if (row >= c.n)
        return;
    for (int first = 0; first < c.count; first += SUB) {
        if (c.width && first % c.width == 0)
            open_group(c, rule, row, first, u, mine, threads);
        float w[SUB], scale[SUB], zero[SUB];
        load_corrected(w, c, row, first, c.width ? first - first % c.width : 0, first, u, mine, threads);
#pragma unroll
        for (int j = 0; j < SUB; j++) {
            const i64 at = c.owner[c.begin + (first + j < c.count ? first + j : first)] * c.n + row;
            scale[j] = c.scale[at];
            zero[j] = c.zero[at];
        }
#pragma unroll
        for (int j = 0; j < SUB; j++) {
            if (first + j >= c.count)
                break;
            const float *urow = u + (first + j) * BLOCK + first;
            const float code = code_of(w[j], Divisor<float>(scale[j]), zero[j], rule.top);
            const float e = divide(w[j] - value_of(code, scale[j], zero[j]), urow[j]);
            mine[(first + j) * threads] = e;
            c.errors[(first + j) * c.n + row] = e;
            c.codes[(c.begin + first + j) * c.n + row] = (u8)code;
#pragma unroll
            for (int later = j + 1; later < SUB; later++)
                w[later] = lane_fma(-e, urow[later], w[later]);
        }
    }
}
HOST_ENTRY(gptq_block)
