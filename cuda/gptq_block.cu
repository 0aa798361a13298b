// GPTQ's inner loop: up to 128 columns of every row in one launch, where a loop of tensor operations needs some twenty
// launches a column. doctor/quant/solve/gptq.py (_round_columns) is the definition.
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
// Shared memory: 64 KiB for U and 512 bytes a thread. The only barrier stands before rows past n leave. Then gptq_refine, one pass
// of refinement after the loop, in the same form.
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
    double *loss;        // f64[n] or nullptr: their squares are added, which sum up to e H e^T of the damped H
    const float *cost;   // f32[k] or nullptr; on the fly only
    const float *candidates;
    i64 n, k;
    int begin, count;    // the block: columns begin .. begin + count, count <= 128
    int width;           // 0: static grids
};

// M[begin + i, begin + j] of M f32[k, k] to u[i * BLOCK + j], by fours where rows are aligned; UPPER: on and above the diagonal only.
template <bool UPPER> INLINE void fill(float *u, const float *M, i64 k, int begin, int count)
{
    const bool by_fours = k % 4 == 0 && begin % 4 == 0;
    for (int quad = threadIdx.x; quad < count * (BLOCK / 4); quad += blockDim.x) {
        const int i = quad / (BLOCK / 4), j = quad % (BLOCK / 4) * 4;
        if (UPPER && j + 3 < i)
            continue;
        const float *from = M + (begin + i) * k + begin + j;
        f32x4 four = {{0.0f, 0.0f, 0.0f, 0.0f}};
        if (by_fours && j + 3 < count)
            four = *reinterpret_cast<const f32x4 *>(from);
        else
            for (int lane = 0; lane < 4; lane++)
                if (j + lane < count)
                    four.v[lane] = from[lane];
        *reinterpret_cast<f32x4 *>(u + i * BLOCK + j) = four;
    }
}

// w[j] += sign * sum of by[i] * u[i, first + j] over columns from .. until of the block; by: this thread's, `threads` apart.
INLINE void add_products(float (&w)[SUB], float sign, int first, int from, int until, const float *u, const float *by, int threads)
{
    for (int i = from; i < until; i++) {
        const float e = sign * by[i * threads];
#pragma unroll
        for (int quad = 0; quad < SUB / 4; quad++) {
            const f32x4 four = *reinterpret_cast<const f32x4 *>(u + i * BLOCK + first + quad * 4);
#pragma unroll
            for (int lane = 0; lane < 4; lane++)
                w[quad * 4 + lane] = lane_fma(e, four.v[lane], w[quad * 4 + lane]);
        }
    }
}

// Columns first .. first + SUB of the block from `rows` f32[k, n], of this row.
INLINE void load_columns(float (&w)[SUB], const float *rows, i64 n, i64 row, int begin, int first, int count)
{
#pragma unroll
    for (int j = 0; j < SUB; j++)
        w[j] = first + j < count ? rows[(begin + first + j) * n + row] : 0.0f;
}

// The same of T, corrected for the errors of columns from .. until of the block.
INLINE void load_corrected(float (&w)[SUB], const Columns &c, i64 row, int first, int from, int until, const float *u,
                           const float *mine, int threads)
{
    load_columns(w, c.T, c.n, row, c.begin, first, c.count);
    add_products(w, -1.0f, first, from, until, u, mine, threads);
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

extern "C" __global__ void __launch_bounds__(128, 1) gptq_block(Columns c, Rule rule)
{
    SHARED_MEMORY(float, u);
    const int threads = blockDim.x;
    const i64 row = (i64)blockIdx.x * threads + threadIdx.x;
    float *mine = u + BLOCK * BLOCK + threadIdx.x;  // error of column i: mine[i * threads]
    fill<true>(u, c.U, c.k, c.begin, c.count);
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
    if (c.loss) {
        float lost = 0.0f;
        for (int i = 0; i < c.count; i++)
            lost = lane_fma(mine[i * threads], mine[i * threads], lost);
        c.loss[row] += lost;
    }
}
HOST_ENTRY(gptq_block)

// One pass of coordinate descent over a block's columns (gptq.descend): each code in turn to its best value given all others. Where
// width > 0, each group's scale then takes its least-squares value given the codes and all other groups (refine_block and
// refit_scale of cpu/solve.c). E = W - Q; what the block's changes of E do to the pull of later columns is one product of
// matrices, and the host's business.
//
// Shared memory as above, and 128 codes a thread.
struct Refinement {
    const float *H;      // f32[k, k], symmetric, damped
    const int *owner;    // i32[k]
    float *scale;        // f32[G, n]
    const float *zero;   // f32[G, n]
    u8 *codes;           // u8[k, n]
    const float *pull;   // f32[k, n]: H E of the block's columns, with all changes of earlier blocks
    float *moved;        // f32[128, n]: out, the changes of E of the block's columns
    double *loss;        // f64[n] or nullptr: the change of e H e^T is added
    i64 n, k;
    int begin, count;    // the block: columns begin .. begin + count, count <= 128
    int width;           // 0: scales stay; else groups are runs of `width` columns, as in Columns, and begin starts one
};

// The new scale of the group of columns start .. start + width, its changes taken into `mine`. Returns what the loss gained.
INLINE float refit_scale(const Refinement &c, const Rule &rule, i64 row, int start, float zero, const float *h, float *mine,
                         const u8 *code, int threads)
{
    float q_pull = 0.0f, q_v = 0.0f;  // levels q, v = H q inside the group
    for (int first = start; first < start + c.width; first += SUB) {
        float owed[SUB], v[SUB] = {0.0f};
        load_columns(owed, c.pull, c.n, row, c.begin, first, c.count);
        add_products(owed, 1.0f, first, 0, start, h, mine, threads);
        for (int i = start; i < start + c.width; i++) {
            const float level = (float)code[i * threads] - zero;
#pragma unroll
            for (int quad = 0; quad < SUB / 4; quad++) {
                const f32x4 four = *reinterpret_cast<const f32x4 *>(h + i * BLOCK + first + quad * 4);
#pragma unroll
                for (int lane = 0; lane < 4; lane++)
                    v[quad * 4 + lane] = lane_fma(level, four.v[lane], v[quad * 4 + lane]);
            }
        }
#pragma unroll
        for (int j = 0; j < SUB; j++) {
            const float level = (float)code[(first + j) * threads] - zero;
            q_pull = lane_fma(level, owed[j], lane_fma(mine[(first + j) * threads], v[j], q_pull));
            q_v = lane_fma(level, v[j], q_v);
        }
    }
    const i64 at = c.owner[c.begin + start] * c.n + row;
    const float old = c.scale[at], sign = old < 0.0f ? -1.0f : 1.0f;
    const float size = q_v > 0.0f ? (old + divide(q_pull, q_v)) * sign : 0.0f;
    if (!(size > 0.0f))
        return 0.0f;
    const float change = sign * store_scale(lane_min(size, largest_of(rule.dtype)), rule.dtype) - old;
    const float gain = change * (2.0f * q_pull - change * q_v);
    if (!(gain > 0.0f))
        return 0.0f;
    c.scale[at] = old + change;
    for (int i = start; i < start + c.width; i++)
        mine[i * threads] -= change * ((float)code[i * threads] - zero);
    return gain;
}

extern "C" __global__ void __launch_bounds__(128) gptq_refine(Refinement c, Rule rule)
{
    SHARED_MEMORY(float, h);
    const int threads = blockDim.x;
    const i64 row = (i64)blockIdx.x * threads + threadIdx.x;
    float *mine = h + BLOCK * BLOCK + threadIdx.x;  // change of column i: mine[i * threads]
    u8 *code = reinterpret_cast<u8 *>(h + BLOCK * BLOCK + BLOCK * threads) + threadIdx.x;
    fill<false>(h, c.H, c.k, c.begin, c.count);
    __syncthreads();
    if (row >= c.n)
        return;
    float lost = 0.0f, middle = 0.0f;
    for (int first = 0; first < c.count; first += SUB) {
        float pull[SUB];
        load_columns(pull, c.pull, c.n, row, c.begin, first, c.count);
        add_products(pull, 1.0f, first, 0, first, h, mine, threads);
#pragma unroll
        for (int j = 0; j < SUB; j++) {
            if (first + j >= c.count)
                break;
            const float *hrow = h + (first + j) * BLOCK + first;
            const i64 at = c.owner[c.begin + first + j] * c.n + row, here = (c.begin + first + j) * c.n + row;
            const float scale = c.scale[at], zero = c.zero[at], own = hrow[j];
            const float value = value_of((float)c.codes[here], scale, zero);
            const float best = own > 0.0f ? divide(pull[j], own) + value : value;
            const float next = code_of(best, Divisor<float>(scale), zero, rule.top), step = value - value_of(next, scale, zero);
            lost += step * (2.0f * pull[j] + step * own);
            middle = zero;
            mine[(first + j) * threads] = step;
            code[(first + j) * threads] = (u8)next;
            c.codes[here] = (u8)next;
#pragma unroll
            for (int later = j + 1; later < SUB; later++)
                pull[later] = lane_fma(step, hrow[later], pull[later]);
        }
        if (c.width && (first + SUB) % c.width == 0)
            lost -= refit_scale(c, rule, row, first + SUB - c.width, middle, h, mine, code, threads);
    }
    for (int i = 0; i < c.count; i++)
        c.moved[i * c.n + row] = mine[i * threads];
    if (c.loss)
        c.loss[row] += lost;
}
HOST_ENTRY(gptq_refine)
